#!/usr/bin/env python
"""The share of a training run in which steps wait for their data, for text and for packed examples.

Real steps of a small teacher and student read token files through the loader. The smaller the models, the harder it is.

    OMP_NUM_THREADS=1 python tools/benchmarks/loader.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pair import build_pair, platform

from megakd.config.architecture import GPTArchitecture
from megakd.config.load import config_from_dict
from megakd.config.schema import Config, DistillSection
from megakd.data.batches import TrainBatches
from megakd.training.objective import Objective
from megakd.training.step import train_step
from megakd.training.train_data import open_train_data

DOCUMENT = 600


def main() -> None:
    arguments = _arguments()

    def architecture(hidden: int) -> GPTArchitecture:
        return GPTArchitecture(
            num_layers=arguments.layers, hidden_size=hidden, ffn_hidden_size=hidden * 3, vocab_size=arguments.vocab,
            num_attention_heads=hidden // 32, num_query_groups=hidden // 32, kv_channels=32,
            max_position_embeddings=arguments.sequence,
        )  # fmt: skip

    pair = build_pair(architecture(arguments.hidden), architecture(2 * arguments.hidden), torch.float32)
    objective = Objective(DistillSection(), arguments.vocab, pair.mesh.groups.tp, sequence_parallel=False)
    print(json.dumps({"machine": measure.machine(), **vars(arguments)}))
    with tempfile.TemporaryDirectory() as folder:
        _write_files(Path(folder), arguments.vocab, arguments.tokens)
        settings: dict[str, dict[str, object]] = {
            "text": {"train": f"{folder}/text"},
            "text, documents apart": {"train": f"{folder}/text", "reset_attention_mask": True},
            "packed examples": {"train": f"{folder}/examples", "packing": True},
        }
        for name, keys in settings.items():
            data = open_train_data(_config(keys, arguments.sequence))
            batches = TrainBatches(
                data.samples, data.order, micro_batch_size=arguments.micro_batch,
                global_batch_size=arguments.micro_batch * arguments.microbatches, data_parallel_rank=0,
                data_parallel_size=1, device=platform.device,
            )  # fmt: skip
            waits, steps = [], []
            for step in range(arguments.steps + 1):
                started = time.perf_counter()
                microbatches = batches.microbatches(step)
                waited = time.perf_counter() - started
                train_step(pair.student, pair.teacher, objective, pair.optimizer, microbatches, 1e-4, platform)
                # Nothing can be read ahead of the first step.
                if step:
                    waits.append(waited)
                    steps.append(time.perf_counter() - started)
            batches.close()
            share = sum(waits) / sum(steps)
            print(f"{name}: waits {share:.3%} of {np.mean(steps) * 1e3:.0f} ms per step (target 1 %)")


def _write_files(folder: Path, vocab: int, tokens: int) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.geometric(1 / DOCUMENT, size=tokens // DOCUMENT).clip(2, 4 * DOCUMENT)
    for name, dtype, high in (("text", np.int32, vocab), ("examples", np.int32, vocab), ("examples.mask", np.uint8, 3)):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
        for length in lengths.tolist():
            builder.add_document(draw.integers(high, size=length).astype(dtype), [length])
        builder.finalize(str(folder / f"{name}.idx"))


def _config(data: dict[str, object], sequence: int) -> Config:
    return config_from_dict({
        "run": {"output_dir": "unused"}, "student": {"init": {"path": "unused"}},
        "data": {"sequence_length": sequence, "global_batch_size": 1} | data, "optimizer": {"lr": 1e-4},
        "schedule": {"train_steps": 1},
    })  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64, help="the student's; the teacher's is twice that")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=5_000_000, help="in each token file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What saving costs the steps: a checkpoint that is waited for against one written in the background.

Each round saves both ways, in turn, with fsync, after one round that is not counted. Of the background save two figures
are told: how long the step at which it begins stands still, and how much longer all steps take together until it has
its name. Both are shares of the time that a waited save takes.

    OMP_NUM_THREADS=1 python tools/benchmarks/checkpoint.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/benchmarks/checkpoint.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
import torch.distributed as dist
from pair import build_pair, platform, random_batches

from megakd.checkpoint.record import Record
from megakd.checkpoint.run_checkpoints import RunCheckpoints
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import DistillSection
from megakd.training.objective import Objective
from megakd.training.step import train_step


def main() -> None:
    arguments = _arguments()
    hidden = arguments.hidden
    architecture = GPTArchitecture(
        num_layers=arguments.layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, vocab_size=8192,
        num_attention_heads=hidden // 64, num_query_groups=hidden // 64, kv_channels=64, max_position_embeddings=256,
    )  # fmt: skip
    pair = build_pair(architecture, architecture, torch.float32)
    batches = random_batches(8192, 128, 2)
    objective = Objective(DistillSection(), 8192, pair.mesh.groups.tp, sequence_parallel=False)

    def step() -> float:
        started = time.perf_counter()
        train_step(pair.student, pair.teacher, objective, pair.optimizer, batches, 1e-4, platform)
        dist.barrier()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = [Path(scratch)]
        dist.broadcast_object_list(folder, src=0)
        checkpoints = RunCheckpoints(
            folder[0], pair.student.model, pair.optimizer, pair.mesh, keep_last=1, in_background=True
        )
        number = 0

        def save(*, waits: bool) -> float:
            nonlocal number
            number += 1
            dist.barrier()
            started = time.perf_counter()
            assert checkpoints.save(Record(number, {}, {}, {}, ""), waits=waits) is None
            return time.perf_counter() - started

        begins, wholes, seconds = [], [], []
        for round_ in range(arguments.rounds + 1):
            ordinary = statistics.median(step() for _ in range(5))
            waited = save(waits=True)
            begin = save(waits=False)
            whole, steps = begin, 0
            while not _everywhere(checkpoints.is_written):
                whole += step() - ordinary
                steps += 1
            started = time.perf_counter()
            assert checkpoints.finish() is None
            whole += time.perf_counter() - started
            if round_:
                begins.append(begin / waited)
                wholes.append(whole / waited)
                seconds.append((waited, begin, ordinary, steps))
        size = sum(path.stat().st_size for path in next(folder[0].iterdir()).iterdir()) / dist.get_world_size()
        dist.barrier()
    if dist.get_rank() == 0:
        waited, begin, ordinary, steps = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(measure.machine())
        print(f"{size / 1e6:,.0f} MB per rank on {dist.get_world_size()} rank(s), steps of {ordinary:.2f} s")
        print(
            f"waited save {waited:.2f} s; beginning one in the background {begin:.2f} s, named {steps:.0f} steps later"
        )
        print(f"the step at which it begins stands still for {statistics.median(begins):.2f} of a waited save")
        print(f"all steps until it is named take longer by {statistics.median(wholes):.2f} of a waited save")


def _everywhere(done: bool) -> bool:
    flag = torch.tensor(int(not done))
    dist.all_reduce(flag)
    return not int(flag)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the checkpoints go; the system's temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()

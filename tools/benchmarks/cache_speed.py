"""How fast caches are written and read, and what a step from one costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from pair import Pair, build_pair, platform, random_batches

from megakd.cache.codec import Codec
from megakd.cache.sampled import SampledCodec
from megakd.cache.shards import ShardWriter
from megakd.cache.topk import TopKCodec
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import DistillSection
from megakd.data.batches import Batch
from megakd.losses import SparseSignal
from megakd.teacher.cached import signal_mode
from megakd.teacher.recording import TeacherRecorder
from megakd.training.objective import Objective
from megakd.training.step import train_step

VOCAB, SEQUENCE, BATCH = 32000, 512, 4
ROUNDS = 9


def measure_speed(folder: Path) -> None:
    """Print ratios to the teacher's forward and to a cross-entropy step, and rows per second read."""
    pair = build_pair(_architecture(512, 4), _architecture(1024, 6), torch.float32)
    parameters = sum(p.numel() for p in pair.teacher.model.parameters()) + pair.teacher.head.numel()  # type: ignore[union-attr]
    batches = random_batches(VOCAB, SEQUENCE, BATCH)
    for number, batch in enumerate(batches):
        batch["sample_ids"] = torch.arange(BATCH) + number * BATCH
    folder.mkdir(parents=True, exist_ok=True)
    codecs: dict[str, Codec] = {
        "sampled, N 32": SampledCodec(VOCAB, 32),
        "topk, k 32": TopKCodec(VOCAB, 32, tail_samples=3),
    }
    print(f"teacher of {parameters / 1e6:.0f}M parameters, {SEQUENCE * BATCH} tokens, vocabulary {VOCAB:,}")
    _print_writing(pair, batches, codecs, folder)
    _print_reading()
    _print_steps(pair, batches, codecs)


def _architecture(hidden: int, layers: int) -> GPTArchitecture:
    return GPTArchitecture(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=hidden * 3, vocab_size=VOCAB,
        num_attention_heads=hidden // 64, num_query_groups=hidden // 64, kv_channels=64,
        max_position_embeddings=SEQUENCE,
    )  # fmt: skip


def _recorder(pair: Pair, codec: Codec) -> TeacherRecorder:
    group = pair.mesh.groups.tp
    return TeacherRecorder(codec, temperature=1.0, seed=1, tp_group=group, sequence_parallel=False, chunk_mib=None)


def _print_writing(pair: Pair, batches: list[Batch], codecs: dict[str, Codec], folder: Path) -> None:
    def forward() -> None:
        for signal in pair.teacher.signals(batches):
            assert signal is not None
            with torch.no_grad():
                signal.hidden @ signal.head.t()

    def write(codec: Codec) -> None:
        recorder = _recorder(pair, codec)
        shard = ShardWriter(folder / "speed.bin", bytes(16))
        for batch, signal in zip(batches, pair.teacher.signals(batches), strict=True):
            assert signal is not None
            for record in recorder.encode(batch, recorder.extract(batch, signal), BATCH):
                shard.add(record.sample_id, record.token_hash, record.stored, record.content)
        shard.close()

    sides: dict[str, Any] = {"forward": forward}
    for name, codec in codecs.items():
        sides[name] = lambda codec=codec: write(codec)
    seconds = measure.interleaved_seconds(sides, ROUNDS)
    for name in codecs:
        ratio = measure.median_ratio(seconds[name], seconds["forward"])
        print(f"writing, {name:16} {ratio:.3f} of the teacher's forward with its logits", flush=True)


def _print_reading() -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    rows, vocab = 4096, 128256
    known = np.sort(np.stack([random.choice(vocab, 32, replace=False) for _ in range(rows)]), axis=1)
    topk, sampled = TopKCodec(vocab, 32, tail_samples=3), SampledCodec(vocab, 32)
    free = random.permutation(np.setdiff1d(np.arange(vocab), known))
    tail = np.sort(free[: 3 * rows].reshape(rows, 3), axis=1)
    drawn = np.sort(np.take_along_axis(known, random.integers(0, 14, (rows, 32)), 1), axis=1)
    records: dict[str, tuple[Codec, bytes]] = {
        "topk, k 32": (
            topk,
            topk.encode(
                known, -random.exponential(3, known.shape), random.normal(size=rows), tail, random.random(rows)
            ),
        ),
        "sampled, N 32": (sampled, sampled.encode(drawn, random.random(rows))),
    }
    for name, (codec, record) in records.items():
        best = float("inf")
        for _ in range(30):
            started = time.perf_counter()
            codec.decode(record, rows)
            best = min(best, time.perf_counter() - started)
        print(f"reading, {name:16} {rows / best:,.0f} tokens per second on one core", flush=True)


def _print_steps(pair: Pair, batches: list[Batch], codecs: dict[str, Codec]) -> None:
    group = pair.mesh.groups.tp
    alone = Objective(DistillSection(kd_weight=0.0, ce_weight=1.0), VOCAB, group, sequence_parallel=False)
    distil = Objective(DistillSection(), VOCAB, group, sequence_parallel=False)
    kept = {}
    for name, codec in codecs.items():
        recorder = _recorder(pair, codec)
        kept[name] = [
            (codec, [r.content for r in recorder.encode(batch, recorder.extract(batch, signal), BATCH)])
            for batch, signal in zip(batches, pair.teacher.signals(batches), strict=True)
            if signal is not None
        ]

    class Cached:
        """Decodes in the step itself; in training the data's thread does it ahead."""

        def __init__(self, name: str) -> None:
            self.name = name

        def signals(self, microbatches: list[Batch]) -> list[SparseSignal]:
            return [_signal(codec, records) for codec, records in kept[self.name]]

    sides: dict[str, Any] = {
        "ce": lambda: train_step(pair.student, None, alone, pair.optimizer, batches, 1e-4, platform)
    }
    for name in codecs:
        teacher = Cached(name)
        sides[name] = lambda teacher=teacher: train_step(
            pair.student, teacher, distil, pair.optimizer, batches, 1e-4, platform
        )
    seconds = measure.interleaved_seconds(sides, ROUNDS)
    for name in codecs:
        ratio = measure.median_ratio(seconds[name], seconds["ce"])
        print(f"a step,  {name:16} {ratio:.3f} of a step on cross-entropy alone", flush=True)


def _signal(codec: Codec, records: list[bytes]) -> SparseSignal:
    rows = [codec.decode(record, SEQUENCE) for record in records]
    width = max(r.ids.shape[1] for r in rows)
    ids = np.full((SEQUENCE, len(rows), width), -1, dtype=np.int64)
    probabilities = np.zeros(ids.shape, dtype=np.float32)
    for number, r in enumerate(rows):
        ids[:, number, : r.ids.shape[1]] = r.ids
        probabilities[:, number, : r.ids.shape[1]] = r.probabilities
    entropies = [r.entropy for r in rows if r.entropy is not None]
    entropy = torch.from_numpy(np.stack(entropies, axis=1)).flatten() if entropies else None
    flat = torch.from_numpy(ids).flatten(0, 1), torch.from_numpy(probabilities).flatten(0, 1)
    return SparseSignal(*flat, signal_mode(codec), entropy)

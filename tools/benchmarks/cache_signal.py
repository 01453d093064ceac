"""What a cache's signal costs and loses, against the teacher's full distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_runs import BUCKET, SAMPLED, TOPK, quickstart_config
from pair import platform
from torch import Tensor

from megakd.cache.codec import Rows
from megakd.cache.reader import CacheReader
from megakd.cache.sampled import SampledCodec
from megakd.cache.topk import TopKCodec
from megakd.config.schema import Config
from megakd.data.batches import Batch, collate
from megakd.losses import DenseSignal, SparseSignal
from megakd.parallel.random_state import seed_megatron
from megakd.platform import init_distributed
from megakd.training.architectures import shared_vocab_size
from megakd.training.build import build_cached_teacher, build_meshes, build_student, build_teacher
from megakd.training.caching import write_cache
from megakd.training.objective import Objective
from megakd.training.step import accumulate_gradients
from megakd.training.train_data import open_train_data

WINDOWS, PER_BATCH = 16, 4  # of 256 tokens
SEEDS = (1, 2, 3)
LARGE = 128256


def measure_signals(folder: Path) -> None:
    """Print bytes per token, KL, angle and norm ratio of each mode; the worst of the seeds for draws."""
    init_distributed(platform)
    full = _Measured(folder)
    print(f"{'':42}{'bytes/token':>12}{'at V 128,256':>14}{'distinct':>10}{'KL':>10}{'angle':>8}{'norm':>8}")
    found: list[tuple[Any, ...]] = []
    for seed in SEEDS:
        found.append(full.against_cache(f"sampled-{seed}", run__seed=seed, **_settings(SAMPLED)))
    worst = max(found, key=lambda row: row[4])
    _print("sampled, N 32 (worst seed)", worst)
    found = [full.against_cache(f"topk-{seed}", run__seed=seed, **_settings(TOPK)) for seed in SEEDS]
    _print("topk, k 32, draws of the tail (worst seed)", max(found, key=lambda row: row[4]))
    _print("topk, k 32, the tail as a bucket", full.against_cache("bucket", **_settings(BUCKET)))
    _print("topk, k 32, renormalised", full.against_cache("bucket", mode="renormalised", **_settings(BUCKET)))


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in values.items()}


def _print(name: str, row: tuple[float, ...]) -> None:
    size, large, distinct, kl, angle, norm = row
    print(f"{name:42}{size:12.1f}{large:14.1f}{distinct:10.1f}{kl:10.2e}{angle:8.2f}{norm:8.3f}", flush=True)


class _Measured:
    """The student's gradient from full distributions over 4,096 held-out tokens, to hold others against."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._config()
        mesh, teacher_mesh = build_meshes(self.config)
        seed_megatron(1, mesh)
        self.student = build_student(self.config, mesh, "local")
        assert teacher_mesh is not None
        self.teacher = build_teacher(self.config, teacher_mesh, mesh, "local")
        self.objective = Objective(self.config.distill, shared_vocab_size(self.config), mesh.groups.tp, False)
        samples = open_train_data(self.config).samples
        places = np.linspace(0, samples.num_samples - 1, WINDOWS).astype(int).reshape(-1, PER_BATCH)
        self.batches = [collate(samples, row) for row in places]
        self.signals = self.teacher.signals(self.batches)
        self.gradient = self._gradient(self.signals)

    def _config(self, **settings: Any) -> Config:
        """Held-out text is what is cached here, to measure on."""
        config = quickstart_config(self.folder, **settings)
        train = [type(config.data.train[0])(path=str(self.folder / "data" / "held_out"))]
        return config.model_copy(update={"data": config.data.model_copy(update={"train": train, "valid": None})})

    def against_cache(self, name: str, mode: str | None = None, **settings: Any) -> tuple[float, ...]:
        """(bytes per token, at the large vocabulary, ids per token, KL, degrees, ratio of norms)."""
        path = self.folder / "signal" / name
        config = self._config(cache__path=str(path), **settings)
        if not (path / "manifest.json").exists():
            write_cache(config)
        cached = config.model_copy(
            update={"teacher": config.teacher.model_copy(update={"source": "cache", "path": str(path)})}  # type: ignore[union-attr]
        )
        teacher = build_cached_teacher(cached, open_train_data(cached))
        assert teacher is not None
        batches = [teacher.attach(batch) for batch in self.batches]
        signals = [signal for signal in teacher.signals(batches) if signal is not None]
        if mode is not None:
            signals = [SparseSignal(signal.ids, signal.probabilities, mode) for signal in signals]
        gradient = self._gradient(signals)
        cosine = float(gradient @ self.gradient / gradient.norm() / self.gradient.norm())
        reader = CacheReader(path)
        rows = [reader.read(int(i)).rows for batch in self.batches for i in batch["sample_ids"]]
        distinct = float(np.mean(np.concatenate([(r.ids >= 0).sum(1) for r in rows])))
        return (
            reader.manifest.bytes_per_row,
            _large_bytes(rows, reader),
            distinct,
            self._divergence(signals, getattr(reader.manifest.codec, "k", None)),
            math.degrees(math.acos(min(1.0, cosine))),
            float(gradient.norm() / self.gradient.norm()),
        )

    def _gradient(self, signals: Sequence[Any]) -> Tensor:
        class Fixed:
            def signals(self, microbatches: Sequence[Batch]) -> Sequence[Any]:
                return signals

        accumulate_gradients(self.student, Fixed(), self.objective, self.batches)
        return torch.cat([p.main_grad.flatten().double() for p in self.student.model.parameters()])

    def _divergence(self, signals: Sequence[SparseSignal], k: int | None) -> float:
        """Mean over tokens of KL(reconstructed || true).

        Of topk the k ids among themselves, which is what quantisation touches.
        """
        total, count = 0.0, 0
        for dense, sparse in zip(self.signals, signals, strict=True):
            assert isinstance(dense, DenseSignal)
            logits = (dense.hidden @ dense.head.t()).double()[:, : self.objective.vocab_size]
            p = logits.softmax(1)
            ids = sparse.ids[:, :k]
            held = ids >= 0
            true = p.gather(1, ids.clamp(min=0)).masked_fill(~held, 0.0)
            made = sparse.probabilities[:, :k].double().masked_fill(~held, 0.0)
            if k is not None:
                made = made / made.sum(1, keepdim=True)
            if sparse.mode != "renormalised" and k is not None:
                true = true / true.sum(1, keepdim=True)
            total += float((torch.xlogy(made, made) - torch.xlogy(made, true)).sum())
            count += len(made)
        return total / count


def _large_bytes(rows: Sequence[Rows], reader: CacheReader) -> float:
    """Bytes per token of the same rows, with everything around them, were their ids spread over 128,256."""
    spread = np.sort(np.random.default_rng(0).permutation(LARGE)[: reader.manifest.codec.settings()["vocab_size"]])
    random = np.random.default_rng(1).permutation(spread)
    size = count = 0
    for r in rows:
        ids = random[np.maximum(r.ids, 0)]
        if isinstance(reader.manifest.codec, TopKCodec):
            k, tail_samples = reader.manifest.codec.k, reader.manifest.codec.tail_samples
            codec = TopKCodec(LARGE, k, tail_samples=tail_samples)
            tail = np.broadcast_to(np.setdiff1d(np.arange(LARGE), random)[:tail_samples], (len(ids), tail_samples))
            with np.errstate(divide="ignore"):
                values = np.log(r.probabilities[:, :k])
            record = codec.encode(ids[:, :k], values, np.zeros(len(ids)), tail, np.zeros(len(ids)))
        else:
            draws = reader.manifest.codec.settings()["num_samples"]
            counts = np.rint(r.probabilities * draws).astype(int)
            drawn = np.stack([np.sort(np.repeat(i, n)) for i, n in zip(ids, counts, strict=True)])
            assert r.entropy is not None
            record = SampledCodec(LARGE, draws).encode(drawn, r.entropy)
        size += len(record)
        count += len(ids)
    around = reader.manifest.bytes / reader.manifest.rows - _record_bytes(reader)
    return size / count + around


def _record_bytes(reader: CacheReader) -> float:
    lengths = sum(reader.entry(int(i)).length for i in reader.sample_ids)
    return lengths / reader.manifest.rows

"""The teacher as a cache of what it said: read beside the data, on the data's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.cache.codec import Codec
from megakd.cache.reader import CachedSample, CacheReader, sample_hash
from megakd.cache.topk import TopKCodec
from megakd.common.errors import UserError
from megakd.data.batches import Batch, sample_segments
from megakd.losses import SparseSignal

_IDS, _PROBABILITIES, _ENTROPY = "teacher_ids", "teacher_probabilities", "teacher_entropy"


@dataclass(frozen=True)
class Placement:
    """The run's samples `ids` are the cache's from `first_cached` on."""

    ids: range
    first_cached: int


def signal_mode(codec: Codec) -> str:
    """What the rows that it decodes stand for; see SparseSignal."""
    return "tail_bucket" if isinstance(codec, TopKCodec) and not codec.tail_samples else "sampled"


class CachedTeacher:
    """Gives sparse signals from a cache.

    `attach` reads them into a microbatch ahead of time; `signals` hands them over. A rank that needs none (all but the
    last pipeline stage) does not attach.

    Args:
        placements: where the run's samples are in the cache; together they have all of them.
    """

    def __init__(self, reader: CacheReader, placements: Sequence[Placement]) -> None:
        self._reader = reader
        self._placements = placements
        self._mode = signal_mode(reader.manifest.codec)

    def describe(self) -> list[str]:
        """Lines on what is read."""
        manifest = self._reader.manifest
        settings = ", ".join(f"{key} {value}" for key, value in manifest.codec.settings().items())
        return [
            f"teacher from the cache {self._reader.folder}: {settings}, temperature {manifest.job['temperature']:g}; "
            f"{manifest.samples:,} samples, {manifest.rows:,} tokens, {manifest.bytes_per_row:.1f} bytes per token",
            "evaluations have no KL to the teacher, which only the teacher itself gives (teacher.source online)",
        ]

    def attach(self, batch: Batch) -> Batch:
        """A microbatch (see data.batches.collate, in main memory) with what is cached of its samples.

        Returns:
            the batch with teacher_ids int64 and teacher_probabilities float32 [s * b, k], and where there
            are draws teacher_entropy [s * b], rows in the order of the hidden states.

        Raises:
            UserError: a sample is not in the cache, or not as it is here, or a position that counts is not stored.
        """
        count, length = len(batch["sample_ids"]), self._reader.manifest.sequence_length
        columns = {name: batch[name].view(count, length).numpy() for name in ("tokens", "position_ids", "loss_mask")}
        segments = sample_segments(batch)
        samples = []
        for number, sample_id in enumerate(batch["sample_ids"].tolist()):
            key = sample_hash(columns["tokens"][number], columns["position_ids"][number], segments[number])
            sample = self._reader.read(self._cached_id(sample_id), key)
            self._check_stored(sample_id, sample, columns["loss_mask"][number])
            samples.append(sample)
        # Hidden states come in (s, b) order; samples that are one row of tokens come one after another.
        return batch | _collate(samples, length, sample_first="cu_seqlens" in batch)

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[SparseSignal | None]:
        """See Teacher.signals; None for microbatches to which nothing was attached."""
        return [
            SparseSignal(batch[_IDS], batch[_PROBABILITIES], self._mode, batch.get(_ENTROPY)) if _IDS in batch else None
            for batch in microbatches
        ]

    def _cached_id(self, sample_id: int) -> int:
        for placement in self._placements:
            if sample_id in placement.ids:
                return sample_id - placement.ids.start + placement.first_cached
        raise AssertionError(f"sample {sample_id} is of no data set")

    def _check_stored(self, sample_id: int, sample: CachedSample, loss_mask: NDArray[np.float32]) -> None:
        missing = np.flatnonzero((loss_mask != 0) & ~sample.stored)
        if len(missing):
            raise UserError(
                f"{self._reader.folder}: position {int(missing[0])} of sample {self._cached_id(sample_id)} counts in "
                "this run and is not stored; the cache was written with fewer tokens in the loss (data.loss_on, "
                "data.eod_mask_loss, the data's mask and weights). Write the cache again with this run's settings and "
                "data."
            )


def _collate(samples: Sequence[CachedSample], length: int, *, sample_first: bool) -> dict[str, Tensor]:
    width = max(sample.rows.ids.shape[1] for sample in samples)
    shape = (len(samples), length) if sample_first else (length, len(samples))
    ids, probabilities = np.full((*shape, width), -1, dtype=np.int64), np.zeros((*shape, width), dtype=np.float32)
    entropy = np.zeros(shape, dtype=np.float32)
    for number, sample in enumerate(samples):
        rows, used = sample.rows, sample.rows.ids.shape[1]
        mine = number if sample_first else (slice(None), number)
        ids[mine][sample.stored, :used] = rows.ids
        probabilities[mine][sample.stored, :used] = rows.probabilities
        if rows.entropy is not None:
            entropy[mine][sample.stored] = rows.entropy
    attached = {
        _IDS: torch.from_numpy(ids).flatten(0, 1),
        _PROBABILITIES: torch.from_numpy(probabilities).flatten(0, 1),
    }
    if samples[0].rows.entropy is not None:
        attached[_ENTROPY] = torch.from_numpy(entropy).flatten()
    return attached

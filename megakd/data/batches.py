"""Microbatches of a training step or of an evaluation, as one data-parallel rank reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.order import SampleOrder
from megakd.data.samples import Samples

Batch = dict[str, torch.Tensor]


def collate(samples: Samples, ids: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> Batch:
    """Put samples together as a microbatch.

    Returns:
        tokens, labels, position_ids int64 and loss_mask float32 [b, s]; sample_ids int64 [b]. Where attention may end
        inside a sample they are [1, b * s], with cu_seqlens int32 [segments + 1], where each segment begins and the
        last one ends, and max_seqlen int64 [], the longest one's length, which stays in main memory.
    """
    sample_ids = np.array(ids, dtype=np.int64)
    read = [samples.sample(int(i)) for i in sample_ids]
    batch = {
        "tokens": torch.from_numpy(np.stack([sample.tokens for sample in read])),
        "labels": torch.from_numpy(np.stack([sample.labels for sample in read])),
        "loss_mask": torch.from_numpy(np.stack([sample.loss_mask for sample in read])),
        "position_ids": torch.from_numpy(np.stack([sample.position_ids for sample in read])),
    }
    if samples.has_segments:
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        segments = torch.tensor([segment for sample in read for segment in sample.segments])
        batch["cu_seqlens"] = torch.nn.functional.pad(segments.cumsum(0), (1, 0)).to(torch.int32)
        batch["max_seqlen"] = segments.max()
    batch["sample_ids"] = torch.from_numpy(sample_ids)
    return move(batch, device)


def count_microbatches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Microbatches per rank and step; UserError unless the global batch divides evenly."""
    unit = micro_batch_size * data_parallel_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        choices = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(
            f"data.global_batch_size is {global_batch_size}; it must be a multiple of data.micro_batch_size x "
            f"data-parallel ranks = {micro_batch_size} x {data_parallel_size} = {unit}. "
            f"Use {choices}, or another micro_batch_size."
        )
    return global_batch_size // unit


class TrainBatches:
    """The training microbatches of one data-parallel rank; a thread reads the next step ahead.

    Step n is the order's positions [n*gbs, (n+1)*gbs): the same samples in every layout. Within it, microbatch m
    of rank d is the positions that begin at (m*dp + d)*mbs. `attach` adds to a microbatch what is read beside it, on
    the thread too. Raises UserError where gbs is no multiple of mbs*dp.
    """

    def __init__(
        self,
        samples: Samples,
        order: SampleOrder,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        device: torch.device | str = "cpu",
        attach: Callable[[Batch], Batch] | None = None,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
        self.num_microbatches = count_microbatches(global_batch_size, micro_batch_size, data_parallel_size)
        self._samples = samples
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self._device = device
        self._attach = attach
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's microbatches of optimizer step `step`, counted from 0; any step may be asked for."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megakd-data")
        # All reading happens on the one thread, so the order's cache needs no lock.
        reading = self._ahead.pop(step, None) or self._thread.submit(self._read, step)
        for stale in self._ahead.values():
            stale.cancel()
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)}
        # Copies start here: a new thread's current device is not the rank's.
        return [move(batch, self._device) for batch in reading.result()]

    def sample_ids(self, step: int) -> list[int]:
        """Ids of all samples of optimizer step `step`, over all ranks."""
        assert self._thread is not None, "microbatches comes first"
        start, count = step * self._global_batch_size, self._global_batch_size
        ids: list[int] = self._thread.submit(self._order.sample_ids, start, count).result().tolist()
        return ids

    def close(self) -> None:
        """Stop the thread; a later `microbatches` starts another."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._ahead = {}

    def _read(self, step: int) -> list[Batch]:
        ids = self._order.sample_ids(step * self._global_batch_size, self._global_batch_size)
        mine = ids.reshape(self.num_microbatches, self._ranks, self._micro_batch_size)[:, self._rank]
        read = [collate(self._samples, row) for row in mine]
        return read if self._attach is None else [self._attach(batch) for batch in read]


class EvaluationBatches:
    """Held-out samples in the order given, every position read exactly once over the data-parallel ranks.

    Each rank iterates over the same number of microbatches of the same shape. Where the samples run out, the last
    one fills up with loss_mask 0 (its sample_ids stay true). `max_tokens` stops after that many positions, by the
    mask. `num_tokens` is the number of positions read, over all ranks; those that a sample masks count for nothing.
    """

    def __init__(
        self,
        samples: Samples,
        ids: NDArray[np.int64],
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
        length = samples.sequence_length
        available = len(ids) * length
        self.num_tokens = available if max_tokens is None else min(max_tokens, available)
        self.num_samples = -(-self.num_tokens // length)
        self.num_microbatches = -(-self.num_samples // (micro_batch_size * data_parallel_size))
        self._samples = samples
        self._ids = ids
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self._device = device

    def __len__(self) -> int:
        return self.num_microbatches

    def __iter__(self) -> Iterator[Batch]:
        return self.between(0, self.num_microbatches * self._ranks * self._micro_batch_size)

    def between(self, first: int, stop: int) -> Iterator[Batch]:
        """This rank's microbatches of the samples in places [first, stop), filled up to whole ones on every rank."""
        unit = self._ranks * self._micro_batch_size
        for start in range(
            first + self._rank * self._micro_batch_size, stop + self._rank * self._micro_batch_size, unit
        ):
            yield self._at(start)

    def _at(self, start: int) -> Batch:
        length = self._samples.sequence_length
        places = np.arange(start, start + self._micro_batch_size, dtype=np.int64)
        batch = collate(self._samples, self._ids[np.minimum(places, self.num_samples - 1)])
        token_places = torch.from_numpy(places)[:, None] * length + torch.arange(length)  # [b, s]
        batch["loss_mask"] *= (token_places < self.num_tokens).view(batch["loss_mask"].shape)
        return move(batch, self._device)


def move(batch: Batch, device: torch.device | str) -> Batch:
    """A copy on a device; max_seqlen stays in main memory."""
    return {name: tensor if name == "max_seqlen" else tensor.to(device) for name, tensor in batch.items()}


def sample_segments(batch: Batch) -> list[list[int]]:
    """Of each sample of a microbatch, the lengths of the stretches that attend to themselves alone."""
    count = len(batch["sample_ids"])
    length = batch["tokens"].numel() // count
    if "cu_seqlens" not in batch:
        return [[length]] * count
    ends = batch["cu_seqlens"].numpy().astype(np.int64)
    borders = np.searchsorted(ends, np.arange(count + 1) * length)
    return [np.diff(ends[borders[n] : borders[n + 1] + 1]).tolist() for n in range(count)]

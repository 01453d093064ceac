"""The vocabulary and the hidden states as they are spread over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Finite, since -inf makes 0 * NaN in weighted sums, and a shard that is all padding needs a finite maximum.
SENTINEL = -1e30


@dataclass(frozen=True)
class VocabularyShard:
    """The global ids [first_id, first_id + width) of this rank's columns, of which the first `valid` exist."""

    group: dist.ProcessGroup | None
    tp_size: int
    tp_rank: int
    first_id: int
    width: int
    valid: int
    vocab_size: int

    def mask_(self, logits: Tensor) -> None:
        """Give the padded columns of logits [c, v/tp] the sentinel."""
        if self.valid < self.width:
            logits[:, self.valid :].fill_(SENTINEL)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's columns [c, 1] of global ids [c] (some column where not held), and which are held [c, 1]."""
        columns = (ids - self.first_id).unsqueeze(1)
        held = (columns >= 0) & (columns < self.valid)
        return columns.clamp(0, self.width - 1), held

    def gather_statistics(self, rows: Tensor) -> Tensor:
        """Every rank's [c, k] statistics, [tp, c, k]."""
        if self.tp_size == 1:
            return rows.unsqueeze(0)
        gathered = rows.new_empty((self.tp_size * rows.shape[0], rows.shape[1]))
        dist.all_gather_into_tensor(gathered, rows, group=self.group)
        return gathered.view(self.tp_size, *rows.shape)

    def sum_statistics(self, figures: Tensor) -> Tensor:
        """Figures of any shape summed over the ranks, in place."""
        if self.tp_size > 1:
            dist.all_reduce(figures, group=self.group)
        return figures


def build_shard(width: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabularyShard:
    """The shard of a rank that holds `width` of the padded vocabulary's columns; ValueError where ids are missing."""
    tp_size = 1 if group is None else group.size()
    tp_rank = 0 if group is None else group.rank()
    first_id = tp_rank * width
    if not 0 < vocab_size <= tp_size * width:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the heads have {tp_size} x {width} rows; it must be between 1 and "
            f"{tp_size * width}. Use the smaller of the two models' vocab_size."
        )
    return VocabularyShard(
        group, tp_size, tp_rank, first_id, width, min(max(vocab_size - first_id, 0), width), vocab_size
    )


def gather_sequence(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All rows [n, h] of hidden states that are spread over the sequence, [n/tp, h] each."""
    if group is None or group.size() == 1:
        return hidden
    gathered = hidden.new_empty((hidden.shape[0] * group.size(), hidden.shape[1]))
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def reduce_hidden_gradient(gradient: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum [n, h] over the ranks: [n, h] everywhere, or this rank's [n/tp, h] under sequence parallelism."""
    if group is None or group.size() == 1:
        return gradient
    if not sequence_parallel:
        dist.all_reduce(gradient, group=group)
        return gradient
    mine = gradient.new_empty((gradient.shape[0] // group.size(), gradient.shape[1]))
    dist.reduce_scatter_tensor(mine, gradient, group=group)
    return mine


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

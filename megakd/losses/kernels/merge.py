"""Merged figures in the order that kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.rows import MergedRows


@dataclass(frozen=True)
class KernelRows:
    """Per row of a chunk, from the figures of all ranks.

    kd: [c], None where the divergence needs a second round of sums. ce: [c].
    shifts: fp32 [3, c], or [5, c] with a teacher: this rank's largest logit; what added to (z - largest) / T makes it
        ln q; what added to z - largest makes it ln q at T = 1; the teacher's largest, and what makes it ln p.
    offsets: [c, 1], that of `Divergence`; None without a teacher, or where it is - sum q h of a second round.
    """

    kd: Tensor | None
    ce: Tensor
    shifts: Tensor
    offsets: Tensor | None


def merge_rows(merged: MergedRows) -> KernelRows:
    """From the figures of all ranks, see `row_statistics`."""
    factors, ce, divergence = merged.factors(), merged.cross_entropies(), merged.objective.divergence
    shifts = [x.squeeze(1) for x in (factors.reference, factors.student_shift, factors.cross_entropy_shift)]
    if factors.teacher_shift is not None:
        shifts += [merged.figures[merged.objective.shard.tp_rank, 4], factors.teacher_shift.squeeze(1)]
    kd: Tensor | None = torch.zeros_like(ce)
    offsets = None
    if divergence is not None:
        kd, offsets = (None, None) if divergence.merge is None else merged.divergences()
    return KernelRows(kd, ce, torch.stack(shifts), offsets)

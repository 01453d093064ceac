"""Figures per row of logits, put together over the tensor ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.objective import Objective


@dataclass(frozen=True)
class RowTotals:
    """Per row: the losses [c] over the whole vocabulary, and what this rank's gradient needs, [c, 1] each.

    With x = logits / T and z = x - reference: student_shift + z is ln q, cross_entropy_shift + T z is ln q at T = 1,
    and teacher_shift + (u / T_t - its reference) is ln p. offset is that of `Divergence`. kd and offset are still
    missing after the first of two rounds.
    """

    kd: Tensor | None
    ce: Tensor
    reference: Tensor
    student_shift: Tensor
    cross_entropy_shift: Tensor
    teacher_shift: Tensor | None
    offset: Tensor | None


def merge_figures(objective: Objective, figures: Tensor) -> RowTotals:
    """Put every rank's figures [k, c] together, with one all-gather.

    In order: the label's logit, 0 where another rank holds it; a reference of x = z/T; ln sum e^(x - reference);
    ln sum e^(T (x - reference)). With a teacher also: a reference of y = u/T_t; ln sum e^(y - reference); the mean
    of `Divergence`, 0 for one of two rounds.
    """
    shard, temperature, divergence = objective.shard, objective.temperature, objective.divergence
    label_logits, references, log_sums, log_sums_ce, *teacher = shard.gather_statistics(figures).unbind(1)
    highest_ce, total_ce, shifts_ce = merge_sums(temperature * references, log_sums_ce)
    shifts = shifts_ce if temperature == 1.0 else merge_sums(references, log_sums)[2]
    ce = highest_ce - label_logits.sum(0) + total_ce
    mine = shard.tp_rank
    reference, shift, shift_ce = (x[mine].unsqueeze(1) for x in (references, shifts, shifts_ce))
    if divergence is None:
        return RowTotals(torch.zeros_like(ce), ce, reference, shift, shift_ce, None, None)
    teacher_references, teacher_log_sums, means = teacher
    teacher_shifts = merge_sums(teacher_references, teacher_log_sums)[2]
    teacher_shift = teacher_shifts[mine].unsqueeze(1)
    if divergence.merge is None:
        return RowTotals(None, ce, reference, shift, shift_ce, teacher_shift, None)
    kd, offsets = divergence.merge(means, shifts, teacher_shifts, log_sums, teacher_log_sums)
    return RowTotals(kd, ce, reference, shift, shift_ce, teacher_shift, offsets[mine].unsqueeze(1))


def merge_sums(references: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put all ranks' references and ln sum e^(x - reference), [tp, c], together: (highest, total, shifts).

    highest [c] is the largest reference, total [c] is ln sum e^(x - highest), and shifts [tp, c] added to a rank's
    x - reference give the logarithm of the softmax. References stay apart from logarithms of sums, which would lose
    their digits beside large logits.
    """
    if references.shape[0] == 1:
        return references[0], log_sums[0], -log_sums
    highest = references.amax(0)
    relative = references - highest
    total = torch.logsumexp(relative + log_sums, 0)
    return highest, total, relative - total

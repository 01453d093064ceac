"""Figures per row of logits, put together over the tensor ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.objective import Objective


@dataclass(frozen=True)
class RowFactors:
    """What this rank's gradient needs per row, [c, 1] each.

    With x = logits / T and z = x - reference: student_shift + z is ln q, cross_entropy_shift + T z is ln q at T = 1,
    and teacher_shift + (u / T_t - its reference) is ln p. offset is that of `Divergence`, None until it is known.
    """

    reference: Tensor
    student_shift: Tensor
    cross_entropy_shift: Tensor
    teacher_shift: Tensor | None
    offset: Tensor | None = None


@dataclass(frozen=True)
class MergedRows:
    """Figures of all tensor ranks, [tp, k, c], and what follows from them.

    In order: the label's logit, 0 where another rank holds it; a reference of x = z/T; ln sum e^(x - reference);
    ln sum e^(T (x - reference)). With a teacher also: a reference of y = u/T_t; ln sum e^(y - reference); the mean
    of `Divergence`, 0 for one of two rounds.
    """

    objective: Objective
    figures: Tensor

    def cross_entropies(self) -> Tensor:
        """[c], nats."""
        label_logits, references, _, log_sums = self.figures.unbind(1)[:4]
        highest, total, _ = merge_sums(self.objective.temperature * references, log_sums)
        return highest - label_logits.sum(0) + total

    def divergences(self) -> tuple[Tensor, Tensor]:
        """Of one round, (kd [c], this rank's offset [c, 1])."""
        divergence, shard = self.objective.divergence, self.objective.shard
        assert divergence is not None and divergence.merge is not None
        _, references, log_sums, _, teacher_references, teacher_log_sums, means = self.figures.unbind(1)
        shifts = merge_sums(references, log_sums)[2]
        teacher_shifts = merge_sums(teacher_references, teacher_log_sums)[2]
        kd, offsets = divergence.merge(means, shifts, teacher_shifts, log_sums, teacher_log_sums)
        return kd, offsets[shard.tp_rank].unsqueeze(1)

    def factors(self) -> RowFactors:
        """What the gradient needs, without the offset."""
        temperature, mine = self.objective.temperature, self.objective.shard.tp_rank
        _, references, log_sums, log_sums_ce, *teacher = self.figures.unbind(1)
        shifts = shifts_ce = merge_sums(references, log_sums)[2]
        if temperature != 1.0:
            shifts_ce = merge_sums(temperature * references, log_sums_ce)[2]
        teacher_shift = merge_sums(teacher[0], teacher[1])[2][mine].unsqueeze(1) if teacher else None
        reference, shift, shift_ce = (x[mine].unsqueeze(1) for x in (references, shifts, shifts_ce))
        return RowFactors(reference, shift, shift_ce, teacher_shift)


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

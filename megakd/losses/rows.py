"""Figures per row of logits, put together over the tensor ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.objective import Objective


@dataclass(frozen=True)
class RowFactors:
    """What this rank's gradient needs per row, [c, 1] each.

    With x = (z - reference) / T: student_shift + x is ln q, cross_entropy_shift + T x is ln q at T = 1, and
    teacher_shift + (u - its reference) / T_t is ln p. offset is that of `Divergence`, None until it is known.
    """

    reference: Tensor
    student_shift: Tensor
    cross_entropy_shift: Tensor
    teacher_shift: Tensor | None
    offset: Tensor | None = None


@dataclass(frozen=True)
class MergedRows:
    """Figures of all tensor ranks, [tp, k, c], and what follows from them.

    In order: the label's logit, 0 where another rank holds it; a reference of the logits z; with
    x = (z - reference) / T ln sum e^x and ln sum e^(T x). With a teacher also: a reference of its logits u,
    ln sum e^((u - reference) / T_t), and the mean of `Divergence`, 0 for one of two rounds.
    """

    objective: Objective
    figures: Tensor

    def cross_entropies(self) -> Tensor:
        """[c], nats."""
        label_logits, references, _, log_sums = self.figures.unbind(1)[:4]
        highest, total, _ = merge_sums(references, log_sums)
        return highest - label_logits.sum(0) + total

    def divergences(self) -> tuple[Tensor, Tensor]:
        """Of one round, (kd [c], this rank's offset [c, 1])."""
        divergence, shard = self.objective.divergence, self.objective.shard
        assert divergence is not None and divergence.merge is not None
        _, references, log_sums, _, teacher_references, teacher_log_sums, means = self.figures.unbind(1)
        shifts = merge_sums(references, log_sums, self.objective.temperature)[2]
        teacher_shifts = merge_sums(teacher_references, teacher_log_sums, self.objective.teacher_temperature)[2]
        kd, offsets = divergence.merge(means, shifts, teacher_shifts, log_sums, teacher_log_sums)
        return kd, offsets[shard.tp_rank].unsqueeze(1)

    def factors(self) -> RowFactors:
        """What the gradient needs, without the offset."""
        objective, mine = self.objective, self.objective.shard.tp_rank
        _, references, log_sums, log_sums_ce, *teacher = self.figures.unbind(1)
        shifts = shifts_ce = merge_sums(references, log_sums, objective.temperature)[2]
        if objective.temperature != 1.0:
            shifts_ce = merge_sums(references, log_sums_ce)[2]
        teacher_shift = None
        if teacher:
            teacher_shift = merge_sums(teacher[0], teacher[1], objective.teacher_temperature)[2][mine].unsqueeze(1)
        reference, shift, shift_ce = (x[mine].unsqueeze(1) for x in (references, shifts, shifts_ce))
        return RowFactors(reference, shift, shift_ce, teacher_shift)


def merge_sums(references: Tensor, log_sums: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Put all ranks' references and ln sum e^((z - reference) / T), [tp, c], together: (highest, total, shifts).

    highest [c] is the largest reference, total [c] is ln sum e^((z - highest) / T), and shifts [tp, c] added to a
    rank's (z - reference) / T give the logarithm of the softmax. References stay apart from logarithms of sums and
    are divided last: either would cost digits beside large logits.
    """
    if references.shape[0] == 1:
        return references[0], log_sums[0], -log_sums
    highest = references.amax(0)
    relative = references - highest
    if temperature != 1.0:
        relative = relative / temperature
    total = torch.logsumexp(relative + log_sums, 0)
    return highest, total, relative - total

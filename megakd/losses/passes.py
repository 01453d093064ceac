"""The elementwise work on a block of logits: its figures, then the gradient in the place of the student's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.objective import Objective
from megakd.losses.rows import RowFactors

# In fp32 sums of e^x and of e^x x over any vocabulary stay in range while rows' largest x is within this of 0.
_UNSHIFTED = 40.0


@dataclass(frozen=True)
class Block:
    """Some rows of a piece: logits z and u [r, v/tp] (u None without a teacher), scratch buffers of that shape."""

    part: slice
    z: Tensor
    u: Tensor | None
    scratch: list[Tensor]


def scratch_count(objective: Objective) -> int:
    """How many scratch buffers a block needs."""
    if objective.second_round:
        return 4 if objective.keeps_logits else 3
    return 2 if objective.student_form.softcap is not None else 1


def reduce_block(objective: Objective, block: Block, figures: Sequence[Tensor]) -> None:
    """Write this rank's figures, each [r, 1]: the reference of z, and with x = (z - reference) / T sum e^x and
    sum e^(T x); with a teacher also the reference of u and the two sums of its divergence.

    Leaves x for z, exponentiated unless `keeps_logits`, and for u what the divergence leaves.
    """
    z, scratch, temperature, divergence = block.z, block.scratch[0], objective.temperature, objective.divergence
    in_place = not (objective.keeps_logits or objective.second_round)
    _shift(z, temperature, figures[0], max(1.0, 1.0 / temperature))
    if temperature != 1.0:
        torch.sum(torch.mul(z, temperature, out=scratch).exp_(), 1, keepdim=True, out=figures[2])
    if block.u is not None and divergence is not None:
        _shift(block.u, objective.teacher_temperature, figures[3], 1.0 / objective.teacher_temperature)
        divergence.reduce(z, block.u, scratch, in_place, figures[1], figures[4], figures[5])
    else:
        torch.sum(z.exp_() if in_place else torch.exp(z, out=scratch), 1, keepdim=True, out=figures[1])
    if temperature == 1.0:
        figures[2].copy_(figures[1])


def evaluate_block(objective: Objective, block: Block, factors: RowFactors, sums: Tensor) -> None:
    """The second round: z becomes q unless it is kept, u what the divergence leaves; writes its two sums [2, r, 1]."""
    assert objective.divergence is not None and objective.divergence.evaluate is not None
    assert block.u is not None and factors.teacher_shift is not None
    z, u, t, spares = block.z, block.u, block.scratch[0], block.scratch[1:3]
    shift, teacher_shift = factors.student_shift[block.part], factors.teacher_shift[block.part]
    torch.sub(u, z, out=t).add_(teacher_shift - shift)
    u.add_(teacher_shift).exp_()
    q = torch.add(z, shift, out=block.scratch[3]) if objective.keeps_logits else z.add_(shift)
    objective.divergence.evaluate(t, u, q.exp_(), spares, sums[0], sums[1])


def write_block(objective: Objective, block: Block, labels: tuple[Tensor, Tensor], factors: RowFactors) -> None:
    """Overwrite z with the gradient by hidden @ head^T of a token of weight 1.

    labels: columns [c, 1] and what is added there [c, 1], for all rows of the piece.
    """
    part, scale = block.part, objective.student_form.scale
    if objective.keeps_logits:
        _write_from_logits(objective, block, scale, factors)
    else:
        _write_from_exponentials(objective, block, scale, factors)
    block.z.scatter_add_(1, labels[0][part], labels[1][part])
    if objective.student_form.softcap is not None:
        block.z.mul_(block.scratch[-1])


def _write_from_exponentials(objective: Objective, block: Block, scale: float, factors: RowFactors) -> None:
    """z = kd_slope * (the divergence's gradient) + ce_weight * q from e^z, where q is the same in both."""
    part, divergence = block.part, objective.divergence
    kd, ce = objective.kd_slope * scale, objective.ce_weight * scale
    if objective.second_round:
        student_factor: Tensor | float = 1.0  # z is q itself
    else:
        student_factor = factors.student_shift[part].exp()
    if divergence is None or block.u is None or kd == 0.0:
        block.z.mul_(ce * student_factor)
    elif divergence.separable and factors.teacher_shift is not None:
        block.z.mul_((kd + ce) * student_factor)
        block.z.addcmul_(block.u, factors.teacher_shift[part].exp().mul_(kd), value=-1)
    elif factors.offset is not None:
        block.z.mul_(block.u.add_(factors.offset[part] + ce / kd)).mul_(kd * student_factor)


def _write_from_logits(objective: Objective, block: Block, scale: float, factors: RowFactors) -> None:
    """z = kd_slope * (the divergence's gradient) + ce_weight * q(1) from z; the softcap's slope in the last scratch."""
    part, divergence, temperature = block.part, objective.divergence, objective.temperature
    kd, ce, form = objective.kd_slope * scale, objective.ce_weight * scale, objective.student_form
    if form.softcap is not None:
        form.softcap_slope(block.z, temperature, factors.reference[part], block.scratch[-1])
    cross_entropy = block.scratch[0]
    torch.add(factors.cross_entropy_shift[part], block.z, alpha=temperature, out=cross_entropy).exp_().mul_(ce)
    if divergence is None or block.u is None or kd == 0.0:
        block.z.copy_(cross_entropy)
        return
    block.z.add_(factors.student_shift[part]).exp_()
    if divergence.separable and factors.teacher_shift is not None:
        block.z.mul_(kd).addcmul_(block.u, factors.teacher_shift[part].exp().mul_(kd), value=-1)
    elif factors.offset is not None:
        block.z.mul_(block.u.add_(factors.offset[part])).mul_(kd)
    block.z.add_(cross_entropy)


def _shift(logits: Tensor, temperature: float, reference: Tensor, largest_factor: float) -> None:
    """Take a reference [r, 1] off logits [r, v/tp] and divide by the temperature, in place. It is their maximum, or 0
    where e^(largest_factor * logits) is in range as it is (not on GPU, where to ask would wait for the device).
    """
    torch.amax(logits, 1, keepdim=True, out=reference)
    if not logits.is_cuda and reference.abs().max().item() * largest_factor <= _UNSHIFTED:
        reference.zero_()
    else:
        logits.sub_(reference)
    if temperature != 1.0:
        logits.mul_(1.0 / temperature)

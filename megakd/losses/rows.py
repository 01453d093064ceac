"""One chunk of logits: reduced to a few figures per row, then overwritten with the loss's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.chunking import block_rows
from megakd.losses.divergences import Divergence
from megakd.losses.shards import VocabularyShard


@dataclass(frozen=True)
class Objective:
    """What is computed per token. `divergence` is None without a teacher, and `temperature` 1.0 then.

    kd_slope: what the divergence's gradient with respect to z/T is multiplied by to be total's by z: kd_weight * T,
        or kd_weight / T without the T^2 factor.
    """

    shard: VocabularyShard
    divergence: Divergence | None
    temperature: float
    kd_slope: float
    ce_weight: float


@dataclass(frozen=True)
class Block:
    """Some rows of a chunk: logits z and u [r, v/tp] (u None without a teacher), scratch of that shape."""

    part: slice
    z: Tensor
    u: Tensor | None
    scratch: Tensor


@dataclass(frozen=True)
class ChunkBuffers:
    """Reused memory: student's and teacher's logits [c, v/tp], and scratch [r, v/tp] for a block of r rows."""

    student: Tensor
    teacher: Tensor | None
    scratch: Tensor

    def rows(self, count: int) -> ChunkBuffers:
        """The same memory for a chunk of `count` rows."""
        teacher = None if self.teacher is None else self.teacher[:count]
        return ChunkBuffers(self.student[:count], teacher, self.scratch)

    def blocks(self) -> list[Block]:
        """The chunk in blocks that elementwise passes treat one after the other."""
        count, step = self.student.shape[0], self.scratch.shape[0]
        parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        return [
            Block(
                p, self.student[p], None if self.teacher is None else self.teacher[p], self.scratch[: p.stop - p.start]
            )
            for p in parts
        ]


@dataclass(frozen=True)
class ChunkRows:
    """Per row of a chunk: the losses [c] over the whole vocabulary, and logarithms [c, 1] for the gradient.

    student_shift + z is ln q for the stored z = z/T - local maximum; cross_entropy_shift + T z is ln q at T = 1;
    teacher_shift is the logarithm of what turns the stored e^u into p.
    """

    kd: Tensor
    ce: Tensor
    student_shift: Tensor
    cross_entropy_shift: Tensor
    teacher_shift: Tensor | None


def build_buffers(objective: Objective, rows: int, dtype: torch.dtype, device: torch.device) -> ChunkBuffers:
    """Memory for chunks of `rows` rows."""
    width = objective.shard.width
    block = block_rows(rows, width, device, dtype.itemsize)
    student = torch.empty((rows, width), dtype=dtype, device=device)
    teacher = None if objective.divergence is None else torch.empty_like(student)
    return ChunkBuffers(student, teacher, torch.empty((block, width), dtype=dtype, device=device))


def reduce_chunk(objective: Objective, buffers: ChunkBuffers, blocks: list[Block], labels: Tensor) -> ChunkRows:
    """The losses of a chunk's rows, labels [c]; one collective over the tensor ranks.

    Buffers hold masked logits at T = 1. Afterwards the student's holds z/T - maximum, exponentiated where T is 1, and
    the teacher's what its divergence leaves there.
    """
    shard, temperature = objective.shard, objective.temperature
    columns, held = shard.locate(labels)
    label_logit = buffers.student.gather(1, columns).mul_(held)
    figures = buffers.student.new_empty((3 if objective.divergence is None else 6, labels.shape[0], 1))
    for block in blocks:
        _reduce_block(objective, block, list(figures[:, block.part].unbind()))
    figures[1:3].log_()
    if objective.divergence is not None:
        figures[5].div_(figures[4])
        figures[4].log_()

    gathered = shard.gather_statistics(torch.cat([label_logit, *figures.unbind()], dim=1)).unbind(2)  # each [tp, c]
    label_logits, maxima, log_sums, log_sums_ce, *teacher = gathered
    highest_ce, total_ce, shifts_ce = merge_sums(temperature * maxima, log_sums_ce)
    shifts = shifts_ce if temperature == 1.0 else merge_sums(maxima, log_sums)[2]
    ce = highest_ce - label_logits.sum(0) + total_ce
    mine = shard.tp_rank
    if objective.divergence is None:
        return ChunkRows(torch.zeros_like(ce), ce, shifts[mine].unsqueeze(1), shifts_ce[mine].unsqueeze(1), None)
    teacher_maxima, teacher_log_sums, means = teacher
    teacher_shifts = merge_sums(teacher_maxima, teacher_log_sums)[2]
    kd = objective.divergence.merge(means, shifts, teacher_shifts, log_sums, teacher_log_sums)
    own = [every[mine].unsqueeze(1) for every in (shifts, shifts_ce, teacher_shifts)]
    return ChunkRows(kd, ce, own[0], own[1], own[2])


def merge_sums(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put all ranks' maxima and ln sum e^(x - maximum), [tp, c], together: (highest, total, shifts).

    highest [c] is the maximum of all, total [c] is ln sum e^(x - highest), and shifts [tp, c] added to a rank's
    x - maximum give the logarithm of the softmax. Maxima stay apart from logarithms of sums, which would lose their
    digits beside large logits.
    """
    highest = maxima.amax(0)
    relative = maxima - highest
    total = torch.logsumexp(relative + log_sums, 0)
    return highest, total, relative - total


def write_gradient(
    objective: Objective, buffers: ChunkBuffers, blocks: list[Block], labels: Tensor, weights: Tensor, rows: ChunkRows
) -> None:
    """Overwrite the student's buffer with the gradient with respect to its logits; token weights [c]."""
    kd, ce = (weight * weights.unsqueeze(1) for weight in (objective.kd_slope, objective.ce_weight))
    student_factor = (kd + ce) * rows.student_shift.exp()
    teacher_factor = None if rows.teacher_shift is None else kd * rows.teacher_shift.exp()
    for block in blocks:
        part = block.part
        if objective.temperature == 1.0:
            block.z.mul_(student_factor[part])
        else:
            _write_tempered_student(objective, block, kd[part], ce[part], rows)
        if objective.divergence is not None and block.u is not None and teacher_factor is not None:
            objective.divergence.add_gradient(block.z, block.u, teacher_factor[part])
    columns, held = objective.shard.locate(labels)
    buffers.student.scatter_add_(1, columns, -ce * held)


def _write_tempered_student(objective: Objective, block: Block, kd: Tensor, ce: Tensor, rows: ChunkRows) -> None:
    """z = kd * q(T) + ce * q(1)."""
    if objective.ce_weight != 0.0:
        torch.mul(block.z, objective.temperature, out=block.scratch)
        block.scratch.add_(rows.cross_entropy_shift[block.part]).exp_().mul_(ce)
    block.z.add_(rows.student_shift[block.part]).exp_().mul_(kd)
    if objective.ce_weight != 0.0:
        block.z.add_(block.scratch)


def _reduce_block(objective: Objective, block: Block, figures: list[Tensor]) -> None:
    """Write local figures, each [r, 1]: max z/T, sum e^(z/T - max), sum e^(T (z/T - max)); with a teacher also
    max u/T and the two sums of its divergence.
    """
    z, scratch, temperature = block.z, block.scratch, objective.temperature
    _shift(z, temperature, figures[0])
    if block.u is not None and objective.divergence is not None:
        _shift(block.u, temperature, figures[3])
        objective.divergence.reduce(z, block.u, scratch, figures[4], figures[5])
    if temperature == 1.0:
        torch.sum(z.exp_(), 1, keepdim=True, out=figures[1])
        figures[2].copy_(figures[1])
    else:
        torch.sum(torch.exp(z, out=scratch), 1, keepdim=True, out=figures[1])
        torch.sum(torch.mul(z, temperature, out=scratch).exp_(), 1, keepdim=True, out=figures[2])


def _shift(logits: Tensor, temperature: float, maximum: Tensor) -> None:
    """Divide logits [r, v/tp] by the temperature and take their maximum [r, 1] off, in place."""
    if temperature != 1.0:
        logits.mul_(1.0 / temperature)
    torch.amax(logits, 1, keepdim=True, out=maximum)
    logits.sub_(maximum)

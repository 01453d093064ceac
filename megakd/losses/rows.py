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
class ChunkBuffers:
    """Reused memory: student [c, v/tp], teacher of that shape or None, scratch [r, v/tp] for a block of r rows."""

    student: Tensor
    teacher: Tensor | None
    scratch: Tensor

    def rows(self, count: int) -> ChunkBuffers:
        """The same memory for a chunk of `count` rows."""
        teacher = None if self.teacher is None else self.teacher[:count]
        return ChunkBuffers(self.student[:count], teacher, self.scratch)


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


def reduce_chunk(objective: Objective, buffers: ChunkBuffers, labels: Tensor) -> ChunkRows:
    """The losses of a chunk's rows, labels [c]; one collective over the tensor ranks.

    Buffers hold masked logits at T = 1. Afterwards the student's holds z - max, exponentiated where T is 1, and the
    teacher's what its divergence leaves there.
    """
    shard, temperature = objective.shard, objective.temperature
    student = buffers.student
    columns, held = shard.locate(labels)
    label_logit = student.gather(1, columns).mul_(held).squeeze(1)
    blocks = [_reduce_block(objective, *block) for block in _blocks(buffers)]
    maximum, log_sum, log_sum_ce, *teacher = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    statistics = torch.stack([label_logit, maximum, log_sum, log_sum_ce, *teacher], dim=1)
    gathered = shard.gather_statistics(statistics).unbind(2)  # each [tp, c]

    highest, shares, total = merge_sums(gathered[1], gathered[2])
    highest_ce, _, total_ce = merge_sums(temperature * gathered[1], gathered[3])
    ce = highest_ce - gathered[0].sum(0) + total_ce
    shift = (maximum - highest - total).unsqueeze(1)
    shift_ce = (temperature * maximum - highest_ce - total_ce).unsqueeze(1)
    if objective.divergence is None:
        return ChunkRows(torch.zeros_like(ce), ce, shift, shift_ce, None)
    highest_teacher, teacher_shares, teacher_total = merge_sums(gathered[4], gathered[5])
    kd = objective.divergence.merge(gathered[6] + gathered[2], shares, teacher_shares)
    teacher_shift = teacher[0] - highest_teacher - teacher_total
    return ChunkRows(kd, ce, shift, shift_ce, teacher_shift.unsqueeze(1))


def merge_sums(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranks' maxima and ln sum e^(x - maximum), [tp, c]: the maximum [c], the logarithms of the ranks' shares
    in the whole sum [tp, c], and ln sum e^(x - maximum) [c].

    Maxima stay apart from the logarithms, which would lose their digits beside large logits.
    """
    highest = maxima.amax(0)
    relative = maxima - highest + log_sums
    total = torch.logsumexp(relative, 0)
    return highest, relative - total, total


def write_gradient(
    objective: Objective, buffers: ChunkBuffers, labels: Tensor, token_weights: Tensor, rows: ChunkRows
) -> None:
    """Overwrite the student's buffer with the weighted gradient with respect to its logits; token_weights [c]."""
    weights = token_weights.unsqueeze(1)
    kd, ce = objective.kd_slope * weights, objective.ce_weight * weights
    start = 0
    for z, u, scratch in _blocks(buffers):
        part = slice(start, start + z.shape[0])
        start += z.shape[0]
        if objective.temperature == 1.0:
            z.mul_((kd[part] + ce[part]) * rows.student_shift[part].exp())
        else:
            _write_tempered_student(objective, z, scratch, kd[part], ce[part], rows, part)
        if u is not None and objective.divergence is not None and rows.teacher_shift is not None:
            objective.divergence.add_gradient(z, u, kd[part] * rows.teacher_shift[part].exp())
    columns, held = objective.shard.locate(labels)
    buffers.student.scatter_add_(1, columns, -ce * held)


def _write_tempered_student(
    objective: Objective, z: Tensor, scratch: Tensor, kd: Tensor, ce: Tensor, rows: ChunkRows, part: slice
) -> None:
    """z = kd * q(T) + ce * q(1)."""
    if objective.ce_weight != 0.0:
        torch.mul(z, objective.temperature, out=scratch)
        scratch.add_(rows.cross_entropy_shift[part]).exp_().mul_(ce)
    z.add_(rows.student_shift[part]).exp_().mul_(kd)
    if objective.ce_weight != 0.0:
        z.add_(scratch)


def _blocks(buffers: ChunkBuffers) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """The chunk cut into blocks of rows: student's, teacher's and scratch memory."""
    step = buffers.scratch.shape[0]
    students = torch.split(buffers.student, step)
    teachers = [None] * len(students) if buffers.teacher is None else torch.split(buffers.teacher, step)
    return [(z, u, buffers.scratch[: z.shape[0]]) for z, u in zip(students, teachers, strict=True)]


def _reduce_block(objective: Objective, z: Tensor, u: Tensor | None, scratch: Tensor) -> list[Tensor]:
    """Local figures [r]: max z, ln sum e^z, ln sum e^(T z); with a teacher also max u, ln sum e^u and divergence."""
    temperature = objective.temperature
    maximum = _shift(z, temperature)
    teacher: list[Tensor] = []
    if u is not None and objective.divergence is not None:
        teacher_maximum = _shift(u, temperature)
        local, log_sum = objective.divergence.reduce(z, u, scratch)
        teacher = [teacher_maximum, log_sum, local]
    if temperature == 1.0:
        log_sum_z = z.exp_().sum(1).log_()
        return [maximum, log_sum_z, log_sum_z, *teacher]
    log_sum_z = torch.exp(z, out=scratch).sum(1).log_()
    log_sum_ce = torch.mul(z, temperature, out=scratch).exp_().sum(1).log_()
    return [maximum, log_sum_z, log_sum_ce, *teacher]


def _shift(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature and take each row's maximum off, in place; the maxima [r]."""
    if temperature != 1.0:
        logits.mul_(1.0 / temperature)
    maximum = logits.amax(1, keepdim=True)
    logits.sub_(maximum)
    return maximum.squeeze(1)

"""One chunk of logits: reduced to a few figures per row, then overwritten with the loss's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.chunking import block_rows
from megakd.losses.divergences import Divergence
from megakd.losses.logit_form import LogitForm
from megakd.losses.products import project_
from megakd.losses.shards import VocabularyShard

# In fp32 sums of e^x and of e^x x over any vocabulary stay in range while rows' largest x is within this of 0.
_UNSHIFTED = 40.0


@dataclass(frozen=True)
class Objective:
    """What is computed per token. `divergence` is None without a teacher, and `temperature` 1.0 then.

    kd_slope: what the divergence's gradient with respect to z/T is multiplied by to be total's by z: kd_weight * T,
        or kd_weight / T without the T^2 factor.
    """

    shard: VocabularyShard
    divergence: Divergence | None
    temperature: float
    teacher_temperature: float
    kd_slope: float
    ce_weight: float
    student_form: LogitForm
    teacher_form: LogitForm

    @property
    def keeps_logits(self) -> bool:
        """Whether the gradient needs the student's logits beside q: for q at another temperature, or a softcap."""
        return (self.temperature != 1.0 and self.ce_weight != 0.0) or self.student_form.softcap is not None

    @property
    def second_round(self) -> bool:
        """Whether the divergence needs p and q to be known before its own sums."""
        return self.divergence is not None and self.divergence.evaluate is not None

    def project_student_(self, chunk: ChunkBuffers, hidden: Tensor, head: Tensor) -> None:
        """Fill the student's buffer with masked logits from hidden [c, h] and head [v/tp, h]."""
        project_(chunk.student, hidden, head)
        self.student_form.apply_(chunk.student)
        self.shard.mask_(chunk.student)

    def project_teacher_(self, chunk: ChunkBuffers, hidden: Tensor, head: Tensor) -> None:
        """Fill the teacher's buffer with masked logits from hidden [c, h_t] and head [v/tp, h_t]."""
        assert chunk.teacher is not None
        project_(chunk.teacher, hidden, head)
        self.teacher_form.apply_(chunk.teacher)
        self.shard.mask_(chunk.teacher)


@dataclass(frozen=True)
class Block:
    """Some rows of a chunk: logits z and u [r, v/tp] (u None without a teacher), scratch buffers of that shape."""

    part: slice
    z: Tensor
    u: Tensor | None
    scratch: list[Tensor]


@dataclass(frozen=True)
class ChunkBuffers:
    """Reused memory: student's and teacher's logits [c, v/tp], and scratch [k, r, v/tp] for a block of r rows."""

    student: Tensor
    teacher: Tensor | None
    scratch: Tensor

    def rows(self, count: int) -> ChunkBuffers:
        """The same memory for a chunk of `count` rows."""
        teacher = None if self.teacher is None else self.teacher[:count]
        return ChunkBuffers(self.student[:count], teacher, self.scratch)

    def blocks(self) -> list[Block]:
        """The chunk in blocks that elementwise passes treat one after the other."""
        count, step = self.student.shape[0], self.scratch.shape[1]
        parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        return [
            Block(
                p,
                self.student[p],
                None if self.teacher is None else self.teacher[p],
                list(self.scratch[:, : p.stop - p.start].unbind()),
            )
            for p in parts
        ]


@dataclass(frozen=True)
class ChunkRows:
    """Per row of a chunk: the losses [c] over the whole vocabulary, and figures [c, 1] for the gradient.

    The student's buffer holds z = x - reference with x = logits / T, or e^z, see `reduce_chunk`.
    student_shift + z is ln q; cross_entropy_shift + T z is ln q at T = 1; teacher_shift is the logarithm of what
    turns a stored e^u into p; offset is that of `Divergence`.
    """

    kd: Tensor
    ce: Tensor
    reference: Tensor
    student_shift: Tensor
    cross_entropy_shift: Tensor
    teacher_shift: Tensor | None
    offset: Tensor | None


def build_buffers(objective: Objective, rows: int, dtype: torch.dtype, device: torch.device) -> ChunkBuffers:
    """Memory for chunks of up to `rows` rows."""
    width = objective.shard.width
    student = torch.empty((rows, width), dtype=dtype, device=device)
    teacher = None if objective.divergence is None else torch.empty_like(student)
    count = 1
    if objective.second_round:
        count = 3 if objective.keeps_logits else 2
    elif objective.student_form.softcap is not None:
        count = 2
    block = block_rows(rows, width, device, dtype.itemsize)
    return ChunkBuffers(student, teacher, student.new_empty((count, block, width)))


def reduce_chunk(objective: Objective, buffers: ChunkBuffers, blocks: list[Block], labels: Tensor) -> ChunkRows:
    """The losses of a chunk's rows, labels [c]; one collective over the tensor ranks, or two.

    Buffers hold masked logits. Afterwards the student's holds z, exponentiated unless `keeps_logits`, and the
    teacher's what its divergence leaves there.
    """
    shard, temperature, divergence = objective.shard, objective.temperature, objective.divergence
    columns, held = shard.locate(labels)
    label_logit = buffers.student.gather(1, columns).mul_(held)
    figures = buffers.student.new_empty((3 if divergence is None else 6, labels.shape[0], 1))
    for block in blocks:
        _reduce_block(objective, block, list(figures[:, block.part].unbind()))
    if divergence is not None:
        figures[5].div_(figures[4 if divergence.separable else 1])
        figures[4].log_()
    figures[1:3].log_()

    gathered = shard.gather_statistics(torch.cat([label_logit, *figures.unbind()], dim=1)).unbind(2)  # each [tp, c]
    label_logits, references, log_sums, log_sums_ce, *teacher = gathered
    highest_ce, total_ce, shifts_ce = merge_sums(temperature * references, log_sums_ce)
    shifts = shifts_ce if temperature == 1.0 else merge_sums(references, log_sums)[2]
    ce = highest_ce - label_logits.sum(0) + total_ce
    mine = shard.tp_rank
    shift, shift_ce = shifts[mine].unsqueeze(1), shifts_ce[mine].unsqueeze(1)
    if divergence is None:
        return ChunkRows(torch.zeros_like(ce), ce, figures[0], shift, shift_ce, None, None)
    teacher_references, teacher_log_sums, means = teacher
    teacher_shifts = merge_sums(teacher_references, teacher_log_sums)[2]
    teacher_shift = teacher_shifts[mine].unsqueeze(1)
    if divergence.merge is not None:
        kd, offsets = divergence.merge(means, shifts, teacher_shifts, log_sums, teacher_log_sums)
        return ChunkRows(kd, ce, figures[0], shift, shift_ce, teacher_shift, offsets[mine].unsqueeze(1))
    sums = torch.empty_like(figures[:2])
    for block in blocks:
        part = block.part
        _evaluate_block(objective, block, shift[part], teacher_shift[part], list(sums[:, part].unbind()))
    sums = shard.sum_statistics(sums)
    if not objective.keeps_logits:
        shift = torch.zeros_like(shift)  # the stored e^z is q itself
    return ChunkRows(sums[0].squeeze(1), ce, figures[0], shift, shift_ce, None, -sums[1])


def merge_sums(references: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put all ranks' references and ln sum e^(x - reference), [tp, c], together: (highest, total, shifts).

    highest [c] is the largest reference, total [c] is ln sum e^(x - highest), and shifts [tp, c] added to a rank's
    x - reference give the logarithm of the softmax. References stay apart from logarithms of sums, which would lose
    their digits beside large logits.
    """
    highest = references.amax(0)
    relative = references - highest
    total = torch.logsumexp(relative + log_sums, 0)
    return highest, total, relative - total


def write_gradient(
    objective: Objective, buffers: ChunkBuffers, blocks: list[Block], labels: Tensor, weights: Tensor, rows: ChunkRows
) -> None:
    """Overwrite the student's buffer with the gradient with respect to hidden @ head^T; token weights [c]."""
    weights = weights.unsqueeze(1) * objective.student_form.scale
    kd, ce = objective.kd_slope * weights, objective.ce_weight * weights
    columns, held = objective.shard.locate(labels)
    at_label = -ce * held
    if objective.keeps_logits:
        for block in blocks:
            part = block.part
            _write_from_logits(objective, block, kd, ce, rows)
            if objective.student_form.softcap is not None:
                block.z.scatter_add_(1, columns[part], at_label[part]).mul_(block.scratch[-1])
        if objective.student_form.softcap is None:
            buffers.student.scatter_add_(1, columns, at_label)
        return
    student_factor = rows.student_shift.exp()
    teacher_factor = None if rows.teacher_shift is None else kd * rows.teacher_shift.exp()
    for block in blocks:
        _write_from_exponentials(objective, block, kd, ce, student_factor, teacher_factor, rows.offset)
    buffers.student.scatter_add_(1, columns, at_label)


def _write_from_exponentials(
    objective: Objective,
    block: Block,
    kd: Tensor,
    ce: Tensor,
    student_factor: Tensor,
    teacher_factor: Tensor | None,
    offset: Tensor | None,
) -> None:
    """z = kd * (the divergence's gradient) + ce * q from e^z, where q is the same in both."""
    part, divergence = block.part, objective.divergence
    if divergence is None or block.u is None or objective.kd_slope == 0.0:
        block.z.mul_((ce * student_factor)[part])
    elif divergence.separable and teacher_factor is not None:
        block.z.mul_(((kd + ce) * student_factor)[part]).addcmul_(block.u, teacher_factor[part], value=-1)
    elif offset is not None:
        slope = (kd * student_factor)[part]
        block.z.mul_(block.u.add_(offset[part] + objective.ce_weight / objective.kd_slope)).mul_(slope)


def _write_from_logits(objective: Objective, block: Block, kd: Tensor, ce: Tensor, rows: ChunkRows) -> None:
    """z = kd * (the divergence's gradient) + ce * q(1) from z; the softcap's slope in the last scratch."""
    part, divergence, temperature = block.part, objective.divergence, objective.temperature
    form = objective.student_form
    if form.softcap is not None:
        form.softcap_slope(block.z, temperature, temperature * rows.reference[part], block.scratch[-1])
    cross_entropy = block.scratch[0]
    torch.add(rows.cross_entropy_shift[part], block.z, alpha=temperature, out=cross_entropy).exp_().mul_(ce[part])
    if divergence is None or block.u is None or objective.kd_slope == 0.0:
        block.z.copy_(cross_entropy)
        return
    block.z.add_(rows.student_shift[part]).exp_()
    if divergence.separable and rows.teacher_shift is not None:
        block.z.mul_(kd[part]).addcmul_(block.u, (kd * rows.teacher_shift.exp())[part], value=-1)
    elif rows.offset is not None:
        block.z.mul_(block.u.add_(rows.offset[part])).mul_(kd[part])
    block.z.add_(cross_entropy)


def _reduce_block(objective: Objective, block: Block, figures: list[Tensor]) -> None:
    """Write local figures, each [r, 1]: the reference of x = z/T, sum e^(x - reference), sum e^(T (x - reference));
    with a teacher also the reference of u and the two sums of its divergence.
    """
    z, scratch, temperature, divergence = block.z, block.scratch[0], objective.temperature, objective.divergence
    in_place = not (objective.keeps_logits or objective.second_round)
    _shift(z, temperature, figures[0], max(1.0, temperature))
    if temperature != 1.0:
        torch.sum(torch.mul(z, temperature, out=scratch).exp_(), 1, keepdim=True, out=figures[2])
    if block.u is not None and divergence is not None:
        _shift(block.u, objective.teacher_temperature, figures[3], 1.0)
        divergence.reduce(z, block.u, scratch, in_place, figures[1], figures[4], figures[5])
    else:
        torch.sum(z.exp_() if in_place else torch.exp(z, out=scratch), 1, keepdim=True, out=figures[1])
    if temperature == 1.0:
        figures[2].copy_(figures[1])


def _evaluate_block(
    objective: Objective, block: Block, shift: Tensor, teacher_shift: Tensor, sums: list[Tensor]
) -> None:
    """The second round: z becomes q unless it is kept, u what the divergence leaves; writes its two sums [r, 1]."""
    assert objective.divergence is not None and objective.divergence.evaluate is not None and block.u is not None
    z, u, t, spare = block.z, block.u, block.scratch[0], block.scratch[1]
    torch.sub(u, z, out=t).add_(teacher_shift - shift)
    u.add_(teacher_shift).exp_()
    q = torch.add(z, shift, out=block.scratch[2]) if objective.keeps_logits else z.add_(shift)
    objective.divergence.evaluate(t, u, q.exp_(), spare, sums[0], sums[1])


def _shift(logits: Tensor, temperature: float, reference: Tensor, largest_factor: float) -> None:
    """Divide logits [r, v/tp] by the temperature and take a reference [r, 1] off, in place: their maximum, or 0 where
    e^(largest_factor * logits) is in range as it is (not on GPU, where to ask would wait for the device).
    """
    if temperature != 1.0:
        logits.mul_(1.0 / temperature)
    torch.amax(logits, 1, keepdim=True, out=reference)
    if not logits.is_cuda and reference.abs().max().item() * largest_factor <= _UNSHIFTED:
        reference.zero_()
    else:
        logits.sub_(reference)

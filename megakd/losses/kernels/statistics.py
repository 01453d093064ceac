"""First pass: what a rank knows of each row from its own columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.losses.kernels.elementwise import load_logits
from megakd.losses.kernels.settings import NO_DIVERGENCE, form_arguments, launch_sizes
from megakd.losses.objective import Objective
from megakd.losses.shards import SENTINEL

_LOWEST = tl.constexpr(SENTINEL)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _grow(
    total: tl.tensor, distance: tl.tensor, rate: tl.tensor, exists: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(total, kept, added): a running sum of e^(rate (x - reference)) takes in x = reference + distance.

    The reference becomes x where that is larger. One of the two factors, what the old sum is multiplied by and what x
    adds, is always 1, so that one exponential does.
    """
    power = tl.exp(-rate * tl.abs(distance))
    rises = distance > 0.0
    kept = tl.where(rises, power, 1.0)
    added = tl.where(rises, 1.0, tl.where(exists, power, 0.0))
    return total * kept + added, kept, added


@triton.jit(do_not_specialize=["rows", "first_id"])  # type: ignore[untyped-decorator, unused-ignore]
def _statistics_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    labels: tl.tensor,
    figures: tl.tensor,
    rows: tl.tensor,
    first_id: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    student_inner: tl.tensor,
    student_cap: tl.tensor,
    student_rate: tl.tensor,
    teacher_inner: tl.tensor,
    teacher_cap: tl.tensor,
    teacher_rate: tl.tensor,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row. Every lane keeps maxima and sums of its own columns, merged at the end.

    Lanes that saw no column hold the lowest reference and sums of 0, which weigh nothing beside any other.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * width
    teacher += row * width
    lanes = tl.arange(0, BLOCK)
    z_top = tl.full([BLOCK], _LOWEST, tl.float32)
    u_top = tl.full([BLOCK], _LOWEST, tl.float32)
    z_sum = tl.zeros([BLOCK], tl.float32)
    ce_sum = tl.zeros([BLOCK], tl.float32)
    u_sum = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, valid, BLOCK):
        columns = start + lanes
        exists = columns < valid
        z = load_logits(student, columns, width, student_inner, student_cap, STUDENT_CAPPED)
        # A distance of 0 leaves the reference alone, and a column that does not exist adds nothing.
        z_step = tl.where(exists, z - z_top, 0.0)
        z_before = z_sum
        z_sum, z_kept, z_added = _grow(z_sum, z_step, student_rate, exists)
        if TEMPERED:
            ce_sum, _, _ = _grow(ce_sum, z_step, 1.0, exists)
        z_top = tl.maximum(z_top, tl.where(exists, z, _LOWEST))
        if FORMULA != "none":
            u = load_logits(teacher, columns, width, teacher_inner, teacher_cap, TEACHER_CAPPED)
            u_step = tl.where(exists, u - u_top, 0.0)
            u_before = u_sum
            u_sum, u_kept, u_added = _grow(u_sum, u_step, teacher_rate, exists)
            u_top = tl.maximum(u_top, tl.where(exists, u, _LOWEST))
            # How far moving references change ln p - ln q of what is in the sum, and its value in this column.
            moved = student_rate * tl.maximum(z_step, 0.0) - teacher_rate * tl.maximum(u_step, 0.0)
            ratio = teacher_rate * tl.minimum(u_step, 0.0) - student_rate * tl.minimum(z_step, 0.0)
            if FORMULA == "forward_kl":
                weighted = u_kept * (weighted + moved * u_before) + u_added * ratio
            if FORMULA == "reverse_kl":
                weighted = z_kept * (weighted - moved * z_before) - z_added * ratio

    z_highest = tl.max(z_top, 0)
    z_gap = z_top - z_highest
    z_share = tl.exp(student_rate * z_gap)
    z_total = _at_least_one_column(tl.sum(z_share * z_sum, 0), valid)
    ce_total = z_total
    if TEMPERED:
        ce_total = _at_least_one_column(tl.sum(tl.exp(z_gap) * ce_sum, 0), valid)
    label = tl.load(labels + row) - first_id
    held = (label >= 0) & (label < valid)
    label_logit = load_logits(student, tl.where(held, label, 0), width, student_inner, student_cap, STUDENT_CAPPED)
    figures += row
    tl.store(figures, tl.where(held, label_logit, 0.0))
    tl.store(figures + rows, z_highest)
    tl.store(figures + 2 * rows, tl.log(z_total))
    tl.store(figures + 3 * rows, tl.log(ce_total))
    if FORMULA != "none":
        u_highest = tl.max(u_top, 0)
        u_gap = u_top - u_highest
        u_share = tl.exp(teacher_rate * u_gap)
        u_total = _at_least_one_column(tl.sum(u_share * u_sum, 0), valid)
        moved = teacher_rate * u_gap - student_rate * z_gap
        mean = 0.0
        if FORMULA == "forward_kl":
            mean = tl.sum(u_share * (weighted + moved * u_sum), 0) / u_total
        if FORMULA == "reverse_kl":
            mean = tl.sum(z_share * (weighted - moved * z_sum), 0) / z_total
        tl.store(figures + 4 * rows, u_highest)
        tl.store(figures + 5 * rows, tl.log(u_total))
        tl.store(figures + 6 * rows, mean)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _at_least_one_column(total: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """1 in place of the sum over a shard of padding, whose logarithm is then 0 and no quotient of it undefined."""
    return tl.where(valid > 0, total, 1.0)


def row_statistics(
    objective: Objective,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    block: int | None = None,
) -> Tensor:
    """Local figures [4, c], or [7, c] with a teacher, see `MergedRows`.

    student, teacher: hidden @ head^T, fp32 [c, v/tp], contiguous; each is read once and nothing is written to it.
    labels: int64 [c], global ids; any that is not on this rank counts as a logit of 0.
    block: columns that a program treats together, a power of 2; see `launch_sizes`.
    References are the largest logits, and the mean is of (u - reference) / T_t - (z - reference) / T under the local
    softmax of the teacher (forward_kl), of its negative under the student's (reverse_kl). A shard of padding has
    -1e30 for its largest, and 0 for logarithms and mean.
    """
    divergence, rows = objective.divergence, labels.shape[0]
    assert (divergence is None) == (teacher is None)
    figures = student.new_empty((4 if teacher is None else 7, rows))
    with torch.cuda.device_of(student):
        _statistics_kernel[(rows,)](
            student,
            student if teacher is None else teacher,
            labels,
            figures,
            rows,
            objective.shard.first_id,
            **form_arguments(objective),
            TEMPERED=objective.temperature != 1.0,
            FORMULA=NO_DIVERGENCE if divergence is None else divergence.name,
            **launch_sizes(student.shape[1], block),
        )
    return figures

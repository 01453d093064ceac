"""Second pass of the divergences from a mixture of both models: their two sums per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.losses.kernels.elementwise import load_logits, mixture_terms
from megakd.losses.kernels.settings import form_arguments, launch_sizes, mixture_arguments
from megakd.losses.objective import Objective


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _mixture_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    shifts: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    student_inner: tl.tensor,
    student_cap: tl.tensor,
    student_rate: tl.tensor,
    teacher_inner: tl.tensor,
    teacher_cap: tl.tensor,
    teacher_rate: tl.tensor,
    share: tl.tensor,
    other: tl.tensor,
    log_share: tl.tensor,
    log_other: tl.tensor,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row; sums are kept per lane until the end. The order of `shifts` is that of `KernelRows`."""
    row = tl.program_id(0).to(tl.int64)
    student += row * width
    teacher += row * width
    lanes = tl.arange(0, BLOCK)
    z_top = tl.load(shifts + row)
    z_shift = tl.load(shifts + rows + row)
    u_top = tl.load(shifts + 3 * rows + row)
    u_shift = tl.load(shifts + 4 * rows + row)
    loss_sum = tl.zeros([BLOCK], tl.float32)
    h_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, valid, BLOCK):
        columns = start + lanes
        exists = columns < valid
        z = load_logits(student, columns, width, student_inner, student_cap, STUDENT_CAPPED)
        u = load_logits(teacher, columns, width, teacher_inner, teacher_cap, TEACHER_CAPPED)
        a = student_rate * tl.where(exists, z - z_top, 0.0)
        b = teacher_rate * tl.where(exists, u - u_top, 0.0)
        p = tl.where(exists, tl.exp(b + u_shift), 0.0)
        q = tl.where(exists, tl.exp(a + z_shift), 0.0)
        t = (b - a) + (u_shift - z_shift)
        loss, h = mixture_terms(t, p, q, share, other, log_share, log_other, FORMULA)
        loss_sum += loss
        h_sum += q * h
    loss_total = tl.sum(loss_sum, 0)
    h_total = tl.sum(h_sum, 0)
    if FORMULA == "jsd":
        loss_total = share * loss_total + h_total
    tl.store(sums + row, loss_total)
    tl.store(sums + rows + row, h_total)


def mixture_sums(
    objective: Objective,
    student: Tensor,
    teacher: Tensor,
    shifts: Tensor,
    *,
    block: int | None = None,
) -> Tensor:
    """This shard's part of the loss and of sum q h, [2, c, 1], as `Divergence.evaluate` defines them.

    student, teacher: hidden @ head^T, fp32 [c, v/tp], contiguous; each is read once and nothing is written to it.
    shifts: fp32 [5, c], contiguous, see `KernelRows`.
    block: see `row_statistics`.
    """
    assert objective.divergence is not None and objective.second_round
    rows = student.shape[0]
    sums = student.new_empty((2, rows, 1))
    with torch.cuda.device_of(student):
        _mixture_kernel[(rows,)](
            student,
            teacher,
            shifts,
            sums,
            rows,
            **form_arguments(objective),
            **mixture_arguments(objective.divergence.teacher_share),
            FORMULA=objective.divergence.name,
            **launch_sizes(student.shape[1], block),
        )
    return sums

"""Last pass: the gradient with respect to the product of hidden states and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.losses.kernels.elementwise import load_logits, mixture_terms, tanh_slope
from megakd.losses.kernels.settings import NO_DIVERGENCE, form_arguments, launch_sizes, mixture_arguments
from megakd.losses.objective import Objective


@triton.jit(do_not_specialize=["rows", "first_id"])  # type: ignore[untyped-decorator, unused-ignore]
def _gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    labels: tl.tensor,
    shifts: tl.tensor,
    offsets: tl.tensor,
    gradient: tl.tensor,
    rows: tl.tensor,
    first_id: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    kd_slope: tl.tensor,
    ce_slope: tl.tensor,
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
    TEMPERED: tl.constexpr,
    WITH_CE: tl.constexpr,
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per block of columns of a row. The order of `shifts` is that of `KernelRows`."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < valid
    z = load_logits(student + row * width, columns, width, student_inner, student_cap, STUDENT_CAPPED)
    z = tl.where(exists, z - tl.load(shifts + row), 0.0)
    a = student_rate * z
    z_shift = tl.load(shifts + rows + row)
    q = tl.exp(a + z_shift)
    g = tl.zeros([BLOCK], tl.float32)
    if FORMULA != "none":
        u = load_logits(teacher + row * width, columns, width, teacher_inner, teacher_cap, TEACHER_CAPPED)
        b = teacher_rate * tl.where(exists, u - tl.load(shifts + 3 * rows + row), 0.0)
        u_shift = tl.load(shifts + 4 * rows + row)
        if FORMULA == "forward_kl":
            g = kd_slope * (q - tl.exp(b + u_shift))
        elif FORMULA == "reverse_kl":
            g = kd_slope * q * ((a - b) + tl.load(offsets + row))
        else:
            t = (b - a) + (u_shift - z_shift)
            p = tl.exp(b + u_shift)
            _, h = mixture_terms(t, p, q, share, other, log_share, log_other, FORMULA)
            g = kd_slope * q * (h + tl.load(offsets + row))
    if WITH_CE:
        if TEMPERED:
            q = tl.exp(z + tl.load(shifts + 2 * rows + row))
        label = tl.load(labels + row) - first_id
        g += ce_slope * (q - tl.where(columns == label, 1.0, 0.0))
    if STUDENT_CAPPED:
        # The product again rather than 1 - (logit / cap)^2, which cancels where the cap saturates.
        product = tl.load(student + row * width + columns, mask=columns < width, other=0.0)
        g *= tanh_slope(student_inner * product)
    g = tl.where(exists, g, 0.0)
    tl.store(gradient + row * width + columns, g.to(gradient.dtype.element_ty), mask=columns < width)


def write_gradient(
    objective: Objective,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    shifts: Tensor,
    offsets: Tensor | None,
    gradient: Tensor,
    *,
    block: int | None = None,
) -> None:
    """Write the gradient of kd_factor * kd + ce_weight * ce per token with respect to hidden @ head^T.

    student, teacher: hidden @ head^T, fp32 [c, v/tp], contiguous; each is read once from memory (the student's again
        from cache under a softcap), the teacher's not at all where the objective's kd_slope is 0. Nothing is written
        to them.
    labels: int64 [c], global ids; one that no rank holds leaves its row without the -1 of the cross-entropy.
    shifts: fp32 [3, c], or [5, c] with a teacher, contiguous; offsets: fp32 [c] or [c, 1]; see `KernelRows`.
    gradient: [c, v/tp], contiguous, of any floating dtype: all of it is written once, padded columns with 0.
    block: see `row_statistics`.
    """
    rows, width = student.shape
    divergence = objective.divergence if objective.kd_slope != 0.0 else None
    sizes = launch_sizes(width, block)
    with torch.cuda.device_of(student):
        _gradient_kernel[(rows * triton.cdiv(width, sizes["BLOCK"]),)](
            student,
            teacher if teacher is not None else student,
            labels,
            shifts,
            offsets if offsets is not None else shifts,
            gradient,
            rows,
            objective.shard.first_id,
            kd_slope=float(objective.kd_slope * objective.student_form.scale),
            ce_slope=float(objective.ce_weight * objective.student_form.scale),
            **form_arguments(objective),
            **mixture_arguments(0.5 if divergence is None else divergence.teacher_share),
            TEMPERED=objective.temperature != 1.0,
            WITH_CE=objective.ce_weight != 0.0,
            FORMULA=NO_DIVERGENCE if divergence is None else divergence.name,
            **sizes,
        )

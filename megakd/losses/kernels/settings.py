"""What a kernel is told besides its tensors."""

from __future__ import annotations

import math
from typing import Any

from megakd.losses.logit_form import LogitForm
from megakd.losses.objective import Objective

# 16 bytes per thread and access, 8 elements of each buffer per thread: enough loads in flight for the memory of an
# H100 while two buffers' running sums fit the registers. Chosen by counting, not yet measured.
_BLOCK = 2048
_ELEMENTS_PER_THREAD = 8

# A kernel's word for rows without a divergence.
NO_DIVERGENCE = "none"


def mixture_arguments(teacher_share: float) -> dict[str, Any]:
    """Arguments of the kernels that evaluate a mixture of which this is the teacher's share."""
    other = 1.0 - teacher_share
    return {
        "share": teacher_share,
        "other": other,
        "log_share": math.log(teacher_share),
        "log_other": math.log(other),
    }


def form_arguments(objective: Objective) -> dict[str, Any]:
    """Arguments of every kernel for the vocabulary, the temperatures and both logit forms.

    All but the two counts are floats, since an integer would be compiled in by its type and divisibility.
    """
    student, teacher = objective.student_form, objective.teacher_form
    return {
        "width": objective.shard.width,
        "valid": objective.shard.valid,
        "student_inner": _inner(student),
        "student_cap": float(student.softcap or 1.0),
        "student_rate": 1.0 / objective.temperature,
        "teacher_inner": _inner(teacher),
        "teacher_cap": float(teacher.softcap or 1.0),
        "teacher_rate": 1.0 / objective.teacher_temperature,
        "STUDENT_CAPPED": student.softcap is not None,
        "TEACHER_CAPPED": teacher.softcap is not None,
    }


def launch_sizes(width: int, block: int | None = None) -> dict[str, int]:
    """BLOCK and num_warps for rows of `width` columns; `block`, a power of 2, in place of the usual 2048."""
    if block is None:
        block = min(_BLOCK, 1 << max(0, width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(8, max(1, block // (32 * _ELEMENTS_PER_THREAD)))}


def _inner(form: LogitForm) -> float:
    return float(form.scale if form.softcap is None else form.scale / form.softcap)

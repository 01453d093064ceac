"""A step's line in metrics.jsonl."""

from __future__ import annotations

from typing import Any

from megakd.common.step_parts import DATA, TEACHER
from megakd.config.schema import Config
from megakd.teacher.turns import TeacherTimes
from megakd.training.step import StepResult
from megakd.training.timing import StepTimes


def step_record(
    config: Config,
    result: StepResult,
    times: StepTimes,
    *,
    step: int,
    tokens: int,
    learning_rate: float,
    flops: float,
    ranks: int,
    teacher_times: TeacherTimes | None,
) -> dict[str, Any]:
    """What is said of step `step`; docs/monitoring.md describes the keys.

    Args:
        tokens: counted so far, this step's included.
        flops: operations that a step needs.
        ranks: of the job, the teacher's own included.
        teacher_times: of a teacher on ranks of its own.
    """
    positions = config.data.global_batch_size * config.data.sequence_length
    seconds = times.step_seconds
    return {
        "step": step,
        "loss": result.loss,
        "kd_loss": result.kd_loss,
        "ce_loss": result.ce_loss,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "tokens": tokens,
        "tokens_per_second": positions / seconds,
        "tflops_per_rank": flops / seconds / ranks / 1e12,
        "teacher_share": times.part(TEACHER) / seconds,
        "data_share": times.part(DATA) / seconds,
        **(_waiting(times, teacher_times) if teacher_times is not None else {}),
        **times.figures(),
    }


def _waiting(times: StepTimes, teacher: TeacherTimes) -> dict[str, float]:
    """The shares of their time that student and teacher wait for each other.

    Of the student's ranks those of the last stage receive signals; the others wait for these.
    """
    return {
        "student_wait_share": times.most(TEACHER) / times.step_seconds,
        "teacher_wait_share": teacher.waited / max(teacher.seconds, 1e-9),
    }

"""A step's line in metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megakd.common.step_parts import DATA, TEACHER
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import Config
from megakd.training.flops import step_flops
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
    student: GPTArchitecture,
    teacher: GPTArchitecture | None,
) -> dict[str, Any]:
    """What is said of step `step`; docs/monitoring.md describes the keys.

    Args:
        tokens: counted so far, this step's included.
        teacher: where it runs in the step.
    """
    positions = config.data.global_batch_size * config.data.sequence_length
    flops = step_flops(student, teacher, config.data.sequence_length, positions)
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
        "tflops_per_rank": flops / seconds / dist.get_world_size() / 1e12,
        "teacher_share": times.part(TEACHER) / seconds,
        "data_share": times.part(DATA) / seconds,
        **times.figures(),
    }

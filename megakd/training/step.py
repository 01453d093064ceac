"""One optimizer step: the teacher's window, the student's schedule over it, one division by the sum of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megakd.common.step_parts import OPTIMIZER, TEACHER
from megakd.evaluation.evaluate import sum_over_ranks
from megakd.parallel.pipeline import GradientWindows, run_pipeline
from megakd.parallel.timed_collectives import collectives_timed
from megakd.platform import NOT_TIMED, Platform, StepClock
from megakd.teacher import Teacher
from megakd.training.build import Student
from megakd.training.objective import Batch, Objective, Signal


@dataclass(frozen=True)
class StepResult:
    """What a step reports: means over the global batch's tokens by their weights, the same on every rank.

    `tokens` counts those whose weight is not 0. Of a step with `skipped`, student and optimizer are as they were: its
    loss or a gradient is not finite.
    """

    loss: float
    kd_loss: float
    ce_loss: float
    grad_norm: float
    tokens: int
    skipped: bool


def accumulate_gradients(
    student: Student,
    teacher: Teacher | None,
    objective: Objective,
    microbatches: list[Batch],
    clock: StepClock = NOT_TIMED,
    signal_window: int | None = None,
) -> torch.Tensor:
    """Fill the student's gradient buffers for this global batch, divided once by its sum of token weights.

    Args:
        signal_window: microbatches that the teacher and then the student go through at a time; None: all.

    Returns:
        Sums [5] of total, kd, ce, tokens and their weights over the global batch, on every rank.
    """
    with clock.during(OPTIMIZER):
        student.model.zero_grad_buffer()
    size = signal_window or len(microbatches)
    windows = GradientWindows(len(microbatches) // size)
    records: list[torch.Tensor] = []
    for start in range(0, len(microbatches), size):
        window = microbatches[start : start + size]
        signals: Sequence[Signal] = [None] * size
        if teacher is not None:
            with clock.during(TEACHER):
                signals = teacher.signals(window)
        records += _run_student(student, objective, window, signals, windows)
    sums = torch.stack(records).sum(0) if records else torch.zeros(5, dtype=torch.float64)
    return sum_over_ranks(sums, student.mesh)


def _run_student(
    student: Student,
    objective: Objective,
    microbatches: list[Batch],
    signals: Sequence[Signal],
    windows: GradientWindows,
) -> list[torch.Tensor]:
    """The student's schedule over a window; the losses' records on the last stage."""
    micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
    return run_pipeline(
        student.mesh,
        student.model,
        objective.forward_step,
        zip(microbatches, signals, strict=True),
        num_microbatches=len(microbatches),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        windows=windows,
    )


def train_step(
    student: Student,
    teacher: Teacher | None,
    objective: Objective,
    optimizer: MegatronOptimizer,
    microbatches: list[Batch],
    learning_rate: float,
    platform: Platform,
    clock: StepClock = NOT_TIMED,
    signal_window: int | None = None,
) -> StepResult:
    """Run one step, in windows as `accumulate_gradients` does. Collective over all ranks.

    Args:
        clock: shares out the step's time where it is running and the student is timed by it (see timing.time_student).
    """
    with collectives_timed(clock):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with clock.during(OPTIMIZER):
            optimizer.zero_grad()
        sums = accumulate_gradients(student, teacher, objective, microbatches, clock, signal_window)
        with clock.during(OPTIMIZER):
            skipped = not _all_finite(sums, student)
            grad_norm = math.nan
            if not skipped:
                _, norm, _ = optimizer.step()
                # megatron-core computes it only where it clips
                grad_norm = float(optimizer.get_grad_norm() if norm is None else norm)
            platform.synchronize()
    total, kd, ce, tokens, weight_sum = sums.tolist()
    divisor = weight_sum or 1.0  # sums over no token are 0
    return StepResult(
        loss=total / divisor,
        kd_loss=kd / divisor,
        ce_loss=ce / divisor,
        grad_norm=grad_norm,
        tokens=int(tokens),
        skipped=skipped,
    )


def _all_finite(sums: torch.Tensor, student: Student) -> bool:
    """Whether all ranks' sums and gradients are, and the square of the norm in fp32, which megatron-core computes.

    That norm leaves out what tensor ranks hold twice: it cannot tell that one rank's copy went wrong. Every rank comes
    to the same answer.
    """
    buffers = [*student.model.buffers, *student.model.expert_parallel_buffers]
    norms = [torch.linalg.vector_norm(buffer.grad_data).double() for buffer in buffers]
    # Zero, or not a number where a sum is none.
    square = torch.stack(norms).square().sum() + (sums - sums).sum().to(norms[0].device)
    dist.all_reduce(square)
    return bool(square < torch.finfo(torch.float32).max)

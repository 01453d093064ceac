"""One optimizer step: the teacher's window, the student's schedule over it, one division by the token count."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer

from megakd.evaluation.evaluate import sum_over_ranks
from megakd.parallel.pipeline import run_pipeline
from megakd.platform import Platform
from megakd.teacher import Teacher
from megakd.training.build import Student
from megakd.training.objective import Batch, Objective, Signal


@dataclass(frozen=True)
class StepResult:
    """What a step reports: means per counted token over the global batch, the same on every rank."""

    loss: float
    kd_loss: float
    ce_loss: float
    grad_norm: float
    tokens: int
    seconds: float
    teacher_seconds: float


def accumulate_gradients(
    student: Student, teacher: Teacher | None, objective: Objective, microbatches: list[Batch], platform: Platform
) -> tuple[torch.Tensor, float]:
    """Fill the student's gradient buffers for this global batch, divided once by its token count.

    Returns:
        (sums [4] of total, kd, ce and tokens over the global batch on every rank, seconds spent in the teacher).
    """
    student.model.zero_grad_buffer()
    started, teacher_seconds = time.perf_counter(), 0.0
    signals: Sequence[Signal] = [None] * len(microbatches)
    if teacher is not None:
        signals = teacher.signals(microbatches)
        platform.synchronize()
        teacher_seconds = time.perf_counter() - started
    micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
    records = run_pipeline(
        student.mesh,
        student.model,
        objective.forward_step,
        list(zip(microbatches, signals, strict=True)),
        num_microbatches=len(microbatches),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
    )
    sums = torch.stack(records).sum(0) if records else torch.zeros(4, dtype=torch.float64)
    return sum_over_ranks(sums, student.mesh), teacher_seconds


def train_step(
    student: Student,
    teacher: Teacher | None,
    objective: Objective,
    optimizer: MegatronOptimizer,
    microbatches: list[Batch],
    learning_rate: float,
    platform: Platform,
) -> StepResult:
    """Run one step. Collective over all ranks."""
    started = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    sums, teacher_seconds = accumulate_gradients(student, teacher, objective, microbatches, platform)
    _, grad_norm, _ = optimizer.step()
    if grad_norm is None:  # megatron-core computes it only where it clips
        grad_norm = optimizer.get_grad_norm()
    platform.synchronize()
    total, kd, ce, tokens = sums.tolist()
    divisor = max(tokens, 1.0)
    return StepResult(
        loss=total / divisor,
        kd_loss=kd / divisor,
        ce_loss=ce / divisor,
        grad_norm=float(grad_norm),
        tokens=int(tokens),
        seconds=time.perf_counter() - started,
        teacher_seconds=teacher_seconds,
    )

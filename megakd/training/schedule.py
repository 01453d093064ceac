"""How long a run is and what the learning rate is at each step: functions of the step alone."""

from __future__ import annotations

import math

from megakd.config.schema import OptimizerSection, ScheduleSection


def total_steps(schedule: ScheduleSection, *, samples: int, sequence_length: int, global_batch_size: int) -> int:
    """Optimizer steps of the run; a last part of a batch, in tokens or epochs, counts as a step."""
    if schedule.train_steps is not None:
        return schedule.train_steps
    if schedule.train_tokens is not None:
        return math.ceil(schedule.train_tokens / (global_batch_size * sequence_length))
    assert schedule.train_epochs is not None
    return max(1, math.ceil(schedule.train_epochs * samples / global_batch_size))


def learning_rate(step: int, steps: int, optimizer: OptimizerSection, schedule: ScheduleSection) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    Warm-up rises linearly and reaches the peak at its last step, so that no step has rate zero. Then it is constant,
    or falls to `min_lr`, which the step after the last would have.
    """
    warmup, peak, floor = schedule.lr_warmup_steps, optimizer.lr, optimizer.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.lr_decay_style == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.lr_decay_style == "cosine" else 1 - done
    return floor + (peak - floor) * left

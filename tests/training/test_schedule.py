"""Length of a run and its learning rate, against closed forms."""

from __future__ import annotations

import math

import pytest

from megakd.config.schema import OptimizerSection, ScheduleSection
from megakd.training.schedule import learning_rate, total_steps

OPTIMIZER = OptimizerSection(lr=2e-3, min_lr=2e-4)


def rates(style: str, steps: int = 100, warmup: int = 10) -> list[float]:
    schedule = ScheduleSection.model_validate(
        {"train_steps": steps, "lr_decay_style": style, "lr_warmup_steps": warmup}
    )
    return [learning_rate(step, steps, OPTIMIZER, schedule) for step in range(steps)]


@pytest.mark.parametrize("style", ["constant", "cosine", "linear"])
def test_warm_up_is_linear_and_ends_at_the_peak(style: str) -> None:
    found = rates(style)
    assert found[:10] == pytest.approx([2e-4 * (step + 1) for step in range(10)])
    assert max(found) == found[9] == pytest.approx(2e-3)


def test_constant_stays() -> None:
    assert rates("constant")[10:] == [2e-3] * 90


@pytest.mark.parametrize(("style", "middle"), [("cosine", 1.1e-3), ("linear", 1.1e-3)])
def test_decay_passes_the_middle_and_ends_a_step_before_the_floor(style: str, middle: float) -> None:
    found = rates(style)
    assert found[10] == pytest.approx(2e-3)
    assert found[55] == pytest.approx(middle)
    assert all(a > b for a, b in zip(found[10:], found[11:], strict=False))
    left = 1 / 90 if style == "linear" else 0.5 * (1 + math.cos(math.pi * 89 / 90))
    assert found[-1] == pytest.approx(2e-4 + 1.8e-3 * left)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates("linear", steps=4, warmup=0) == pytest.approx([2e-3, 1.55e-3, 1.1e-3, 6.5e-4])


@pytest.mark.parametrize(
    ("key", "value", "steps"),
    [("train_steps", 7, 7), ("train_tokens", 1000, 8), ("train_tokens", 1024, 8), ("train_tokens", 1025, 9),
     ("train_epochs", 1, 13), ("train_epochs", 2.5, 32), ("train_epochs", 0.01, 1)],
)  # fmt: skip
def test_length_in_steps_tokens_or_epochs(key: str, value: float, steps: int) -> None:
    schedule = ScheduleSection.model_validate({key: value})
    assert total_steps(schedule, samples=101, sequence_length=16, global_batch_size=8) == steps

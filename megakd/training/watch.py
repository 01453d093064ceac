"""What a run keeps an eye on between steps: losses that jump, steps that were skipped, the best evaluation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

# Weight of the newest loss in the mean and the deviation: they follow about the last 50 steps.
_NEWEST = 0.02
_STEPS_BEFORE_REPORTS = 20


@dataclass
class LossSpikes:
    """A running mean of the losses and how far they lie from it; a loss far above is a spike."""

    steps: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    def is_spike(self, loss: float, deviations: float | None) -> bool:
        """Whether a loss lies `deviations` above the mean, which then takes it in, a spike no further than its limit.

        The first 20 losses are never spikes.
        """
        limit = math.inf
        if deviations is not None and self.steps >= _STEPS_BEFORE_REPORTS:
            # A tenth of a per cent for losses that hardly move.
            limit = self.mean + deviations * max(self.deviation, 1e-3 * abs(self.mean))
        taken = min(loss, limit)
        self.steps += 1
        weight = max(_NEWEST, 1 / self.steps)
        self.deviation += weight * (abs(taken - self.mean) - self.deviation) if self.steps > 1 else 0.0
        self.mean += weight * (taken - self.mean)
        return loss > limit


@dataclass
class Best:
    """The best evaluation so far by a metric, and how many came after it.

    Attributes:
        measure: what is compared: the metric, and on what.
        previous: the step of the best one before.
    """

    value: float | None = None
    step: int | None = None
    since: int = 0
    previous: int | None = None
    measure: str | None = None

    @property
    def steps(self) -> list[int]:
        """Steps whose checkpoint is the best: the first that there is, since the newest may not have been written."""
        return [step for step in (self.step, self.previous) if step is not None]

    def take(self, step: int, value: float, *, larger_is_better: bool) -> bool:
        """Take in an evaluation; whether it is the best. What is not a number never is."""
        first = self.value is None and not math.isnan(value)
        better = first or (self.value is not None and (value > self.value if larger_is_better else value < self.value))
        if better:
            self.value, self.step, self.since, self.previous = value, step, 0, self.step
        else:
            self.since += 1
        return better


@dataclass
class TeacherFigure:
    """The first figure of a run's teacher, which later ones must equal; see training.teacher_check.

    Attributes:
        value: nats, at step `step`.
        good_step: of the newest figure, which was equal.
        identity: of teacher and samples.
    """

    value: float | None = None
    step: int | None = None
    good_step: int | None = None
    identity: str | None = None


@dataclass
class Counters:
    """The loop's numbers that a checkpoint keeps: with them a resumed run says and does what the whole one would.

    Attributes:
        good_step: of the newest checkpoint whose own step was not skipped.
        proven_step: of the newest checkpoint after which a step went well.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    good_step: int | None = None
    proven_step: int | None = None
    spikes: LossSpikes = field(default_factory=LossSpikes)
    best: Best = field(default_factory=Best)
    teacher: TeacherFigure = field(default_factory=TeacherFigure)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Counters:
        """What `to_dict` gave."""
        parts = {
            "spikes": LossSpikes(**values["spikes"]),
            "best": Best(**values["best"]),
            "teacher": TeacherFigure(**values.get("teacher", {})),  # not there in checkpoints of before it was kept
        }
        return cls(**values | parts)

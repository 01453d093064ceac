"""The timers that megatron-core's schedules start and stop, as far as a StepClock wants to know."""

from __future__ import annotations

from megakd.common.step_parts import FORWARD
from megakd.platform import StepClock


class ScheduleTimers:
    """What a model's configuration may hold as `timers`: called with a name, it gives a timer.

    Communication is not taken from here: megatron-core times none of tensor parallelism's (see timed_collectives).

    Args:
        backward_begins_in: the part that a stage's backward pass begins in: the loss's where there is one.
    """

    def __init__(self, clock: StepClock, backward_begins_in: str) -> None:
        self._timers = {
            "forward-compute": _Timer(clock, FORWARD),
            "backward-compute": _Timer(clock, backward_begins_in),
        }
        self._none = _NoTimer()

    def __call__(self, name: str, log_level: int | None = None) -> _Timer | _NoTimer:
        """The timer of that name."""
        return self._timers.get(name, self._none)


class _Timer:
    def __init__(self, clock: StepClock, part: str) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:
        """Never with a barrier, which would change what is measured."""
        self._clock.enter(self._part)

    def stop(self, barrier: bool = False) -> None:
        self._clock.leave()


class _NoTimer:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...

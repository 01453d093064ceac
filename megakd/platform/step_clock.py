"""Where a step's time goes: a clock that always runs for exactly one part, so that the parts add up to the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from megakd.common.step_parts import OTHER, STEP_PARTS


class _Marks(Protocol):
    """Moments, and the seconds between each and the next."""

    def begin(self) -> None: ...

    def mark(self, part: str) -> None: ...

    def end(self) -> dict[str, float]: ...


class HostMarks:
    """Moments of the host's clock: where tensors are on the CPU everything happens when it is called."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = 0.0

    def begin(self) -> None:
        """Start from nothing."""
        self._seconds = {}
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What went by since the last mark was `part`."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def end(self) -> dict[str, float]:
        """Seconds by part."""
        return self._seconds


class DeviceMarks:
    """Moments of the device's current stream: events that are read when the step is over, so nothing waits before.

    A stream without work reaches an event at once, so time that the host takes counts where the device waits for it.

    Args:
        make_event: gives an event with `record()` and `elapsed_time(later)` in milliseconds.
        synchronize: waits for the device.
    """

    def __init__(self, make_event: Callable[[], Any], synchronize: Callable[[], None]) -> None:
        self._make_event, self._synchronize = make_event, synchronize
        self._events: list[Any] = []  # used again in every step
        self._parts: list[str] = []

    def begin(self) -> None:
        """Start from nothing."""
        self._parts = []
        self._record(0)

    def mark(self, part: str) -> None:
        """What went by since the last mark was `part`."""
        self._parts.append(part)
        self._record(len(self._parts))

    def end(self) -> dict[str, float]:
        """Seconds by part; waits for the device."""
        self._synchronize()
        seconds: dict[str, float] = {}
        for number, part in enumerate(self._parts):
            elapsed = self._events[number].elapsed_time(self._events[number + 1]) / 1e3
            seconds[part] = seconds.get(part, 0.0) + elapsed
        return seconds

    def _record(self, number: int) -> None:
        if number == len(self._events):
            self._events.append(self._make_event())
        self._events[number].record()


class StepClock:
    """Shares out the time between `start` and `stop` among parts (see common.step_parts); without `start` it is idle.

    Parts nest: an inner one's time is not the outer one's.

    Attributes:
        annotates: also name the parts for torch.profiler.
    """

    def __init__(self, marks: _Marks | None = None) -> None:
        self._marks: _Marks = HostMarks() if marks is None else marks
        self._stack: list[str] = []
        self._regions: list[Any] = []
        self.annotates = False

    @property
    def part(self) -> str | None:
        """The part that is running; None where the clock is not."""
        return self._stack[-1] if self._stack else None

    def start(self) -> None:
        """Start a step, in no named part."""
        self._stack, self._regions = [OTHER], []
        self._marks.begin()

    def stop(self) -> dict[str, float]:
        """End the step: seconds of every part, which add up to the step's. On a GPU, waits for it."""
        self._marks.mark(OTHER)
        self._stack = []
        seconds = self._marks.end()
        return {part: seconds.get(part, 0.0) for part in STEP_PARTS}

    def enter(self, part: str) -> None:
        """From here on, until `leave`, time is `part`'s."""
        if not self._stack:
            return
        self._marks.mark(self._stack[-1])
        self._stack.append(part)
        if self.annotates:
            region = torch.profiler.record_function(f"megakd: {part}")
            region.__enter__()
            self._regions.append(region)

    def leave(self) -> None:
        """Back to the part outside."""
        if len(self._stack) < 2:
            return
        self._marks.mark(self._stack.pop())
        if self._regions:
            self._regions.pop().__exit__(None, None, None)

    def become(self, part: str) -> None:
        """From here on the time of what was entered last is `part`'s."""
        if len(self._stack) > 1:
            self._marks.mark(self._stack[-1])
            self._stack[-1] = part

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Inside, time is `part`'s."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()


# For who wants a step and not its times. It is never started, so nothing in it changes.
NOT_TIMED = StepClock()

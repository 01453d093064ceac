"""A step's time is shared out completely, and nested parts are not counted twice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megakd.common.step_parts import COMMUNICATION, DATA, FORWARD, LOSS, OTHER, STEP_PARTS, part_seconds, seconds_key
from megakd.platform.step_clock import NOT_TIMED, DeviceMarks, HostMarks, StepClock


@dataclass
class Stream:
    """A device's timeline that moves only when told to, and the events recorded on it."""

    now: float = 0.0
    made: int = 0
    waits: list[float] = field(default_factory=list)

    def event(self) -> Any:
        self.made += 1
        return Event(self)

    def marks(self) -> DeviceMarks:
        return DeviceMarks(self.event, lambda: self.waits.append(self.now))


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self) -> None:
        self.at = self.stream.now

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def test_time_belongs_to_the_innermost_part() -> None:
    stream = Stream()
    clock = StepClock(stream.marks())
    for _ in range(2):  # a clock is used again
        clock.start()
        stream.now += 1
        with clock.during(DATA):
            stream.now += 2
        with clock.during(FORWARD):
            stream.now += 4
            with clock.during(COMMUNICATION):
                stream.now += 8
            stream.now += 16
            with clock.during(LOSS):
                stream.now += 32
                clock.become(COMMUNICATION)
                stream.now += 64
        stream.now += 128
        assert clock.stop() == pytest.approx(
            dict.fromkeys(STEP_PARTS, 0.0) | {OTHER: 129, DATA: 2, FORWARD: 20, COMMUNICATION: 72, LOSS: 32}
        )
    # Events are made once, and the device is waited for at the end of a step alone.
    assert stream.made == 11 and stream.waits == [255.0, 510.0]


def test_the_host_s_parts_add_up_to_what_went_by(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("megakd.platform.step_clock.time.perf_counter", lambda: float(next(ticks)))
    clock = StepClock(HostMarks())
    clock.start()
    with clock.during(FORWARD), clock.during(LOSS):
        pass
    found = clock.stop()
    assert (found[FORWARD], found[LOSS], found[OTHER]) == (2, 1, 2)
    assert sum(found.values()) == next(ticks) - 1


def test_an_idle_clock_does_nothing() -> None:
    with NOT_TIMED.during(FORWARD):
        assert NOT_TIMED.part is None
        NOT_TIMED.become(LOSS)
    clock = StepClock()
    clock.start()
    clock.leave()  # nothing was entered
    clock.stop()
    with clock.during(FORWARD):
        assert clock.part is None


def test_parts_are_named_for_the_profiler_where_that_is_wanted() -> None:
    clock = StepClock()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for clock.annotates in (False, True):
            clock.start()
            with clock.during(FORWARD if clock.annotates else DATA), clock.during(LOSS):
                torch.ones(2).sum()
            clock.stop()
    names = [event.key for event in profile.key_averages()]
    assert "megakd: forward" in names and "megakd: loss" in names and "megakd: data" not in names


def test_parts_in_a_record() -> None:
    record = {seconds_key(part): 0.5 for part in STEP_PARTS}
    assert part_seconds(record) == dict.fromkeys(STEP_PARTS, 0.5)
    assert part_seconds(record | {"loss_seconds": None}) is None
    assert part_seconds({}) is None

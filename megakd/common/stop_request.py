"""A wish to stop at the next chance, which a signal brings: save, and end so that the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

RESUME_STATUS = 75
"""What a run exits with that saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""

_received: list[int] = []


@dataclass(frozen=True)
class Interruption:
    """What ended a run before its time.

    Attributes:
        reason: a signal's name, or the limit that was reached.
        outlook: what there is to go on from, and what the same command does; stands after "stopped by <reason>".
    """

    reason: str
    outlook: str


def listen(numbers: Iterable[signal.Signals]) -> None:
    """Take note of these signals from now on. Call it from the main thread."""
    for number in numbers:
        signal.signal(number, _take_note)
        # System calls go on: libraries do not expect them to be interrupted.
        signal.siginterrupt(number, False)


def request_stop(number: signal.Signals) -> None:
    """Take note of a signal that came another way."""
    _received.append(number)


def stop_requested() -> str | None:
    """The name of the first signal that came, if any."""
    return signal.Signals(_received[0]).name if _received else None


def _take_note(number: int, _: FrameType | None) -> None:
    _received.append(number)

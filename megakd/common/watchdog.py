"""Ends a process that makes no progress, and tells where it stood; records of all ranks say which one stopped first."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megakd.common.durable import write_durably

T = TypeVar("T")
HANG_STATUS = 70
# The other ranks, which wait for this one, come to the end of their patience too; their records are wanted.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Hang:
    """Where a rank stood when it had made no progress for `seconds`.

    Attributes:
        progress: how many phases it had entered; of ranks that wait for each other the one behind has fewer.
        stacks: of all its threads, the most recent call first.
        waits: it waited for others that it knew to live, until they told or gave no more signs of it.
    """

    rank: int
    step: int
    phase: str
    progress: int
    seconds: float
    stacks: str
    waits: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} made no progress for {self.seconds:.0f} s in {self.phase} of step {self.step}"


def hang_file(folder: Path, rank: int) -> Path:
    """The file in which a rank tells that it hangs."""
    return folder / f"rank-{rank}.hang"


def load_hangs(folder: Path) -> list[Hang]:
    """What ranks have told, the one that is furthest behind first."""
    hangs = [Hang(**json.loads(path.read_text())) for path in folder.glob("rank-*.hang")]
    return sorted(hangs, key=lambda hang: (hang.waits, hang.step, hang.progress, hang.rank))


def describe_hang(hangs: list[Hang], world_size: int) -> str:
    """One line on what stopped: a rank that gave no sign at all, or the one that is furthest behind."""
    silent = sorted(set(range(world_size)) - {hang.rank for hang in hangs})
    others = "; ".join(str(hang) for hang in hangs[:4]) + ("; ..." if len(hangs) > 4 else "")
    if silent:
        names = ", ".join(map(str, silent[:8]))
        return f"rank {names} gave no sign of life (stopped, or its machine is); {others}"
    return others


class Watchdog:
    """Watches this process from a thread; without a timeout it only takes note of phases.

    When the timeout has passed without `enter` or `beat`, a record with the stacks of all threads goes into `folder`
    and to standard error, and GRACE_SECONDS later the process ends with HANG_STATUS.
    """

    def __init__(self, folder: Path, rank: int, timeout_seconds: float | None) -> None:
        self._folder, self._rank, self._timeout = folder, rank, timeout_seconds
        self._step, self._phase, self._progress, self._waits = 0, "starting", 0, False
        self._beat, self._began = time.monotonic(), time.time()
        self._closed = threading.Event()
        hang_file(folder, rank).unlink(missing_ok=True)
        if timeout_seconds is not None:
            threading.Thread(target=self._watch, name="megakd-watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None, *, waits: bool = False) -> None:
        """Say what comes next, in words that stand after "in".

        Args:
            waits: for others, with a `beat` as long as they are known to live.
        """
        self._phase, self._step, self._waits = phase, self._step if step is None else step, waits
        self._progress += 1
        self._beat = time.monotonic()

    def beat(self) -> None:
        """Say that the phase goes on."""
        self._beat = time.monotonic()

    def beats(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each a sign of life."""
        for item in items:
            self.beat()
            yield item

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            seconds = time.monotonic() - self._beat
            if seconds > self._timeout or (self._waits and self._others_hang()):
                self._tell(seconds)
                if not self._closed.wait(GRACE_SECONDS):
                    os._exit(HANG_STATUS)
                return

    def _others_hang(self) -> bool:
        """Whether other ranks have told that they hang, since this one began."""
        return any(path.stat().st_mtime >= self._began for path in self._folder.glob("rank-*.hang"))

    def _tell(self, seconds: float) -> None:
        hang = Hang(self._rank, self._step, self._phase, self._progress, seconds, _stacks(), self._waits)
        print(f"{hang}\n{hang.stacks}", file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(hang_file(self._folder, self._rank), json.dumps(asdict(hang)).encode())
        except OSError as error:
            print(f"rank {self._rank}: no record of this could be written ({error})", file=sys.stderr, flush=True)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()

"""What a failed job leaves in its log folder, and which of its failures came first."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megakd.common.stop_request import Interruption

AGENT_RECORD = "failures.json"
AGENT_LOG = "torchrun.log"

# Never the consequence of another rank's failure, unlike SIGABRT (a communication watchdog) or SIGTERM (torchrun).
_CRASH_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
# torchrun gives ranks 30 s to end before it kills them itself; those deaths are consequences too.
_SAME_MOMENT_SECONDS = 10.0


@dataclass(frozen=True)
class RankError:
    """An exception that ended a rank. `time` is seconds since the epoch."""

    rank: int
    time: float
    message: str
    user_error: bool
    traceback: str


@dataclass(frozen=True)
class RankExit:
    """A rank's exit as torchrun saw it; a negative `exitcode` is a signal."""

    rank: int
    time: float
    exitcode: int

    def __str__(self) -> str:
        if self.exitcode >= 0:
            return f"rank {self.rank} ended with status {self.exitcode} and no message"
        name = signal.Signals(-self.exitcode).name
        hint = "; the kernel does this when memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} was killed by {name}{hint}"


def rank_record(log_dir: Path, rank: int) -> Path:
    """The file that holds the exception which ended `rank`."""
    return log_dir / f"rank-{rank}.error"


def save_rank_error(folders: Sequence[Path], error: RankError) -> None:
    """Write a rank's record into the first folder with room, whole or not at all: the rank may be killed meanwhile."""
    _write_somewhere(folders, rank_record(Path(), error.rank).name, json.dumps(asdict(error)))


def save_interruption(folders: Sequence[Path], rank: int, interruption: Interruption) -> None:
    """Write that a rank ended before its time into the first folder with room."""
    _write_somewhere(folders, f"rank-{rank}.interrupted", json.dumps(asdict(interruption)))


def load_interruption(folders: Sequence[Path]) -> Interruption | None:
    """Why the ranks ended before their time; None where they did not."""
    found = [Interruption(**record) for record in _read_all(folders, "rank-*.interrupted")]
    return min(found, key=lambda interruption: "another rank" in interruption.reason, default=None)


def save_rank_exits(folders: Sequence[Path], name: str, exits: list[RankExit]) -> None:
    """Write what a node's torchrun saw into the first folder with room."""
    _write_somewhere(folders, name, json.dumps([asdict(e) for e in exits]))


def clear_records(log_dir: Path) -> None:
    """Remove what an earlier job left; the first node does it, before any rank can have started."""
    patterns = (
        "rank-*.error",
        "rank-*.hang",
        "rank-*.interrupted",
        "rank-*.partial-*",
        _of_all_nodes(AGENT_RECORD),
        _of_all_nodes(AGENT_LOG),
    )
    for path in [found for pattern in patterns for found in log_dir.glob(pattern)]:
        path.unlink(missing_ok=True)


def load_rank_errors(folders: Sequence[Path]) -> list[RankError]:
    """The ranks' exceptions, earliest first."""
    errors = [RankError(**record) for record in _read_all(folders, "rank-*.error")]
    return sorted(errors, key=lambda error: error.time)


def load_rank_exits(folders: Sequence[Path]) -> list[RankExit]:
    """The ranks' exits, without those that torchrun brought about later."""
    records = _read_all(folders, _of_all_nodes(AGENT_RECORD))
    exits = [RankExit(**entry) for entries in records for entry in entries]
    first = min((e.time for e in exits), default=0.0)
    return [e for e in exits if e.time <= first + _SAME_MOMENT_SECONDS]


def first_failure(errors: list[RankError], exits: list[RankExit]) -> RankError | RankExit | None:
    """The failure the others followed from; None where no rank failed.

    A rank that crashed leaves no time of its own, but the exceptions of its peers ("connection closed") are what
    follows a crash and never what causes one. So a crash comes first, then the earliest exception.
    """
    crashes = [e for e in exits if -e.exitcode in _CRASH_SIGNALS]
    user_errors = [error for error in errors if error.user_error]
    if user_errors:
        return user_errors[0]
    if crashes:
        return crashes[0]
    if errors:
        return errors[0]
    others = [e for e in exits if e.exitcode != -signal.SIGTERM]
    return next(iter(others or exits), None)


def _read_all(folders: Sequence[Path], pattern: str) -> list[Any]:
    """The records that are there: ranks that start again remove theirs while others look."""
    found = []
    for path in sorted(path for folder in folders for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):
            found.append(json.loads(path.read_text()))
    return found


def _write_somewhere(folders: Sequence[Path], name: str, text: str) -> None:
    """Write into the first folder whose disk takes it: the run's may be full, and that be what is to be told."""
    for folder in folders:
        try:
            return _write_whole(folder / name, text)
        except OSError as error:
            print(f"{folder / name} cannot be written ({error.strerror})", file=sys.stderr)


def _of_all_nodes(name: str) -> str:
    """A pattern for the files that nodes.Nodes.file names after it."""
    return name.replace(".", "*.", 1)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)

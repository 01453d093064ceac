"""What a failed job leaves in its log folder, and which of its failures came first."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
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
        if self.exitcode == 0:
            return f"rank {self.rank} ended with status 0 before its work was done"
        if self.exitcode > 0:
            return f"rank {self.rank} ended with status {self.exitcode} and no message"
        name = signal.Signals(-self.exitcode).name
        hint = "; the kernel does this when memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} was killed by {name}{hint}"


def save_rank_error(folders: Sequence[Path], error: RankError) -> None:
    """Write a rank's record into the first folder with room, whole or not at all: the rank may be killed meanwhile."""
    _write_somewhere(folders, f"rank-{error.rank}.error", json.dumps(asdict(error)))


def save_end(folders: Sequence[Path], rank: int, interruption: Interruption | None) -> None:
    """Write that a rank came to its end, or what interrupted it with all saved, into the first folder with room.

    What ends in another way leaves no such record, whatever its status is.
    """
    if interruption is None or _write_somewhere(folders, f"rank-{rank}.interrupted", json.dumps(asdict(interruption))):
        # Looked for by this node alone, so the last folder, its own, comes first: a shared one may show it late.
        _write_somewhere(folders[::-1], f"rank-{rank}.finished", "")


def unfinished_ranks(folders: Sequence[Path], ranks: Iterable[int]) -> list[int]:
    """Those of the ranks that did not write that they came to their end."""
    return [rank for rank in ranks if not any((folder / f"rank-{rank}.finished").exists() for folder in folders)]


def clear_rank_records(folders: Sequence[Path], rank: int) -> None:
    """Remove what an earlier attempt of a rank left, all but bad input.

    The launcher may not have read that yet, and no restart cures it.
    """
    endings = ["interrupted", "finished"]
    if not any(error.rank == rank and error.user_error for error in load_rank_errors(folders)):
        endings.append("error")
    for path in [folder / f"rank-{rank}.{ending}" for folder in folders for ending in endings]:
        path.unlink(missing_ok=True)


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
        "rank-*.finished",
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


def _write_somewhere(folders: Sequence[Path], name: str, text: str) -> bool:
    """Write into the first folder whose disk takes it: the run's may be full, and that be what is to be told.

    Returns whether one did.
    """
    for folder in folders:
        try:
            _write_whole(folder / name, text)
            return True
        except OSError as error:
            print(f"{folder / name} cannot be written ({error.strerror})", file=sys.stderr)
    return False


def _of_all_nodes(name: str) -> str:
    """A pattern for the files that nodes.Nodes.file names after it."""
    return name.replace(".", "*.", 1)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)

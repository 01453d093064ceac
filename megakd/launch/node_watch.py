"""Which nodes of a job have ended or fallen silent.

Every node's launcher gives signs of life in the logs' folder, which all nodes share as they share the checkpoints.
torchrun's own rendezvous would wait minutes for a node that is gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megakd.launch.nodes import Nodes

_BEAT_SECONDS = 2.0
# A shared file system may show a change late.
_SILENT_SECONDS = 30.0


@dataclass(frozen=True)
class Gone:
    """Another node that the job goes on without no longer; `is_cause` unless it may have ended for what others did."""

    line: str
    is_cause: bool


class NodeWatch:
    """Signs of life of the launchers of nodes that have met, given and looked for; nothing where a node is alone."""

    def __init__(self, log_dir: Path, nodes: Nodes) -> None:
        self.nodes = nodes
        self._log_dir = log_dir
        self._beaten = -_BEAT_SECONDS
        # When each other node last touched its file, and when that was noticed by this node's clock.
        self._seen: dict[int, tuple[int, float]] = {}

    def beat(self) -> None:
        """Say that this node's launcher lives."""
        if self.nodes.is_alone or time.monotonic() - self._beaten < _BEAT_SECONDS:
            return
        self._beaten = time.monotonic()
        with suppress(OSError):
            path = self._beat_file(self.nodes.rank)
            if path.exists():
                os.utime(path)  # needs no room on a full disk
            else:
                _write(path, socket.gethostname())

    def leave(self, reason: str | None, *, is_cause: bool = False) -> None:
        """Say that this node has ended: why, where the job is to end for it, and whether nothing else came before."""
        if not self.nodes.is_alone:
            end = {"job": self.nodes.job, "host": socket.gethostname(), "reason": reason, "is_cause": is_cause}
            with suppress(OSError):
                _write(self._end_file(self.nodes.rank), json.dumps(end))

    def gone(self) -> Gone | None:
        """Another node that ended before its time or gave no sign of life for long; one that is a cause first."""
        found = [gone for rank in self._others() if (gone := self._gone(rank)) is not None]
        return min(found, key=lambda gone: not gone.is_cause, default=None)

    def wait_for_the_others(self) -> Gone | None:
        """When this node has left: what `gone` says once each other one has ended or is silent."""
        while any(self._end(rank) is None and self._gone(rank) is None for rank in self._others()):
            time.sleep(0.2)
        return self.gone()

    def others_failed(self) -> bool:
        """When this node has left because it finished: whether another one says that it did not.

        One that is silent may have finished too: a shared file system may show its word late.
        """
        self.wait_for_the_others()
        ends = [self._end(rank) for rank in self._others()]
        return any(end is not None and end["reason"] is not None for end in ends)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.nodes.count) if rank != self.nodes.rank]

    def _end(self, rank: int) -> dict[str, object] | None:
        """What a node said when it ended; an earlier job's words do not count."""
        with suppress(OSError, ValueError):
            end = json.loads(self._end_file(rank).read_text())
            return end if end.get("job") == self.nodes.job else None
        return None

    def _gone(self, rank: int) -> Gone | None:
        now, end = time.monotonic(), self._end(rank)
        if end is not None:
            return (
                Gone(f"node {rank} ({end['host']}): {end['reason']}", bool(end["is_cause"])) if end["reason"] else None
            )
        host, told = "never seen", 0
        with suppress(OSError):
            host, told = self._beat_file(rank).read_text(), self._beat_file(rank).stat().st_mtime_ns
        if rank not in self._seen or self._seen[rank][0] != told:
            self._seen[rank] = (told, now)
        silent = now - self._seen[rank][1]
        if silent <= _SILENT_SECONDS:
            return None
        return Gone(f"node {rank} ({host}) gave no sign of life for {silent:.0f} s", is_cause=True)

    def _beat_file(self, rank: int) -> Path:
        return self._log_dir / f"node-{rank}.alive"

    def _end_file(self, rank: int) -> Path:
        return self._log_dir / f"node-{rank}.ended"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)

"""A job of several nodes: where they meet, and which of them has ended or fallen silent.

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

import psutil

from megakd.common.errors import UserError

DEFAULT_PORT = 29400
# Nodes of a queue start minutes apart.
_JOIN_SECONDS = 900
_BEAT_SECONDS = 2.0
# A shared file system may show a change late.
_SILENT_SECONDS = 30.0


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job as one of them sees it; by default it is alone.

    Attributes:
        host, port: where node 0 listens, which brings the nodes together.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    def torchrun_arguments(self) -> list[str]:
        """How this node's torchrun finds the others.

        Raises:
            UserError: the host is not known here.
        """
        if self.count == 1:
            return ["--standalone", "--local-addr=127.0.0.1"]
        is_host = str(self.rank == 0).lower()
        return [
            f"--nnodes={self.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host}:{self.port}",
            "--rdzv-id=megakd",
            f"--rdzv-conf=is_host={is_host},join_timeout={_JOIN_SECONDS}",
            f"--local-addr={self.address()}",
        ]

    def environment(self) -> dict[str, str]:
        """What gloo must be told to reach other nodes: a host's own name often stands for its loopback."""
        if self.count == 1:
            return {}
        address = self.address()
        names = [name for name, found in psutil.net_if_addrs().items() if address in {one.address for one in found}]
        return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}

    def address(self) -> str:
        """This node's address on the way to the host.

        Raises:
            UserError: the host is not known here.
        """
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            raise UserError(
                f"--rendezvous is {self.host}:{self.port}; {self.host} cannot be reached ({error.strerror}). Give node "
                "0's name or address and a free port of it."
            ) from error

    def file(self, name: str) -> str:
        """A name in the shared folder that is this node's own."""
        stem, dot, ending = name.partition(".")
        return name if self.rank == 0 else f"{stem}-node-{self.rank}{dot}{ending}"


ALONE = Nodes()


@dataclass(frozen=True)
class Gone:
    """Another node that the job goes on without no longer; `is_cause` unless it may have ended for what others did."""

    line: str
    is_cause: bool


class NodeWatch:
    """Signs of life of a job's launchers, given and looked for; nothing where a node is alone."""

    def __init__(self, log_dir: Path, nodes: Nodes) -> None:
        self.nodes = nodes
        self._log_dir = log_dir
        self._beaten = -_BEAT_SECONDS
        # When each other node last touched its file, and when that was noticed by this node's clock.
        self._seen: dict[int, tuple[int, float]] = {}
        for name in (self._beat_file(nodes.rank), self._end_file(nodes.rank)):
            name.unlink(missing_ok=True)

    @property
    def is_alone(self) -> bool:
        """Whether the job has no other node."""
        return self.nodes.count == 1

    def beat(self) -> None:
        """Say that this node's launcher lives."""
        if self.is_alone or time.monotonic() - self._beaten < _BEAT_SECONDS:
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
        if not self.is_alone:
            end = {"host": socket.gethostname(), "reason": reason, "is_cause": is_cause}
            with suppress(OSError):
                _write(self._end_file(self.nodes.rank), json.dumps(end))

    def gone(self) -> Gone | None:
        """Another node that ended before its time or gave no sign of life for long; one that is a cause first."""
        found = [gone for rank in self._others() if (gone := self._gone(rank)) is not None]
        return min(found, key=lambda gone: not gone.is_cause, default=None)

    def wait_for_the_others(self) -> Gone | None:
        """When this node has left: what `gone` says once each other one has ended or is silent."""
        while any(not self._end_file(rank).exists() and self._gone(rank) is None for rank in self._others()):
            time.sleep(0.2)
        return self.gone()

    def _others(self) -> list[int]:
        return [rank for rank in range(self.nodes.count) if rank != self.nodes.rank]

    def _gone(self, rank: int) -> Gone | None:
        now = time.monotonic()
        with suppress(OSError, ValueError):
            end = json.loads(self._end_file(rank).read_text())
            if end["reason"] is None:
                return None
            return Gone(f"node {rank} ({end['host']}): {end['reason']}", end["is_cause"])
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

"""Two machines for the launchers of a job, as far as the network is concerned."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from megakd.launch.nodes import Nodes


@dataclass(frozen=True)
class Network:
    """Where each of two nodes runs: what its command begins with, and its address."""

    kind: str
    prefixes: tuple[list[str], list[str]]
    addresses: tuple[str, str]

    def nodes(self) -> list[Nodes]:
        """The nodes of a new job, which meet at a port of node 0's that is free."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [Nodes(2, rank, self.addresses[0], port) for rank in (0, 1)]


@contextmanager
def two_machines() -> Iterator[Network]:
    """Two network namespaces that only a cable joins; where those are not permitted, this machine's loopback twice."""
    names = [f"megakd-{os.getpid()}-{rank}" for rank in (0, 1)]
    addresses = ("10.231.77.2", "10.231.77.1")  # it is not the addresses' order that counts
    try:
        try:
            _join(names, addresses)
        except (OSError, subprocess.CalledProcessError):
            yield Network("loopback: network namespaces need root and ip", ([], []), ("127.0.0.1", "127.0.0.1"))
        else:
            prefixes = (["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]])
            yield Network("two network namespaces", prefixes, addresses)
    finally:
        for name in names if shutil.which("ip") else ():
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def _join(names: list[str], addresses: tuple[str, str]) -> None:
    for name in names:
        _ip("netns", "add", name)
    _ip("-n", names[0], "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", names[1])
    for rank, (name, address) in enumerate(zip(names, addresses, strict=True)):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{rank}")
        _ip("-n", name, "link", "set", f"cable{rank}", "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

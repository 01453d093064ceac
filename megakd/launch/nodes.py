"""A job of several nodes as one of them sees it: how torchrun, gloo and NCCL reach the others."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

from megakd.common.errors import UserError

DEFAULT_PORT = 29400
RENDEZVOUS = "megakd"  # torchrun's name for the one in rendezvous.py
# After the launchers have met, what is left to torchrun's processes is to import torch.
_JOIN_SECONDS = 300


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job as one of them sees it; by default it is alone.

    Attributes:
        host, port: where node 0 listens, which brings the nodes together.
        address: this node's, as the others reach it; known once they have met.
        job: what tells this job from earlier ones in the same folder or on the same port, likewise.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    address: str = "127.0.0.1"
    job: str = "megakd"

    @property
    def is_alone(self) -> bool:
        """Whether the job has no other node."""
        return self.count == 1

    def ranks(self, nproc_per_node: int) -> range:
        """This node's ranks, where every node has so many."""
        return range(self.rank * nproc_per_node, (self.rank + 1) * nproc_per_node)

    def torchrun_arguments(self) -> list[str]:
        """How this node's torchrun finds the others."""
        if self.is_alone:
            return ["--standalone", "--local-addr=127.0.0.1"]
        is_host = str(self.rank == 0).lower()
        return [
            f"--nnodes={self.count}",
            f"--rdzv-backend={RENDEZVOUS}",
            f"--rdzv-endpoint={self.host}:{self.port}",
            f"--rdzv-id={self.job}",
            f"--rdzv-conf=is_host={is_host},join_timeout={_JOIN_SECONDS}",
            f"--local-addr={self.address}",
        ]

    def interface(self) -> str | None:
        """The network interface that has this node's address; None where the node is alone or it is not known."""
        if self.is_alone:
            return None
        found = psutil.net_if_addrs().items()
        return next((name for name, all_of in found if self.address in {one.address for one in all_of}), None)

    def file(self, name: str) -> str:
        """A name in the shared folder that is this node's own."""
        stem, dot, ending = name.partition(".")
        return name if self.rank == 0 else f"{stem}-node-{self.rank}{dot}{ending}"


ALONE = Nodes()


def check_host(host: str, port: int) -> None:
    """Look the rendezvous's name up.

    Raises:
        UserError: nobody knows it.
    """
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"--rendezvous is {host}:{port}; {host} cannot be reached ({error.strerror}). Give node 0's name or "
            "address and a free port of it."
        ) from error

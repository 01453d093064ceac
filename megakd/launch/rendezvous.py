"""torchrun's rendezvous for several nodes, in which a node's number decides which ranks it has.

torch's own gives the lowest ranks to the node whose address is the first in the alphabet: rank 0, which tells how the
run goes, would be anywhere, and so would ranks that are meant for nodes of another kind.
"""

from __future__ import annotations

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from megakd.launch.nodes import RENDEZVOUS


def register(node_rank: int) -> None:
    """Let torchrun know `--rdzv-backend=megakd`: c10d, on the node of this number."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        backend, store = create_backend(parameters)
        return OrderedRendezvous(create_handler(store, backend, parameters), node_rank, parameters.local_addr)

    rendezvous_handler_registry.register(RENDEZVOUS, create)


class OrderedRendezvous(RendezvousHandler):
    """Another handler's rendezvous between nodes that have a number each, from 0 on.

    Args:
        address: this node's, as the others reach it.
    """

    def __init__(self, handler: RendezvousHandler, node_rank: int, address: str | None) -> None:
        self._handler, self._node_rank, self._address = handler, node_rank, address

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes; node 0 has rank 0, on which the ranks' store is opened."""
        found = self._handler.next_rendezvous()
        ordered = PrefixStore("ordered", found.store)
        store_info = RendezvousStoreInfo.build(self._node_rank, ordered, local_addr=self._address)
        return RendezvousInfo(found.store, self._node_rank, found.world_size, store_info)

    def get_backend(self) -> str:
        """Its name."""
        return RENDEZVOUS

    def is_closed(self) -> bool:
        """As the other handler says."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """As the other handler does."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """As the other handler says."""
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        """As the other handler says."""
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        """As the other handler does."""
        return self._handler.shutdown()

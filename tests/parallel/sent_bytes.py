"""Bytes that a rank hands to its process groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = (
    "allgather", "broadcast", "allreduce", "all_gather_single", "reduce_scatter_single", "allreduce_coalesced",
    "all_gather_single_coalesced", "reduce_scatter_single_coalesced",
)  # fmt: skip


@contextmanager
def count_sent_bytes() -> Iterator[dict[str, float]]:
    """Bytes that this rank sends inside: of collectives as a ring would, of messages, and of those to another world."""
    import torch
    import torch.distributed as dist

    sent = {"collectives": 0.0, "messages": 0.0, "between_worlds": 0.0}

    def ring(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [t for argument in args for t in (argument if isinstance(argument, list) else [argument])]
            sizes = [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]
            # Of a gather or scatter the larger tensor is the whole; several that go together are each whole.
            whole = sum(sizes) if name == "allreduce_coalesced" else max(sizes)
            if name == "allgather":
                whole *= group.size()  # the whole is a list of lists, and was not looked at
            sent["collectives"] += whole * (group.size() - 1) / group.size() * (2 if "allreduce" in name else 1)
            return original(group, *args, **kwargs)

        return call

    def message(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, tensors: list[Any], *args: Any, **kwargs: Any) -> Any:
            sent[kind] += sum(tensor.nbytes for tensor in tensors)
            return original(group, tensors, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _NAMES:
            patch.setattr(dist.ProcessGroup, name, ring(name, getattr(dist.ProcessGroup, name)))
        patch.setattr(dist.ProcessGroup, "send", message("messages", dist.ProcessGroup.send))
        # What joins two worlds is a backend as such.
        patch.setattr(dist.ProcessGroupGloo, "send", message("between_worlds", dist.ProcessGroupGloo.send))
        yield sent

"""Time in collectives, told apart from the computation that they interrupt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megakd.common.step_parts import COMMUNICATION, TEACHER
from megakd.platform import StepClock

# What torch.distributed's functions call on a group, under the names of the versions that setup.py allows. Everything
# else on a group only asks it something.
_STARTS = (
    "_allgather_base", "_end_coalescing", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced",
    "all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce",
    "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced",
    "scatter", "send",
)  # fmt: skip


@contextmanager
def collectives_timed(clock: StepClock) -> Iterator[None]:
    """Inside, starting a collective and waiting for one is the clock's `communication`, except in the teacher.

    The one place where all of megatron-core's collectives pass is the two classes below: it binds some of
    torch.distributed's functions when it is imported, and groups of C++ objects take no attribute of their own.
    """
    if clock.part is None:
        yield
        return
    places: list[tuple[type, str]] = [(dist.Work, "wait")]
    places += [(dist.ProcessGroup, name) for name in _STARTS if name in vars(dist.ProcessGroup)]
    originals = [vars(owner)[name] for owner, name in places]
    for owner, name in places:
        setattr(owner, name, _timed(getattr(owner, name), clock))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _timed(call: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*arguments: Any, **settings: Any) -> Any:
        if clock.part == TEACHER:
            return call(*arguments, **settings)
        clock.enter(COMMUNICATION)
        try:
            return call(*arguments, **settings)
        finally:
            clock.leave()

    return timed

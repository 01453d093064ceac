"""The sides of a job: the ranks that train and, where the teacher has ranks of its own, those.

Each side is a torch.distributed world of its own, since megatron-core has collectives over the world. What joins them
is one more process group over all ranks, and the launcher's store.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megakd.platform.device import Platform


@dataclass(frozen=True)
class Joint:
    """What ranks of both sides share.

    Attributes:
        students: ranks of the student's side, which are the job's first; the teacher's are those behind.
        size: ranks of the job.
        group: joins all ranks, in the job's order. A backend as such, since torch.distributed's own groups lie within
            a world: it has `send` and `recv` of lists of tensors.
        store: keys and values that every rank sees, by a connection that nothing else waits on.
    """

    rank: int
    students: int
    size: int
    group: Any
    store: dist.Store

    @property
    def is_teacher(self) -> bool:
        """Whether this rank is on the teacher's side."""
        return self.rank >= self.students

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the first of its side."""
        return self.rank in (0, self.students)


def join_sides(
    platform: Platform, store: dist.Store, *, rank: int, size: int, teacher_ranks: int, timeout: timedelta
) -> Joint:
    """Make this rank's side its world and join it to the other. On every rank; torch.distributed is not initialised.

    Args:
        store: that all ranks have.
        rank, size: of the job.
        teacher_ranks: the last ones, which are the teacher's side.
        timeout: of all communication.
    """
    students = size - teacher_ranks
    side, first, count = ("student", 0, students) if rank < students else ("teacher", students, teacher_ranks)
    dist.init_process_group(
        platform.backend,
        store=dist.PrefixStore(side, store),
        rank=rank - first,
        world_size=count,
        timeout=timeout,
    )
    between = dist.PrefixStore("joint", store)
    if platform.is_cuda:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group: Any = dist.ProcessGroupNCCL(between, rank, size, options)
    else:
        group = dist.ProcessGroupGloo(between, rank, size, timeout)
    own: dist.Store = store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
    return Joint(rank, students, size, group, dist.PrefixStore("turns", own))

"""ModelMesh: the process groups of one model, as megatron-core's ProcessGroupCollection.

Nothing here touches megatron-core's global parallel state: teacher and student each have a mesh, on the same ranks or
on others, and every group is passed explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


class GroupPool:
    """Process groups by their ranks, each made once. All ranks of the world must ask for the same sequence.

    `timeout` is after how long their communication gives up; by default it is the backend's, for NCCL 10 minutes,
    whatever the world's is.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of these global ranks, in this order."""
        key = tuple(int(rank) for rank in ranks)
        if key not in self._groups:
            self._groups[key] = dist.new_group(list(key), timeout=self._timeout)
        return self._groups[key]


@dataclass(frozen=True)
class ModelMesh:
    """One model's ranks as a grid [pp, dp, cp, tp], tensor ranks closest, and this rank's groups in it."""

    groups: ProcessGroupCollection = field(repr=False)
    ranks: tuple[int, ...]
    tp_size: int
    cp_size: int
    dp_size: int
    pp_size: int

    @property
    def tp_rank(self) -> int:
        """This rank's number among the tensor-parallel ranks."""
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        """This rank's number among the data-parallel ranks."""
        return self.groups.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.pp_size - 1)

    def describe(self) -> str:
        """The layout in one phrase."""
        return f"TP {self.tp_size} x PP {self.pp_size} x DP {self.dp_size}" + (
            f" x CP {self.cp_size}" if self.cp_size > 1 else ""
        )


def build_model_mesh(
    pool: GroupPool,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    ranks: Iterable[int] | None = None,
) -> ModelMesh:
    """Lay a model over `ranks` (default: the whole world); data parallelism takes what TP, PP and CP leave.

    Collective over the world: every rank calls it with the same arguments.

    Raises:
        ValueError: the number of ranks is not a multiple of TP x PP x CP.
    """
    members = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
    tp, pp, cp = tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size
    dp, rest = divmod(len(members), tp * pp * cp)
    if rest or not dp:
        raise ValueError(f"{len(members)} ranks do not divide into TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp}")
    grid = np.array(members).reshape(pp, dp, cp, tp)
    axes = {"pp": 0, "dp": 1, "cp": 2, "tp": 3}
    found: dict[str, dist.ProcessGroup] = {}
    me = dist.get_rank()

    def join(name: str, rows: Iterable[Sequence[int]]) -> None:
        for row in rows:
            group = pool.group(row)
            if me in row:
                found[name] = group

    def along(*names: str) -> Iterable[list[int]]:
        kept = sorted(axes[name] for name in names)
        moved = np.moveaxis(grid, kept, range(4 - len(kept), 4))
        return moved.reshape(-1, int(np.prod([grid.shape[axis] for axis in kept]))).tolist()

    for name, over in {
        "tp": ["tp"], "cp": ["cp"], "pp": ["pp"], "dp": ["dp"], "dp_cp": ["cp", "dp"], "tp_cp": ["tp", "cp"],
        "mp": ["tp", "pp"], "tp_dp_cp": ["tp", "cp", "dp"], "intra_dist_opt": ["tp", "cp", "dp", "pp"],
    }.items():  # fmt: skip
        join(name, along(*over))
    join("ep", [[rank] for rank in members])
    columns = grid.reshape(pp, -1).T
    join("embd", [sorted({int(column[0]), int(column[-1])}, key=list(column).index) for column in columns])
    join("pos_embd", [[int(column[0])] for column in columns])
    return ModelMesh(_collection(found), members, tp, cp, dp, pp)


def _collection(found: dict[str, dist.ProcessGroup]) -> ProcessGroupCollection:
    """Fill the collection; without experts the expert groups are the dense ones."""
    groups = ProcessGroupCollection()
    # Middle stages are in no embedding group, and megatron-core asks for the attribute all the same.
    groups.embd = found.get("embd")
    groups.pos_embd = found.get("pos_embd")
    for name, group in found.items():
        setattr(groups, name, group)
    if "tp" in found:
        groups.expt_tp, groups.tp_ep, groups.tp_ep_pp = found["tp"], found["tp"], found["mp"]
        groups.expt_dp = groups.intra_expt_dp = found["dp"]
        groups.intra_dp_cp, groups.inter_dist_opt = found["dp_cp"], None
    return groups

"""Where the parts of a model lie: layers on stages, ranks on nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelLayout:
    """One model's share of the ranks, as `parallel.mesh` lays it: a grid [pp, dp, tp], tensor ranks closest.

    Attributes:
        stage_layers: transformer layers of each pipeline stage.
        first_rank: the job's rank that is the model's first.
    """

    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    stage_layers: tuple[int, ...]
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        """The job's ranks that hold the model."""
        return range(self.first_rank, self.first_rank + self.tp * self.pp * self.dp)

    @property
    def sequence_shards(self) -> int:
        """Ranks that norms, residuals and stage boundaries are cut over."""
        return self.tp if self.sequence_parallel else 1

    def tensor_group(self, ranks_per_node: int) -> list[int]:
        """Ranks of a tensor-parallel group, the first of those that lie on the most nodes."""
        if ranks_per_node % self.tp == 0 and self.first_rank % self.tp == 0:
            return list(self.ranks[: self.tp])  # none lies across nodes

        def nodes(first: int) -> int:
            return (first + self.tp - 1) // ranks_per_node - first // ranks_per_node

        first = max(self.ranks[:: self.tp], key=nodes)
        return list(range(first, first + self.tp))

    def data_groups(self, stage: int) -> list[list[int]]:
        """The groups of ranks of a stage that hold the same parameters."""
        first = self.first_rank + stage * self.dp * self.tp
        return [[first + replica * self.tp + t for replica in range(self.dp)] for t in range(self.tp)]

    def boundaries(self, stage: int) -> list[list[int]]:
        """The pairs of ranks that pass activations from `stage` to the next."""
        each = self.dp * self.tp
        first = self.first_rank + stage * each
        return [[first + place, first + each + place] for place in range(each)]

    def ends(self) -> list[int]:
        """The ranks of a pipeline that hold a tied embedding: first and last stage."""
        return [self.first_rank, self.first_rank + (self.pp - 1) * self.dp * self.tp]


def split_layers(num_layers: int, stages: int, first: int | None, last: int | None) -> tuple[int, ...]:
    """Layers per pipeline stage, as megatron-core spreads them: the ends as told, the others alike.

    Raises:
        ValueError: they do not divide.
    """
    if stages == 1:
        return (num_layers,)
    told = {0: first, stages - 1: last}
    given = {stage: count for stage, count in told.items() if count is not None}
    left, sharing = num_layers - sum(given.values()), stages - len(given)
    each, rest = divmod(left, sharing) if sharing else (0, left)
    if rest or (sharing and each < 1):
        raise ValueError(f"{num_layers} layers do not divide over {stages} stages with {given} at the ends")
    return tuple(given.get(stage, each) for stage in range(stages))

"""Where the parts of a model lie: layers on stages, ranks on nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelLayout:
    """One model's share of the ranks, as `parallel.mesh` lays it: a grid [pp, dp, tp], tensor ranks closest.

    Attributes:
        stage_layers: transformer layers of each pipeline stage.
    """

    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    stage_layers: tuple[int, ...]

    @property
    def sequence_shards(self) -> int:
        """Ranks that norms, residuals and stage boundaries are cut over."""
        return self.tp if self.sequence_parallel else 1

    def tensor_group(self) -> list[int]:
        """Ranks of the first tensor-parallel group; the others lie alike where TP divides a node's ranks."""
        return list(range(self.tp))

    def data_groups(self, stage: int) -> list[list[int]]:
        """The groups of ranks of a stage that hold the same parameters."""
        first = stage * self.dp * self.tp
        return [[first + replica * self.tp + t for replica in range(self.dp)] for t in range(self.tp)]

    def boundaries(self, stage: int) -> list[list[int]]:
        """The pairs of ranks that pass activations from `stage` to the next."""
        each = self.dp * self.tp
        return [[stage * each + place, (stage + 1) * each + place] for place in range(each)]

    def ends(self) -> list[int]:
        """The ranks of a pipeline that hold a tied embedding: first and last stage."""
        return [0, (self.pp - 1) * self.dp * self.tp]


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

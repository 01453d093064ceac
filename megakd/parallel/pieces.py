"""How a window's hidden states are cut where two models of other layouts meet: which rank has what, and who needs it.

Both models go through the same samples. Sample i of a window is row i % mbs of microbatch i // (dp * mbs) on data rank
(i // mbs) % dp, for each model with its own mbs and dp. Every token's state travels once: a student's tensor ranks each
receive a stretch of the sequence, and put it together among themselves where they need all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Spread:
    """How a model's last stage holds the hidden states of a window of samples.

    Attributes:
        ranks: global ranks of the last stage, by data rank and tensor rank.
        sequence_shards: tensor ranks that a sequence is cut over; 1 where each has all of it.
    """

    ranks: tuple[tuple[int, ...], ...]
    micro_batch_size: int
    sequence_shards: int

    def microbatch(self, sample: int) -> int:
        """The microbatch that a sample of the window is in."""
        return sample // (len(self.ranks) * self.micro_batch_size)

    def data_rank(self, sample: int) -> int:
        """The data rank that goes through a sample."""
        return sample // self.micro_batch_size % len(self.ranks)


@dataclass(frozen=True)
class Place:
    """Rows [start, start + length) of column `column` in a rank's hidden states of a microbatch."""

    rank: int
    microbatch: int
    start: int
    column: int


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's positions, where it is and where it goes."""

    length: int
    source: Place
    target: Place


@dataclass(frozen=True)
class Window:
    """Samples that both models go through before either goes on.

    Attributes:
        samples: over all data ranks.
        length: a sample's positions.
        one_row: a microbatch's samples follow one another in one sequence, as packed ones do.
    """

    samples: int
    length: int
    one_row: bool


def last_stage_spread(
    ranks: Sequence[int], *, tp_size: int, pp_size: int, micro_batch_size: int, is_cut: bool
) -> Spread:
    """How the last stage of a model on `ranks` holds hidden states.

    Args:
        ranks: the model's, in the order of parallel.mesh: tensor ranks closest, then data ranks, then stages.
        is_cut: each tensor rank has a stretch of the sequence.
    """
    stage = tuple(ranks)[-(len(ranks) // pp_size) :]
    rows = tuple(stage[start : start + tp_size] for start in range(0, len(stage), tp_size))
    return Spread(rows, micro_batch_size, tp_size if is_cut else 1)


@lru_cache(maxsize=8)
def plan_pieces(source: Spread, target: Spread, window: Window) -> tuple[Piece, ...]:
    """All pieces of a window, the same on every rank."""
    samples, length, one_row = window.samples, window.length, window.one_row
    pieces = []
    for sample in range(samples):
        cuts = {0, length}
        for spread in (source, target):
            cuts.update(_cuts(spread, sample, length, one_row))
        edges = sorted(cuts)
        for begin, end in zip(edges, edges[1:], strict=False):
            target_shard, to = _place(target, sample, begin, length, one_row)
            goal = target.ranks[target.data_rank(sample)][target_shard]
            source_shard, start = _place(source, sample, begin, length, one_row)
            holders = source.ranks[source.data_rank(sample)]
            if source.sequence_shards > 1:
                origin = holders[source_shard]
            else:  # all of them have it: the goal itself, or each for some
                origin = goal if goal in holders else holders[(sample + target_shard) % len(holders)]
            columns = [0 if one_row else sample % spread.micro_batch_size for spread in (source, target)]
            pieces.append(
                Piece(
                    end - begin,
                    Place(origin, source.microbatch(sample), start, columns[0]),
                    Place(goal, target.microbatch(sample), to, columns[1]),
                )
            )
    return tuple(pieces)


def _cuts(spread: Spread, sample: int, length: int, one_row: bool) -> Iterator[int]:
    """Positions of a sample at which the sequence goes on on another tensor rank."""
    offset = sample % spread.micro_batch_size * length if one_row else 0
    whole = length * (spread.micro_batch_size if one_row else 1)
    stretch = whole // spread.sequence_shards
    return (cut - offset for cut in range(0, whole, stretch) if 0 < cut - offset < length)


def _place(spread: Spread, sample: int, position: int, length: int, one_row: bool) -> tuple[int, int]:
    """The shard that a position is in, and its row there."""
    offset = sample % spread.micro_batch_size * length if one_row else 0
    stretch = length * (spread.micro_batch_size if one_row else 1) // spread.sequence_shards
    return divmod(offset + position, stretch)

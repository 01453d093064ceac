"""The bridge that carries a teacher's hidden states from its mesh to the student's, whatever the layout of either.

Both models go through the same samples. Sample i of a window is row i % mbs of microbatch i // (dp * mbs) on data rank
(i // mbs) % dp, for each model with its own mbs and dp. Every token's state travels once: a student's tensor ranks each
receive a stretch of the sequence, and put it together among themselves where they need all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.parallel.mesh import ModelMesh


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


def last_stage_spread(mesh: ModelMesh, micro_batch_size: int, *, is_cut: bool) -> Spread:
    """How `mesh`'s last stage holds hidden states; `is_cut` for each tensor rank a stretch of the sequence."""
    stage = mesh.ranks[-mesh.dp_size * mesh.tp_size :]
    rows = tuple(stage[start : start + mesh.tp_size] for start in range(0, len(stage), mesh.tp_size))
    return Spread(rows, micro_batch_size, mesh.tp_size if is_cut else 1)


@lru_cache(maxsize=8)
def plan_pieces(source: Spread, target: Spread, samples: int, length: int, one_row: bool) -> tuple[Piece, ...]:
    """All pieces of a window of `samples` samples of `length` positions, the same on every rank.

    Args:
        one_row: a microbatch's samples follow one another in one sequence, as packed ones do.
    """
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
                origin = goal if goal in holders else holders[target_shard % len(holders)]
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


class Bridge:
    """Moves windows of hidden states from one spread to another. Collective over `group`.

    Args:
        group: holds the ranks of both.
        width: hidden size.
    """

    def __init__(
        self,
        source: Spread,
        target: Spread,
        group: dist.ProcessGroup,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._source, self._target, self._group = source, target, group
        self._width, self._dtype, self._device = width, dtype, device

    def carry(self, hidden: Sequence[Tensor], *, samples: int, length: int, one_row: bool) -> list[Tensor]:
        """Give the target's ranks their stretches.

        Args:
            hidden: this rank's microbatches of the source, [s(/shards), b, h] each; none on ranks that hold no part.
            samples: of the window, over all data ranks; `length` is a sample's positions.

        Returns:
            This rank's microbatches of the target, [s/shards, b, h] each; none on ranks that get no part.
        """
        me = dist.get_rank()
        leaving: dict[int, list[Piece]] = defaultdict(list)
        coming: dict[int, list[Piece]] = defaultdict(list)
        for piece in plan_pieces(self._source, self._target, samples, length, one_row):
            if piece.source.rank == me:
                leaving[piece.target.rank].append(piece)
            if piece.target.rank == me:
                coming[piece.source.rank].append(piece)
        target = self._empty(samples, length, one_row) if coming else []
        for piece in coming.pop(me, []):
            _slice(target, piece.target, piece.length).copy_(_slice(hidden, piece.source, piece.length))
        leaving.pop(me, None)
        sent = {
            rank: torch.cat([_slice(hidden, piece.source, piece.length) for piece in pieces])
            for rank, pieces in leaving.items()
        }
        received = {rank: self._buffer(pieces) for rank, pieces in coming.items()}
        operations = [dist.P2POp(dist.isend, tensor, rank, self._group) for rank, tensor in sorted(sent.items())]
        operations += [dist.P2POp(dist.irecv, tensor, rank, self._group) for rank, tensor in sorted(received.items())]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for rank, pieces in coming.items():
            parts = received[rank].split([piece.length for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                _slice(target, piece.target, piece.length).copy_(part)
        return target

    def _buffer(self, pieces: list[Piece]) -> Tensor:
        return torch.empty(sum(p.length for p in pieces), self._width, dtype=self._dtype, device=self._device)

    def _empty(self, samples: int, length: int, one_row: bool) -> list[Tensor]:
        spread = self._target
        count = samples // (len(spread.ranks) * spread.micro_batch_size)
        rows, columns = (length * spread.micro_batch_size, 1) if one_row else (length, spread.micro_batch_size)
        shape = (rows // spread.sequence_shards, columns, self._width)
        return [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(count)]


def _slice(hidden: Sequence[Tensor], place: Place, length: int) -> Tensor:
    """The rows [length, h] of a place."""
    return hidden[place.microbatch][place.start : place.start + length, place.column]

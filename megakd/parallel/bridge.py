"""The bridge that carries a teacher's hidden states from its mesh to the student's, whatever the layout of either."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.parallel.pieces import Piece, Place, Spread, Window, plan_pieces


class Bridge:
    """One rank's part in moving windows of hidden states from one spread to another.

    Args:
        rank: this one's number, as the spreads count.
        width: hidden size.
    """

    def __init__(
        self, source: Spread, target: Spread, rank: int, *, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._source, self._target, self._rank = source, target, rank
        self._width, self._dtype, self._device = width, dtype, device

    def pack(self, hidden: Sequence[Tensor], window: Window) -> dict[int, Tensor]:
        """What other ranks need of this rank's states, by rank, in the order of their numbers.

        Args:
            hidden: this rank's microbatches of the source, [s(/shards), b, h] each; none on ranks that hold no part.
        """
        return {
            rank: torch.cat([_slice(hidden, piece.source, piece.length) for piece in pieces])
            for rank, pieces in sorted(self._leaving(window).items())
        }

    def buffers(self, window: Window) -> dict[int, Tensor]:
        """Room for what other ranks have packed for this one, by rank, in the order of their numbers."""
        return {
            rank: self._buffer(pieces) for rank, pieces in sorted(self._coming(window).items()) if rank != self._rank
        }

    def unpack(self, received: Mapping[int, Tensor], window: Window, hidden: Sequence[Tensor] = ()) -> list[Tensor]:
        """This rank's microbatches of the target, [s/shards, b, h] each; none on ranks that get no part.

        Args:
            received: `buffers` that are filled.
            hidden: as `pack` takes it, for what stays on this rank.
        """
        coming = self._coming(window)
        target = self._empty(window) if coming else []
        for rank, pieces in coming.items():
            if rank == self._rank:
                parts: Sequence[Tensor] = [_slice(hidden, piece.source, piece.length) for piece in pieces]
            else:
                parts = received[rank].split([piece.length for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                _slice(target, piece.target, piece.length).copy_(part)
        return target

    def carry(self, hidden: Sequence[Tensor], window: Window, group: dist.ProcessGroup) -> list[Tensor]:
        """`pack`, move and `unpack`. Collective over `group`, which holds the ranks of both spreads."""
        sent, received = self.pack(hidden, window), self.buffers(window)
        operations = [dist.P2POp(dist.isend, tensor, rank, group) for rank, tensor in sent.items()]
        operations += [dist.P2POp(dist.irecv, tensor, rank, group) for rank, tensor in received.items()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return self.unpack(received, window, hidden)

    def _leaving(self, window: Window) -> dict[int, list[Piece]]:
        """This rank's pieces that others need, by rank."""
        leaving: dict[int, list[Piece]] = defaultdict(list)
        for piece in plan_pieces(self._source, self._target, window):
            if piece.source.rank == self._rank != piece.target.rank:
                leaving[piece.target.rank].append(piece)
        return leaving

    def _coming(self, window: Window) -> dict[int, list[Piece]]:
        """The pieces that this rank needs, by the rank that has them."""
        coming: dict[int, list[Piece]] = defaultdict(list)
        for piece in plan_pieces(self._source, self._target, window):
            if piece.target.rank == self._rank:
                coming[piece.source.rank].append(piece)
        return coming

    def _buffer(self, pieces: list[Piece]) -> Tensor:
        return torch.empty(sum(p.length for p in pieces), self._width, dtype=self._dtype, device=self._device)

    def _empty(self, window: Window) -> list[Tensor]:
        spread = self._target
        count = window.samples // (len(spread.ranks) * spread.micro_batch_size)
        rows, columns = window.length, spread.micro_batch_size
        if window.one_row:
            rows, columns = rows * columns, 1
        shape = (rows // spread.sequence_shards, columns, self._width)
        return [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(count)]


def _slice(hidden: Sequence[Tensor], place: Place, length: int) -> Tensor:
    """The rows [length, h] of a place."""
    return hidden[place.microbatch][place.start : place.start + length, place.column]

"""Packing short examples into full sequences: first-fit decreasing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Which examples stand in each pack, in order: those of pack i are members[starts[i]:starts[i + 1]]."""

    members: Ids
    starts: Ids

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.members[self.starts[index] : self.starts[index + 1]]


def first_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> Packs:
    """Put each example, from the longest to the shortest, into the first pack with room for it.

    Examples of one length fill the packs from the first on, each with as many as it has room for; so one pass over
    the packs places a whole length. Johnson, "Near-optimal bin packing algorithms", 1973.

    Args:
        lengths: [n] of each example, from 1 to `capacity`.
    """
    assert len(lengths) and 1 <= lengths.min() and lengths.max() <= capacity, (lengths, capacity)
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    shortest = int(values[0])
    pack_of = np.empty(len(lengths), dtype=np.int64)
    # Packs with room left, by number, and that room.
    open_packs, room = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    packs = placed = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        taken = room // length
        upto = np.minimum(np.cumsum(taken), count)
        taken = np.diff(upto, prepend=0)
        left = count - int(upto[-1]) if len(upto) else count
        new = -(-left // (capacity // length))
        new_taken = np.full(new, capacity // length, dtype=np.int64)
        if new:
            new_taken[-1] = left - (new - 1) * (capacity // length)
        open_packs = np.concatenate([open_packs, np.arange(packs, packs + new)])
        taken = np.concatenate([taken, new_taken])
        room = np.concatenate([room, np.full(new, capacity, dtype=np.int64)]) - taken * length
        pack_of[by_length[placed : placed + count]] = np.repeat(open_packs, taken)
        packs, placed = packs + new, placed + count
        usable = room >= shortest
        open_packs, room = open_packs[usable], room[usable]
    order = by_length[np.argsort(pack_of[by_length], kind="stable")]
    starts = np.zeros(packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=packs), out=starts[1:])
    return Packs(order, starts)

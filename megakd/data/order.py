"""The order in which training visits samples: fixed by seed and epoch alone, any place of it computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megakd.common.mixing import mix64

# Up to here a permutation is held as a whole and is a uniform draw; above, each place of it is computed.
HELD_SIZE = 1 << 22
_ROUNDS = 8

Ids = NDArray[np.int64]


class Permutations:
    """For each epoch a permutation of 0..size that (seed, stream, epoch) alone fixes.

    Large ones are Feistel ciphers whose values beyond `size` are enciphered again until they fall inside: a bijection
    that needs no memory.
    """

    def __init__(self, size: int, seed: int, stream: tuple[int, ...] = (), held_size: int = HELD_SIZE) -> None:
        assert size > 0, size
        self.size = size
        self._seed = seed
        self._stream = stream
        self._is_held = size <= held_size
        self._held: dict[int, Ids] = {}

    def at(self, epoch: int, places: Ids) -> Ids:
        """What stands at these places of an epoch's permutation."""
        if not self._is_held:
            return self._enciphered(epoch, places)
        if epoch not in self._held:
            # numpy fixes a bit generator's raw output for good; Generator.permutation may change between versions.
            raw = np.random.Philox(self._entropy(epoch)).random_raw(self.size)
            # A batch that crosses into this epoch still reads the one before.
            self._held = {e: ids for e, ids in self._held.items() if e == epoch - 1}
            self._held[epoch] = np.argsort(raw, kind="stable").astype(np.int64, copy=False)
        return self._held[epoch][places]

    def _entropy(self, epoch: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self._seed, epoch], spawn_key=self._stream)

    def _enciphered(self, epoch: int, places: Ids) -> Ids:
        keys = self._entropy(epoch).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
        half = np.uint64(max(1, (int(self.size - 1).bit_length() + 1) // 2))
        values = _feistel(places.astype(np.uint64), half, keys)
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = _feistel(values[outside], half, keys)
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the integers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    joined: NDArray[np.uint64] = (left << half) | right
    return joined


@dataclass(frozen=True)
class Share:
    """Samples of one data set and how many of them an epoch of the blend has."""

    ids: range
    count: int

    @property
    def epochs(self) -> float:
        """How often an epoch of the blend goes through them."""
        return self.count / len(self.ids)


class SampleOrder:
    """An endless sequence of sample ids, in epochs of `num_samples`, that (seed, epoch) alone fixes.

    An epoch is a permutation of all shares' samples together. A share that is not a whole number of passes over its
    samples goes on where it was in the epoch before, in an order of its own that is new on every pass.
    """

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        assert shares and all(share.count > 0 for share in shares), shares
        self.shares = tuple(shares)
        self.seed = seed
        self._ends = np.cumsum([share.count for share in shares])
        self.num_samples = int(self._ends[-1])
        self._places = Permutations(self.num_samples, seed)
        self._passes = [
            None if share.count % len(share.ids) == 0 else Permutations(len(share.ids), seed, (number,))
            for number, share in enumerate(shares)
        ]

    def sample_ids(self, start: int, count: int) -> Ids:
        """The samples at positions start..start + count, [count]; position p is in epoch p // num_samples."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._of_epoch(epoch, offsets[here])
        return ids

    def _of_epoch(self, epoch: int, offsets: Ids) -> Ids:
        slots = self._places.at(epoch, offsets)
        owners = np.searchsorted(self._ends, slots, side="right")
        ids = np.empty(len(slots), dtype=np.int64)
        for number in np.unique(owners).tolist():
            share, own = self.shares[number], owners == number
            first = self._ends[number] - share.count
            passes, places = np.divmod(epoch * share.count + slots[own] - first, len(share.ids))
            ids[own] = share.ids.start + self._in_pass(number, passes, places)
        return ids

    def _in_pass(self, number: int, passes: Ids, places: Ids) -> Ids:
        permutations = self._passes[number]
        if permutations is None:
            return places
        found = np.empty(len(places), dtype=np.int64)
        for index in np.unique(passes).tolist():
            here = passes == index
            found[here] = permutations.at(index, places[here])
        return found


def shares_by_weight(ids: Sequence[range], weights: Sequence[float]) -> list[Share]:
    """Shares in proportion to weights, in an epoch as long as all samples together; each has one sample at least."""
    total, whole = sum(map(len, ids)), sum(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [max(1, int(count)) for count in exact]
    # What rounding down leaves goes to the largest remainders.
    by_remainder = sorted(range(len(ids)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return [Share(own, count) for own, count in zip(ids, counts, strict=True)]


def shares_by_epochs(ids: Sequence[range], epochs: Sequence[float]) -> list[Share]:
    """Shares that go through their samples this often in an epoch of the blend."""
    return [Share(own, max(1, round(len(own) * often))) for own, often in zip(ids, epochs, strict=True)]

"""Records of draws from each row's distribution: the distinct ids, how often each was drawn, and the entropy.

How often, in unary: N bits per row. The ids as Elias and Fano wrote them down, over all rows of the record: low bits as
they are, the steps of the high ones in unary, from 0 in each row. The entropy in half precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.cache.bits import find_bits, pack, packed_bytes, set_bits, unpack
from megakd.cache.codec import MAX_VOCAB_SIZE, Fields, Rows, check_entropy, check_ids, check_whole

MAX_SAMPLES = 65535


class SampledCodec:
    """N draws per row from a vocabulary; raises ValueError for settings that cannot be."""

    mode = "sampled"
    bytes_per_row = None

    def __init__(self, vocab_size: int, num_samples: int) -> None:
        check_whole("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
        check_whole("num_samples", num_samples, 1, MAX_SAMPLES)
        self.vocab_size, self.num_samples = vocab_size, num_samples

    @property
    def most_bytes_per_row(self) -> float:
        """Over many rows all of whose draws differ; rows in which a few ids have most of the mass take much less."""
        draws = self.num_samples
        ids = min(draws * low + (self.vocab_size >> low) for low in range(self.vocab_size.bit_length() + 1))
        return (ids + draws + draws) / 8 + np.dtype("<f2").itemsize

    def settings(self) -> dict[str, Any]:
        """See Codec."""
        return {"mode": self.mode, "vocab_size": self.vocab_size, "num_samples": self.num_samples}

    def encode(self, ids: NDArray[np.int64], entropy: NDArray[np.floating[Any]]) -> bytes:
        """A record of n rows.

        Args:
            ids: [n, N] of the draws, ascending in a row, with repeats.
            entropy: [n], nats.

        Raises:
            ValueError: an entropy is below 0 or not finite, or ids are out of order or beyond the vocabulary.
        """
        check_ids(ids, ids[:, 1:] >= ids[:, :-1], self.vocab_size)
        if ids.size and ids[:, 0].min() < 0:
            raise ValueError(f"id {int(ids.min())} is below 0")
        stored = np.asarray(entropy, dtype=np.float64).astype("<f2")
        check_entropy(stored)
        ends = np.ones(ids.shape, dtype=np.bool_)  # the last draw of each id
        ends[:, :-1] = ids[:, 1:] != ids[:, :-1]
        distinct = ids[ends]
        per_row = ends.sum(axis=1)
        low = self._low_bits(ids, len(distinct))
        high = distinct >> low
        before = np.zeros_like(high)
        before[1:] = high[:-1]
        before[np.cumsum(per_row) - per_row] = 0
        places = np.cumsum(high - before) + np.arange(len(high))
        parts = [
            np.array([low], dtype=np.uint8),
            np.packbits(ends.reshape(-1), bitorder="little"),
            stored,
            pack(distinct & ((1 << low) - 1), low),
            set_bits(places, int(places[-1]) + 1 if len(places) else 0),
        ]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, record: bytes | memoryview, rows: int) -> Rows:
        """See Codec.decode."""
        fields, draws = Fields(record), rows * self.num_samples
        low = int(fields.take(1)[0])
        if low > self.vocab_size.bit_length():
            raise ValueError(f"{low} low bits for a vocabulary of {self.vocab_size}")
        ends = find_bits(fields.take(packed_bytes(draws, 1)))
        entropy = fields.array("<f2", rows).astype(np.float32)
        check_entropy(entropy)
        row = ends // self.num_samples
        per_row = np.bincount(row, minlength=rows)
        if len(per_row) != rows or not np.isin(np.arange(1, rows + 1) * self.num_samples - 1, ends).all():
            raise ValueError("a row has another number of draws")
        counts = np.diff(ends, prepend=-1)
        low_parts = unpack(fields.take(packed_bytes(len(ends), low)), len(ends), low)
        high_bytes = fields.take(fields.left)
        places = find_bits(high_bytes)
        if len(places) != len(ends) or len(high_bytes) != (packed_bytes(int(places[-1]) + 1, 1) if len(places) else 0):
            raise ValueError(f"{len(places)} ids for {len(ends)} counts")
        steps = places - np.arange(len(places))
        starts = np.cumsum(per_row) - per_row
        bases = np.concatenate([[0], steps])[starts]
        distinct = ((steps - bases[row]) << low) | low_parts
        check_ids(distinct, (np.diff(distinct) > 0) | (np.diff(row) > 0), self.vocab_size)
        shape = (rows, int(per_row.max()) if rows else 1)
        ids = np.full(shape, -1, dtype=np.int64)
        probabilities = np.zeros(shape, dtype=np.float32)
        slots = row, np.arange(len(row)) - starts[row]
        ids[slots] = distinct
        probabilities[slots] = counts.astype(np.float32) / np.float32(self.num_samples)
        return Rows(ids, probabilities, entropy)

    def _low_bits(self, ids: NDArray[np.int64], distinct: int) -> int:
        """How many low bits take the fewest bits with what is left of each row's largest id in unary."""
        largest = ids[:, -1]
        widths = range(self.vocab_size.bit_length() + 1)
        return min(widths, key=lambda low: (distinct * low + int((largest >> low).sum()), low))

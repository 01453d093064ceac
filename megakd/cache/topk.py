"""Records of the k largest probabilities of each row and of the mass that they have together.

Ids in ascending order as Elias and Fano wrote them down: the low bits as they are, the high ones in unary.

Probabilities as shares of the row's largest, r = p / p_max. In 8 or 16 bits r = (1 - c / 2^bits)^6, whose steps of ln r
are 6 / (2^bits - c) wide: fine where there is mass, coarse where there is none. The error of a row's kept part, as KL,
is then about (6 / 2^bits)^2 / 24 * sum p_i (p_max / p_i)^(1/3), where the sum is at most k^(1/3): 7.3e-5 nats for k 32
and 8 bits. The mass of all k ids is kept by itself, as its log-odds, and is not touched by that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.cache.bits import find_bits, pack, packed_bytes, set_bits, unpack
from megakd.cache.codec import MAX_VOCAB_SIZE, Fields, Rows, check_ids, check_whole

BITS = (8, 16, 32)
_POWER = 6


class TopKCodec:
    """k ids of a vocabulary per row; raises ValueError for settings that cannot be.

    Attributes:
        low_bits: of each id that are written as they are, such that a row has as few bits as can be.
    """

    mode = "topk"

    def __init__(self, vocab_size: int, k: int, log_probability_bits: int = 8) -> None:
        check_whole("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
        check_whole("k", k, 1, vocab_size)
        if log_probability_bits not in BITS:
            raise ValueError(f"log_probability_bits is {log_probability_bits!r}; it must be 8, 16 or 32")
        self.vocab_size, self.k, self.log_probability_bits = vocab_size, k, log_probability_bits
        widths = range(vocab_size.bit_length())
        self.low_bits = min(widths, key=lambda low: (k * low + self._high_bits(low), low))
        self._share = {8: "<u1", 16: "<u2", 32: "<f4"}[log_probability_bits]
        self._odds = "<f2" if log_probability_bits == 8 else "<f4"
        if log_probability_bits != 32:
            levels = 1 << log_probability_bits
            self._levels: NDArray[np.float32] = ((1 - np.arange(levels) / levels) ** _POWER).astype(np.float32)

    @property
    def bytes_per_row(self) -> float:
        """Over many rows; a record's streams of bits end at whole bytes."""
        ids = 0 if self.k == self.vocab_size else self.k * self.low_bits + self._high_bits(self.low_bits)
        return ids / 8 + self.k * self.log_probability_bits / 8 + np.dtype(self._odds).itemsize

    def settings(self) -> dict[str, Any]:
        """See Codec."""
        names = ("mode", "vocab_size", "k", "log_probability_bits")
        return {name: getattr(self, name) for name in names}

    def encode(
        self, ids: NDArray[np.int64], log_probabilities: NDArray[np.floating[Any]], log_odds: NDArray[np.floating[Any]]
    ) -> bytes:
        """A record of n rows.

        Args:
            ids: [n, k], distinct in a row, in any order.
            log_probabilities: [n, k], natural; only their differences within a row count.
            log_odds: [n], ln(P / (1 - P)) of the mass P of a row's ids; infinite where nothing is left.

        Raises:
            ValueError: a figure is not a number, or ids are not distinct ones of the vocabulary.
        """
        order = np.argsort(ids, axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        if ids.size and ids[:, 0].min() < 0:
            raise ValueError(f"id {int(ids.min())} is below 0")
        check_ids(ids, ids[:, 1:] > ids[:, :-1], self.vocab_size)
        if np.isnan(log_odds).any() or np.isnan(log_probabilities).any():
            raise ValueError("a probability is not a number")
        values = np.take_along_axis(np.asarray(log_probabilities, dtype=np.float64), order, axis=1)
        with np.errstate(invalid="ignore"):
            shares = np.exp(values - values.max(axis=1, keepdims=True)) if values.size else values
        if np.isnan(shares).any():
            raise ValueError("a row has no finite log-probability")
        odds = np.clip(log_odds, -np.finfo(self._odds).max, None).astype(np.float64)
        with np.errstate(over="ignore"):
            parts = [*self._encode_ids(ids), self._encode_shares(shares), odds.astype(self._odds)]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, record: bytes | memoryview, rows: int) -> Rows:
        """See Codec.decode."""
        fields = Fields(record)
        ids = self._decode_ids(fields, rows)
        shares = self._decode_shares(fields, rows)
        log_odds = fields.array(self._odds, rows).astype(np.float64)
        fields.end()
        if np.isnan(log_odds).any():
            raise ValueError("log-odds are not a number")
        total = shares.sum(axis=1, dtype=np.float64)
        if not np.all(total > 0):
            raise ValueError("a row has no probability")
        with np.errstate(over="ignore"):
            mass = 1 / (1 + np.exp(-log_odds))
        return Rows(ids, shares * (mass / total).astype(np.float32)[:, None])

    def _high_bits(self, low: int) -> int:
        """Bits of a row's high parts in unary: one per id, and one per step of them."""
        return self.k + ((self.vocab_size - 1) >> low)

    def _encode_ids(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        if self.k == self.vocab_size:
            return []
        width, low = self._high_bits(self.low_bits), self.low_bits
        rows = np.arange(len(ids), dtype=np.int64)[:, None]
        places = rows * width + (ids >> low) + np.arange(self.k)
        return [set_bits(places.reshape(-1), len(ids) * width), pack((ids & ((1 << low) - 1)).reshape(-1), low)]

    def _decode_ids(self, fields: Fields, rows: int) -> NDArray[np.int64]:
        k, low = self.k, self.low_bits
        if k == self.vocab_size:
            return np.broadcast_to(np.arange(k, dtype=np.int64), (rows, k))
        width = self._high_bits(low)
        places = find_bits(fields.take(packed_bytes(rows, width)))
        if len(places) != rows * k:
            raise ValueError(f"{len(places)} ids for {rows} rows of {k}")
        ids = places.reshape(rows, k)
        ids -= np.arange(rows, dtype=np.int64)[:, None] * width
        if rows and (ids[:, 0].min() < 0 or ids[:, -1].max() >= width):
            raise ValueError("a row has too many ids")
        ids -= np.arange(k)
        ids <<= low
        ids |= unpack(fields.take(packed_bytes(rows * k, low)), rows * k, low).reshape(rows, k)
        check_ids(ids, ids[:, 1:] > ids[:, :-1], self.vocab_size)
        return ids

    def _encode_shares(self, shares: NDArray[np.float64]) -> NDArray[Any]:
        if self.log_probability_bits == 32:
            return shares.astype(self._share)
        levels = 1 << self.log_probability_bits
        codes = np.rint(levels * (1 - shares ** (1 / _POWER)))
        return np.minimum(codes, levels - 1).astype(self._share)

    def _decode_shares(self, fields: Fields, rows: int) -> NDArray[np.float32]:
        stored = fields.array(self._share, rows * self.k).reshape(rows, self.k)
        if self.log_probability_bits != 32:
            shares: NDArray[np.float32] = self._levels[stored]
            return shares
        if not np.all((stored >= 0) & (stored <= 1)):
            raise ValueError("a share is not between 0 and 1")
        return stored.astype(np.float32)

"""Records of the k largest probabilities of each row, of the mass that they have together, and of draws from the rest.

Ids in ascending order as Elias and Fano wrote them down: the low bits as they are, the high ones in unary.

Probabilities as shares of the row's largest, r = p / p_max. In 8 or 16 bits r = (1 - c / 2^bits)^6, whose steps of ln r
are 6 / (2^bits - c) wide: fine where there is mass, coarse where there is none. The error of a row's kept part, as KL,
is then about (6 / 2^bits)^2 / 24 * sum p_i (p_max / p_i)^(1/3), where the sum is at most k^(1/3): 7.3e-5 nats for k 32
and 8 bits. The mass of all k ids is kept by itself, as its log-odds, and is not touched by that.

Draws share the mass that is left evenly, so that the row stands for the whole distribution without bias; the entropy of
the whole is kept with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.cache.bits import find_bits, pack, packed_bytes, set_bits, unpack
from megakd.cache.codec import MAX_VOCAB_SIZE, Fields, Rows, check_entropy, check_ids, check_whole

BITS = (8, 16, 32)
MAX_TAIL_SAMPLES = 64
_POWER = 6


class TopKCodec:
    """k ids of a vocabulary per row; raises ValueError for settings that cannot be.

    Attributes:
        low_bits: of each id that are written as they are, such that a row has as few bits as can be.
    """

    mode = "topk"

    def __init__(self, vocab_size: int, k: int, log_probability_bits: int = 8, tail_samples: int = 0) -> None:
        check_whole("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
        check_whole("k", k, 1, vocab_size)
        check_whole("tail_samples", tail_samples, 0, MAX_TAIL_SAMPLES if k < vocab_size else 0)
        if log_probability_bits not in BITS:
            raise ValueError(f"log_probability_bits is {log_probability_bits!r}; it must be 8, 16 or 32")
        self.vocab_size, self.k, self.log_probability_bits = vocab_size, k, log_probability_bits
        self.tail_samples = tail_samples
        self._id_bits = (vocab_size - 1).bit_length()
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
        tail = self.tail_samples * self._id_bits / 8 + 2 if self.tail_samples else 0
        return ids / 8 + self.k * self.log_probability_bits / 8 + np.dtype(self._odds).itemsize + tail

    def settings(self) -> dict[str, Any]:
        """See Codec."""
        names = ("mode", "vocab_size", "k", "log_probability_bits", "tail_samples")
        return {name: getattr(self, name) for name in names}

    def encode(
        self,
        ids: NDArray[np.int64],
        log_probabilities: NDArray[np.floating[Any]],
        log_odds: NDArray[np.floating[Any]],
        tail_ids: NDArray[np.int64] | None = None,
        entropy: NDArray[np.floating[Any]] | None = None,
    ) -> bytes:
        """A record of n rows.

        Args:
            ids: [n, k], distinct in a row, in any order.
            log_probabilities: [n, k], natural; only their differences within a row count.
            log_odds: [n], ln(P / (1 - P)) of the mass P of a row's ids; infinite where nothing is left.
            tail_ids: [n, tail_samples], draws from what is left, ascending in a row, with repeats; any if nothing is.
            entropy: [n], nats, of the whole distribution; not kept without tail_samples.

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
            odds = odds.astype(self._odds)
            parts = [*self._encode_ids(ids), self._encode_shares(shares), odds]
        if self.tail_samples:
            assert tail_ids is not None and entropy is not None
            tail_ids = np.where(np.isinf(odds)[:, None], 0, tail_ids)
            check_tail(tail_ids, ids, odds, self.vocab_size)
            stored = np.asarray(entropy, dtype=np.float64).astype("<f2")
            check_entropy(stored)
            parts += [pack(tail_ids.reshape(-1), self._id_bits), stored]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, record: bytes | memoryview, rows: int) -> Rows:
        """See Codec.decode."""
        fields = Fields(record)
        ids = self._decode_ids(fields, rows)
        shares = self._decode_shares(fields, rows)
        log_odds = fields.array(self._odds, rows).astype(np.float64)
        if self.tail_samples:
            shape = rows, self.tail_samples
            tail = unpack(
                fields.take(packed_bytes(rows * self.tail_samples, self._id_bits)), math.prod(shape), self._id_bits
            )
            tail_ids, entropy = tail.reshape(shape), fields.array("<f2", rows).astype(np.float32)
        fields.end()
        if np.isnan(log_odds).any():
            raise ValueError("log-odds are not a number")
        total = shares.sum(axis=1, dtype=np.float64)
        if not np.all(total > 0):
            raise ValueError("a row has no probability")
        with np.errstate(over="ignore"):
            mass = 1 / (1 + np.exp(-log_odds))
            left = 1 / (1 + np.exp(log_odds))
        kept = shares * (mass / total).astype(np.float32)[:, None]
        if not self.tail_samples:
            return Rows(ids, kept)
        check_tail(tail_ids, ids, log_odds, self.vocab_size)
        check_entropy(entropy)
        tail_ids, counts = _count(tail_ids)
        counts *= (left / self.tail_samples).astype(np.float32)[:, None]
        tail_ids[counts == 0] = -1
        return Rows(np.concatenate([ids, tail_ids], axis=1), np.concatenate([kept, counts], axis=1), entropy)

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


def check_tail(
    tail_ids: NDArray[np.int64], ids: NDArray[np.int64], log_odds: NDArray[np.floating[Any]], vocab_size: int
) -> None:
    """Raise ValueError for draws out of order, beyond the vocabulary, or of ids that are kept where draws count."""
    check_ids(tail_ids, tail_ids[:, 1:] >= tail_ids[:, :-1], vocab_size)
    kept = (tail_ids[:, :, None] == ids[:, None, :]).any(axis=(1, 2))
    if np.any(kept & np.isfinite(log_odds)):
        raise ValueError("a draw from what is left is an id that is kept")


def _count(draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """How often each draw's id is in its row, at the first such draw; 0 at the others."""
    same = draws[:, :, None] == draws[:, None, :]
    first = same.argmax(axis=2) == np.arange(draws.shape[1])
    return draws, np.where(first, same.sum(axis=2), 0).astype(np.float32)

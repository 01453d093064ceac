"""Records of the largest probabilities, against their bytes read one by one and the figures that went in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.cache.codec import build_codec
from megakd.cache.topk import TopKCodec

SIZES = [(1, 1), (2, 1), (2, 2), (7, 3), (300, 5), (4096, 32), (128256, 32), (1 << 32, 4), (50, 50), (1000, 999)]


def make_rows(vocab_size: int, k: int, count: int, spread: float = 3.0, seed: int = 0) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    if vocab_size <= 4096:
        ids = np.stack([random.permutation(vocab_size)[:k] for _ in range(count)])
    else:
        ids = np.stack([random.choice(vocab_size, 4 * k, replace=True)[: 4 * k] for _ in range(count)])
        ids = np.stack([random.permutation(np.unique(row))[:k] for row in ids])
    log_p = -random.exponential(spread, (count, k))
    return ids.astype(np.int64).reshape(count, k), log_p, random.normal(0, 3, count)


def expected(ids: Any, log_p: Any, log_odds: Any) -> tuple[Any, Any]:
    order = np.argsort(ids, axis=1)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p *= (1 / (1 + np.exp(-log_odds)) / p.sum(1))[:, None]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(p, order, 1)


@pytest.mark.parametrize(("vocab_size", "k"), SIZES)
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_rows_come_back(vocab_size: int, k: int, bits: int) -> None:
    codec = TopKCodec(vocab_size, k, bits)
    ids, log_p, log_odds = make_rows(vocab_size, k, 20)
    record = codec.encode(ids, log_p, log_odds)
    rows = codec.decode(record, 20)
    wanted_ids, wanted = expected(ids, log_p, log_odds)
    assert rows.ids.dtype == np.int64 and np.array_equal(rows.ids, wanted_ids)
    assert rows.probabilities.dtype == np.float32 and rows.entropy is None
    kept = rows.probabilities / rows.probabilities.sum(1, keepdims=True)
    shares, wanted_shares = (x / x.max(1, keepdims=True) for x in (kept, wanted))
    if bits == 32:
        np.testing.assert_allclose(rows.probabilities, wanted, rtol=3e-6)
    else:
        # Half a step of c, and the largest exact.
        codes = 2**bits * (1 - wanted_shares ** (1 / 6))
        found = 2**bits * (1 - shares.astype(np.float64) ** (1 / 6))
        assert np.abs(found - np.minimum(codes, 2**bits - 1)).max() <= 0.5 + 2**bits * 1e-6
    mass = wanted.sum(1)
    tolerance = 3e-6 if bits != 8 else 0.01
    np.testing.assert_allclose(rows.probabilities.sum(1) / (1 - mass + 1e-9), mass / (1 - mass + 1e-9), rtol=tolerance)
    assert abs(len(record) / 20 - codec.bytes_per_row) <= 2 / 20
    assert build_codec(codec.settings()).decode(record, 20).ids.tolist() == rows.ids.tolist()


def naive_ids(record: bytes, codec: TopKCodec, rows: int) -> list[list[int]]:
    """The ids by the format's description: unary high parts of all rows, then low parts of all."""
    width = codec.k + ((codec.vocab_size - 1) >> codec.low_bits)
    bits = "".join(f"{byte:08b}"[::-1] for byte in record)
    start = 8 * ((rows * width + 7) // 8)
    found = []
    for row in range(rows):
        high, ids = 0, []
        for bit in bits[row * width : (row + 1) * width]:
            if bit == "0":
                high += 1
                continue
            place = start + (row * codec.k + len(ids)) * codec.low_bits
            low = int(bits[place : place + codec.low_bits][::-1] or "0", 2)
            ids.append(high << codec.low_bits | low)
        found.append(ids)
    return found


@given(st.integers(2, 2000), st.data())
def test_the_ids_are_where_the_format_says(vocab_size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(vocab_size - 1, 40)))
    rows = data.draw(st.integers(0, 5))
    ids, log_p, log_odds = make_rows(vocab_size, k, max(rows, 1), seed=data.draw(st.integers(0, 99)))
    codec = TopKCodec(vocab_size, k)
    record = codec.encode(ids[:rows], log_p[:rows], log_odds[:rows])
    assert naive_ids(record, codec, rows) == np.sort(ids[:rows], axis=1).tolist()


def test_size_and_error_at_a_large_vocabulary() -> None:
    codec = TopKCodec(128256, 32)
    assert codec.bytes_per_row == 89.75
    for spread in (0.1, 0.5, 1.0, 3.0, 10.0):
        ids, log_p, log_odds = make_rows(128256, 32, 500, spread, seed=1)
        wanted_ids, wanted = expected(ids, log_p, log_odds)
        rows = codec.decode(codec.encode(ids, log_p, log_odds), 500)
        p, q = (x / x.sum(1, keepdims=True) for x in (wanted, rows.probabilities.astype(np.float64)))
        error = (p * np.log(p / q)).sum(1)
        bound = (6 / 256) ** 2 / 24 * (p * (p.max(1, keepdims=True) / p) ** (1 / 3)).sum(1)
        assert error.mean() <= 1.1 * bound.mean() and bound.max() <= 7.3e-5 and error.max() <= 1e-4


def test_extremes() -> None:
    codec = TopKCodec(10, 3)
    ids = np.array([[4, 2, 9]] * 4)
    log_p = np.array([[0.0, -500.0, -np.inf], [-1e4, -1e4, -1e4], [-3.0, -3.0, -3.0], [-90.0, -100.0, -80.0]])
    log_odds = np.array([np.inf, -1e4, 0.0, 1e9])
    rows = codec.decode(codec.encode(ids, log_p, log_odds), 4)
    assert rows.ids.tolist() == [[2, 4, 9]] * 4
    assert rows.probabilities[0].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-13)
    assert rows.probabilities[1].tolist() == [0, 0, 0]  # e^-10000 is 0 in any float
    assert rows.probabilities[2].tolist() == pytest.approx([1 / 6] * 3)
    assert rows.probabilities[3].sum() == pytest.approx(1.0)


def draw_tail(vocab_size: int, ids: Any, tail_samples: int) -> Any:
    """Ids that are not kept, in ascending order, with repeats."""
    random = np.random.default_rng(7)
    free = [np.setdiff1d(np.arange(min(vocab_size, 5000)), row) for row in ids]
    return np.stack([np.sort(random.choice(f[: 2 * tail_samples], tail_samples)) for f in free])


@pytest.mark.parametrize(("vocab_size", "k", "tail_samples"), [(2, 1, 1), (7, 3, 5), (4096, 32, 3), (128256, 32, 64)])
@pytest.mark.parametrize("bits", [8, 32])
def test_draws_share_what_is_left(vocab_size: int, k: int, tail_samples: int, bits: int) -> None:
    codec = TopKCodec(vocab_size, k, bits, tail_samples)
    ids, log_p, log_odds = make_rows(vocab_size, k, 20)
    log_odds[3] = np.inf
    tail = draw_tail(vocab_size, ids, tail_samples)
    tail[3] = ids[3, 0]  # what is drawn from nothing
    entropy = np.random.default_rng(2).random(20) * 9
    record = codec.encode(ids, log_p, log_odds, tail, entropy)
    rows = build_codec(codec.settings()).decode(record, 20)
    without = TopKCodec(vocab_size, k, bits)
    kept = without.decode(without.encode(ids, log_p, log_odds), 20)
    assert np.array_equal(rows.ids[:, :k], kept.ids) and np.array_equal(rows.probabilities[:, :k], kept.probabilities)
    assert rows.entropy is not None
    np.testing.assert_allclose(rows.entropy, entropy, rtol=2**-11)
    np.testing.assert_allclose(rows.probabilities.sum(1), 1.0, rtol=1e-5)
    for row in range(20):
        found = {
            int(i): float(p) for i, p in zip(rows.ids[row, k:], rows.probabilities[row, k:], strict=True) if i >= 0
        }
        left = 1 / (1 + np.exp(log_odds[row]))
        wanted = {i: left * (tail[row] == i).mean() for i in set(tail[row].tolist())} if row != 3 else {}
        assert found == pytest.approx(wanted, rel=1e-5 if bits == 32 else 0.01)
    assert abs(len(record) / 20 - codec.bytes_per_row) <= 3 / 20


def test_draws_are_where_the_format_says() -> None:
    codec = TopKCodec(1000, 2, tail_samples=3)
    tail = [[5, 5, 999], [0, 7, 8]]
    record = codec.encode(np.array([[1, 2], [3, 4]]), np.zeros((2, 2)), np.zeros(2), np.array(tail), np.array([1.5, 0]))
    bits = "".join(f"{byte:08b}"[::-1] for byte in record[-12:-4])
    assert [int(bits[i * 10 : i * 10 + 10][::-1], 2) for i in range(6)] == sum(tail, [])
    assert np.frombuffer(record[-4:], "<f2").tolist() == [1.5, 0.0]


@pytest.mark.parametrize("tail_samples", [0, 3])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_record_of_no_rows(bits: int, tail_samples: int) -> None:
    codec = TopKCodec(100, 4, bits, tail_samples)
    no_ids = np.empty((0, 4), dtype=np.int64)
    record = codec.encode(no_ids, np.empty((0, 4)), np.empty(0), no_ids[:, :tail_samples], np.empty(0))
    assert record == b"" and codec.decode(record, 0).ids.shape == (0, 4 + tail_samples)


@pytest.mark.parametrize("tail_samples", [0, 2])
@pytest.mark.parametrize("bits", [8, 32])
@given(data=st.data())
def test_bytes_that_are_no_record(bits: int, tail_samples: int, data: st.DataObject) -> None:
    codec = TopKCodec(data.draw(st.sampled_from([9, 100, 5000])), 8, bits, tail_samples)
    ids, log_p, log_odds = make_rows(codec.vocab_size, 8, 3)
    tail = draw_tail(codec.vocab_size, ids, tail_samples)
    record = bytearray(codec.encode(ids, log_p, log_odds, tail, np.ones(3)))
    kind = data.draw(st.sampled_from(["flip", "cut", "random", "longer"]))
    if kind == "flip":
        place = data.draw(st.integers(0, 8 * len(record) - 1))
        record[place // 8] ^= 1 << place % 8
    elif kind == "cut":
        del record[data.draw(st.integers(0, len(record) - 1)) :]
    elif kind == "longer":
        record += data.draw(st.binary(min_size=1, max_size=9))
    else:
        record = bytearray(data.draw(st.binary(max_size=2 * len(record))))
    try:
        rows = codec.decode(bytes(record), 3)
    except ValueError:
        return
    assert kind in ("flip", "random")
    kept, drawn = rows.ids[:, :8], rows.ids[:, 8:]
    assert rows.ids.shape == (3, 8 + tail_samples) and (np.diff(kept) > 0).all()
    assert kept.min() >= 0 and rows.ids.max() < codec.vocab_size
    used = [[i for i in row if i >= 0] for row in np.concatenate([kept, drawn], axis=1).tolist()]
    assert all(len(set(row)) == len(row) for row in used)
    assert np.isfinite(rows.probabilities).all() and (rows.probabilities >= 0).all()
    assert (rows.probabilities.sum(1) <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[1, 1]]}, "ascending"),
        ({"ids": [[1, 10]]}, "beyond the vocabulary"),
        ({"ids": [[-1, 1]]}, "below 0"),
        ({"log_probabilities": [[math.nan, 0]]}, "not a number"),
        ({"log_probabilities": [[-math.inf, -math.inf]]}, "no finite"),
        ({"log_odds": [math.nan]}, "not a number"),
        ({"tail_ids": [[4, 3]]}, "ascending"),
        ({"tail_ids": [[3, 10]]}, "beyond the vocabulary"),
        ({"tail_ids": [[2, 3]]}, "is an id that is kept"),
        ({"entropy": [math.nan]}, "not finite"),
    ],
)
def test_rows_that_cannot_be(change: dict[str, Any], message: str) -> None:
    rows = {"ids": [[1, 2]], "log_probabilities": [[0.0, -1.0]], "log_odds": [1.0], "tail_ids": [[3, 3]]}
    rows |= {"entropy": [1.0], **change}
    with pytest.raises(ValueError, match=message):
        TopKCodec(10, 2, tail_samples=2).encode(**{name: np.array(value) for name, value in rows.items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0, "k": 1}, "vocab_size is 0"),
        ({"vocab_size": 10, "k": 11}, "k is 11; it must be a whole number from 1 to 10"),
        ({"vocab_size": 10, "k": 2.0}, "k is 2.0"),
        ({"vocab_size": 10, "k": 2, "log_probability_bits": 4}, "must be 8, 16 or 32"),
        ({"vocab_size": 10, "k": 2, "tail_samples": 65}, "tail_samples is 65; it must be a whole number from 0 to 64"),
        ({"vocab_size": 10, "k": 10, "tail_samples": 1}, "tail_samples is 1; it must be a whole number from 0 to 0"),
        ({"vocab_size": 10}, "settings of the mode"),
        ({"vocab_size": 10, "k": 2, "other": 1}, "settings of the mode"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_codec({"mode": "topk", **settings})
    with pytest.raises(ValueError, match="mode 'other'"):
        build_codec({"mode": "other"})

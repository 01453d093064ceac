"""Records of draws, against counting them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.cache.codec import build_codec
from megakd.cache.sampled import SampledCodec


def draws(vocab_size: int, num_samples: int, count: int, distinct: int = 12, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    known = random.integers(0, vocab_size, (count, distinct))
    picked = np.take_along_axis(known, random.integers(0, distinct, (count, num_samples)), 1)
    return np.sort(picked, axis=1), random.exponential(3, count)


def counted(ids: Any, num_samples: int) -> list[dict[int, float]]:
    return [{i: np.float32(n) / np.float32(num_samples) for i, n in Counter(row).items()} for row in ids.tolist()]


def as_dicts(rows: Any) -> list[dict[int, float]]:
    return [
        {int(i): p for i, p in zip(ids, probabilities, strict=True) if i >= 0}
        for ids, probabilities in zip(rows.ids, rows.probabilities, strict=True)
    ]


@given(st.data())
def test_draws_come_back(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([1, 2, 3, 100, 4096, 128256, 1 << 32]))
    num_samples = data.draw(st.sampled_from([1, 2, 7, 8, 32, 50, 300]))
    count = data.draw(st.integers(0, 6))
    ids, entropy = draws(vocab_size, num_samples, count, data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99)))
    codec = build_codec({"mode": "sampled", "vocab_size": vocab_size, "num_samples": num_samples})
    assert isinstance(codec, SampledCodec)
    record = codec.encode(ids, entropy)
    rows = codec.decode(record, count)
    assert as_dicts(rows) == counted(ids, num_samples)
    assert rows.ids.dtype == np.int64 and rows.probabilities.dtype == np.float32
    used = rows.ids >= 0
    assert (rows.probabilities[~used] == 0).all() and (used[:, 1:] <= used[:, :-1]).all()
    assert (np.diff(rows.ids)[used[:, 1:]] > 0).all()
    assert rows.entropy is not None
    np.testing.assert_allclose(rows.entropy, entropy, rtol=2**-11, atol=2**-25)


def naive(record: bytes, rows: int, num_samples: int) -> list[dict[int, int]]:
    """Ids and counts by the format's description, bit by bit."""
    bits = "".join(f"{byte:08b}"[::-1] for byte in record)
    low, at = int(bits[:8][::-1], 2), 8
    runs: list[list[int]] = []
    for row in range(rows):
        text = bits[at + row * num_samples : at + (row + 1) * num_samples]
        runs.append([len(run) + 1 for run in text.split("1")[:-1]])
    at += 8 * ((rows * num_samples + 7) // 8) + 16 * rows
    total = sum(map(len, runs))
    lows = [int(bits[at + i * low : at + (i + 1) * low][::-1] or "0", 2) for i in range(total)]
    at += 8 * ((total * low + 7) // 8)
    found, place = [], 0
    for counts in runs:
        high, ids = 0, {}
        for count in counts:
            while bits[at] == "0":
                high, at = high + 1, at + 1
            at += 1
            ids[high << low | lows[place]] = count
            place += 1
        found.append(ids)
    return found


@given(st.sampled_from([2, 100, 5000, 128256]), st.sampled_from([1, 5, 8, 32]), st.integers(0, 5), st.integers(0, 50))
def test_the_bits_are_where_the_format_says(vocab_size: int, num_samples: int, count: int, seed: int) -> None:
    ids, entropy = draws(vocab_size, num_samples, count, seed=seed)
    record = SampledCodec(vocab_size, num_samples).encode(ids, entropy)
    assert naive(record, count, num_samples) == [dict(Counter(row)) for row in ids.tolist()]


def test_size_at_a_large_vocabulary() -> None:
    ids, entropy = draws(128256, 32, 1000, distinct=13)
    distinct = np.mean([len(set(row)) for row in ids.tolist()])
    record = SampledCodec(128256, 32).encode(ids, entropy)
    assert 11.5 < distinct < 12.5
    assert len(record) / 1000 < 30


@given(st.data())
def test_bytes_that_are_no_record(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([5, 300, 5000]))
    codec = SampledCodec(vocab_size, 8)
    record = bytearray(codec.encode(*draws(vocab_size, 8, 3)))
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
    assert rows.ids.max() < vocab_size and np.isfinite(rows.entropy).all() and (rows.entropy >= 0).all()
    assert [sum(row.values()) for row in as_dicts(rows)] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("ids", "entropy", "message"),
    [
        ([[2, 1]], [1.0], "ascending"),
        ([[1, 10]], [1.0], "beyond the vocabulary"),
        ([[-1, 1]], [1.0], "below 0"),
        ([[1, 1]], [math.nan], "entropy"),
        ([[1, 1]], [-1.0], "entropy"),
        ([[1, 1]], [math.inf], "entropy"),
    ],
)
def test_rows_that_cannot_be(ids: list[list[int]], entropy: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampledCodec(10, 2).encode(np.array(ids), np.array(entropy))


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"num_samples": 65536}, {"vocab_size": (1 << 32) + 1}])
def test_settings_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 1 to"):
        SampledCodec(**{"vocab_size": 10, "num_samples": 4, **settings})


def test_no_text_takes_more_than_the_bound() -> None:
    vocab_size, num_samples, count = 128256, 32, 500
    codec = SampledCodec(vocab_size, num_samples)
    random = np.random.default_rng(0)
    ids = np.sort(np.stack([random.choice(vocab_size, num_samples, replace=False) for _ in range(count)]), axis=1)
    ids[:, -1] = vocab_size - 1
    size = len(codec.encode(ids, random.exponential(3, count))) / count
    assert 0.98 * codec.most_bytes_per_row < size <= codec.most_bytes_per_row + 2 / count

"""The order of each epoch is a permutation fixed by seed and epoch; shares of a blend are exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.data.order import Permutations, SampleOrder, Share, shares_by_epochs, shares_by_weight


def one(num_samples: int, seed: int) -> SampleOrder:
    return SampleOrder([Share(range(num_samples), num_samples)], seed)


@given(num_samples=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    ids = one(num_samples, seed).sample_ids(epoch * num_samples, num_samples)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(num_samples))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_an_order_too_large_to_hold_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    permutations = Permutations(size, seed, held_size=0)
    assert sorted(permutations.at(epoch, np.arange(size)).tolist()) == list(range(size))
    assert permutations.at(epoch, np.array([size - 1])) == permutations.at(epoch, np.arange(size))[-1:]


def test_an_order_too_large_to_hold_has_no_pattern() -> None:
    """Every number is about equally often at every place, and neighbours do not stay together."""
    size, draws = 12, 6000
    found = np.stack([Permutations(size, seed, held_size=0).at(seed % 7, np.arange(size)) for seed in range(draws)])
    for counts in [np.bincount(found[:, place], minlength=size) for place in range(size)]:
        # chi-square with 11 degrees of freedom: above 31.3 once in a thousand
        assert ((counts - draws / size) ** 2 / (draws / size)).sum() < 40
    large = Permutations(1 << 40, 3, held_size=0).at(0, np.arange(100_000))
    assert large.min() < 1 << 30 and large.max() > (1 << 40) - (1 << 30)
    steps = np.diff(np.argsort(large))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02 and (np.abs(steps) == 1).mean() < 1e-3


def test_a_trillion_tokens_take_no_memory() -> None:
    order = SampleOrder([Share(range(3 * 10**8), 3 * 10**8)], seed=1)
    ids = order.sample_ids(299_999_990, 20)
    assert len(set(ids[:10].tolist())) == 10 and 0 <= ids.min() and ids.max() < 3 * 10**8


@given(num_samples=st.integers(1, 12), start=st.integers(0, 60), count=st.integers(0, 50))
def test_any_window_is_the_same_sequence(num_samples: int, start: int, count: int) -> None:
    order = one(num_samples, seed=3)
    one_by_one = [int(one(num_samples, seed=3).sample_ids(p, 1)[0]) for p in range(start, start + count)]
    assert order.sample_ids(start, count).tolist() == one_by_one
    assert order.sample_ids(start, count).tolist() == one_by_one, "asking again changes nothing"


def test_ids_are_fixed_for_good() -> None:
    """A resumed run on another numpy must see the same order: these ids must never change."""
    assert one(8, seed=1234).sample_ids(0, 16).tolist() == [1, 6, 2, 0, 3, 5, 7, 4, 3, 6, 7, 0, 5, 4, 1, 2]
    assert one(8, seed=1235).sample_ids(0, 8).tolist() == [0, 2, 3, 5, 4, 7, 6, 1]
    blend = SampleOrder([Share(range(5), 3), Share(range(10, 14), 4), Share(range(20, 22), 5)], seed=7)
    assert blend.sample_ids(0, 12).tolist() == [20, 11, 10, 13, 3, 2, 0, 12, 21, 21, 20, 21]
    assert Permutations(1 << 30, 7).at(2, np.arange(4)).tolist() == [864049253, 444798798, 429448527, 768023012]


def test_only_two_epochs_are_held() -> None:
    order = one(10, seed=1)
    for step in range(30):
        order.sample_ids(step * 4, 4)
        assert len(order._places._held) <= 2


SHARES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4)


def shares_of(sizes: list[tuple[int, int]]) -> list[Share]:
    """Shares whose ids do not overlap: share n has those from 100 n."""
    return [Share(range(100 * n, 100 * n + size), count) for n, (size, count) in enumerate(sizes)]


@given(sizes=SHARES, seed=st.integers(0, 1000))
def test_shares_are_exact_in_every_epoch_and_read_evenly(sizes: list[tuple[int, int]], seed: int) -> None:
    shares = shares_of(sizes)
    order = SampleOrder(shares, seed)
    seen: Counter[int] = Counter()
    for epoch in range(5):
        ids = order.sample_ids(epoch * order.num_samples, order.num_samples).tolist()
        seen.update(ids)
        for n, share in enumerate(shares):
            assert sum(i // 100 == n for i in ids) == share.count
            often = [seen[i] for i in share.ids]
            assert max(often) - min(often) <= 1, "a data set begins again only when all of it has been read"


@given(sizes=SHARES, start=st.integers(0, 100), count=st.integers(1, 60))
def test_any_window_of_a_blend_is_the_same_sequence(sizes: list[tuple[int, int]], start: int, count: int) -> None:
    expected = [int(SampleOrder(shares_of(sizes), 3).sample_ids(p, 1)[0]) for p in range(start, start + count)]
    assert SampleOrder(shares_of(sizes), 3).sample_ids(start, count).tolist() == expected


def test_a_data_set_is_in_another_order_on_each_pass() -> None:
    order = SampleOrder([Share(range(50), 25), Share(range(100, 101), 1)], seed=1)
    passes = [[i for i in order.sample_ids(52 * p, 52).tolist() if i < 100] for p in range(3)]
    assert all(sorted(ids) == list(range(50)) for ids in passes)
    assert len({tuple(ids) for ids in passes}) == 3


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.01, 10), min_size=5, max_size=5),
)
def test_shares_by_weight(sizes: list[int], weights: list[float]) -> None:
    weights = weights[: len(sizes)]
    shares = shares_by_weight([range(size) for size in sizes], weights)
    total = sum(sizes)
    assert sum(share.count for share in shares) >= total
    for share, weight in zip(shares, weights, strict=True):
        exact = total * weight / sum(weights)
        assert share.count == 1 if exact < 1 else abs(share.count - exact) < 1
    if all(total * weight / sum(weights) >= 1 for weight in weights):
        assert sum(share.count for share in shares) == total


@pytest.mark.parametrize(("often", "counts"), [([1.0, 1.0], [10, 3]), ([2.0, 0.5], [20, 2]), ([0.01, 1.0], [1, 3])])
def test_shares_by_epochs(often: list[float], counts: list[int]) -> None:
    assert [share.count for share in shares_by_epochs([range(10), range(3)], often)] == counts

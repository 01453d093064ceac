"""Packing is first-fit decreasing, example by example."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.data.packing import first_fit_decreasing


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Each example, longest first and then in order, into the first pack that has room."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for pack in packs:
            if sum(lengths[j] for j in pack) + lengths[i] <= capacity:
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs


@given(capacity=st.integers(1, 30), data=st.data())
def test_it_is_first_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    packs = first_fit_decreasing(np.array(lengths), capacity)
    assert [packs[i].tolist() for i in range(len(packs))] == by_definition(lengths, capacity)


def test_a_million_examples() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, size=1_000_000).clip(1, 4096)
    packs = first_fit_decreasing(lengths, 4096)
    assert np.bincount(packs.members, minlength=len(lengths)).tolist() == [1] * len(lengths)
    filled = np.add.reduceat(lengths[packs.members], packs.starts[:-1])
    assert filled.max() <= 4096
    assert len(packs) <= 1.001 * np.ceil(lengths.sum() / 4096)


@pytest.mark.parametrize("lengths", [[], [0, 1], [9]])
def test_examples_fit(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        first_fit_decreasing(np.array(lengths, dtype=np.int64), 8)

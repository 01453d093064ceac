"""Packed integers against Python's own, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.cache.bits import MAX_WIDTH, find_bits, pack, packed_bytes, set_bits, unpack


def by_definition(values: list[int], width: int) -> bytes:
    """All values as one number, the first one lowest."""
    whole = sum(value << (place * width) for place, value in enumerate(values))
    return whole.to_bytes((len(values) * width + 7) // 8, "little")


@given(data=st.data(), width=st.integers(0, MAX_WIDTH), count=st.integers(0, 40))
def test_values_come_back_from_the_bytes_they_must_be(data: st.DataObject, width: int, count: int) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), min_size=count, max_size=count))
    packed = pack(np.array(values, dtype=np.int64), width)
    assert packed.tobytes() == by_definition(values, width)
    assert len(packed) == packed_bytes(count, width)
    assert unpack(packed, count, width).tolist() == values


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_the_largest_value_of_each_width(width: int) -> None:
    values = np.array([(1 << width) - 1, 0] * 9, dtype=np.int64)
    assert unpack(pack(values, width), 18, width).tolist() == values.tolist()


@given(st.sets(st.integers(0, 99)))
def test_bits_are_found_where_they_were_set(places: set[int]) -> None:
    packed = set_bits(np.array(sorted(places), dtype=np.int64), 100)
    assert int.from_bytes(packed.tobytes(), "little") == sum(1 << place for place in places)
    assert find_bits(packed).tolist() == sorted(places)

"""Unsigned integers of a given width in a string of bits, the lowest bit first, eight values at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
MAX_WIDTH = 32


def pack(values: NDArray[np.int64], width: int) -> Bytes:
    """The values [n], each below 2^width, in ceil(n * width / 8) bytes; the last one is filled up with zeros."""
    assert 0 <= width <= MAX_WIDTH, width
    groups = -(-len(values) // 8)
    padded = np.zeros(groups * 8, dtype=np.uint64)
    padded[: len(values)] = values
    columns = padded.reshape(groups, 8)
    out = np.zeros((groups, width), dtype=np.uint8)
    for place, first, shift, count in _layout(width):
        shifted = columns[:, place] << np.uint64(shift)
        for byte in range(count):
            out[:, first + byte] |= (shifted >> np.uint64(8 * byte)).astype(np.uint8)
    return out.reshape(-1)[: packed_bytes(len(values), width)]


def unpack(packed: Bytes, count: int, width: int) -> NDArray[np.int64]:
    """The `count` values that `pack` put there; `packed` has exactly their bytes."""
    assert len(packed) == packed_bytes(count, width), (len(packed), count, width)
    groups = -(-count // 8)
    padded = np.zeros(groups * width, dtype=np.uint8)
    padded[: len(packed)] = packed
    columns = padded.reshape(groups, width)
    wide = np.uint32 if width <= 24 else np.uint64  # a value and what it is shifted by
    values = np.zeros((groups, 8), dtype=np.int64)
    mask = wide((1 << width) - 1)
    for place, first, shift, size in _layout(width):
        value = columns[:, first].astype(wide)
        for byte in range(1, size):
            value |= columns[:, first + byte].astype(wide) << wide(8 * byte)
        value >>= wide(shift)
        value &= mask
        values[:, place] = value
    return values.reshape(-1)[:count]


def packed_bytes(count: int, width: int) -> int:
    """What `pack` makes of so many values."""
    return (count * width + 7) // 8


def set_bits(places: NDArray[np.int64], count: int) -> Bytes:
    """`count` bits, in ceil(count / 8) bytes, of which those at `places` are set."""
    bits = np.zeros(count, dtype=np.uint8)
    bits[places] = 1
    return np.packbits(bits, bitorder="little")


def find_bits(packed: Bytes) -> NDArray[np.int64]:
    """Places of the bits that are set, ascending."""
    return np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_))


def _layout(width: int) -> Iterator[tuple[int, int, int, int]]:
    """For each of eight values in `width` bytes: its number, its first byte, its lowest bit there, its bytes."""
    if width == 0:
        return
    for place in range(8):
        first, shift = divmod(place * width, 8)
        yield place, first, shift, -(-(shift + width) // 8)

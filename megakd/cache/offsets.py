"""Where systematic sampling begins: a uniform number for every position of every sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megakd.common.mixing import mix64

_STEP = 0x9E3779B97F4A7C15  # of SplitMix64's sequence


def draw_offsets(seed: int, sample_id: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Offsets in [0, 1) of these positions, [n]: a hash of (seed, sample id, position), so the same in every layout."""
    state = _next(_next(np.zeros(1, dtype=np.uint64), np.uint64(seed)), np.uint64(sample_id))
    hashed = _next(state, positions.astype(np.uint64))
    offsets: NDArray[np.float64] = (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return offsets


def _next(state: NDArray[np.uint64], value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        return mix64(state + (value + np.uint64(1)) * np.uint64(_STEP))

"""The chunk rule: the budget holds two buffers, in multiples of 128 rows."""

from __future__ import annotations

import pytest

from megakd.losses import chunk_rows


@pytest.mark.parametrize(
    ("num_rows", "local_vocab", "options", "expected"),
    [
        (2048, 32000, {}, 384),  # 96 MiB / 256,000 bytes = 393
        (2048, 32000, {"models": 1}, 768),  # 96 MiB / 128,000 bytes = 786
        (8192, 128256, {"device_type": "cuda"}, 1024),  # 1 GiB / 1,026,048 bytes = 1046
        (8192, 128256, {"chunk_mib": 1024}, 1024),
        (2048, 32000, {"element_size": 8}, 128),  # 196
        (2048, 8000, {}, 1536),  # 1572
        (2048, 256000, {}, 128),  # 49, below the floor
        (100, 256000, {}, 100),
        (300, 1000, {}, 300),
        (0, 1000, {}, 0),
    ],
)
def test_rows(num_rows, local_vocab, options, expected):
    assert chunk_rows(num_rows, local_vocab, **options) == expected


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk_mib is 0"):
        chunk_rows(10, 10, chunk_mib=0)

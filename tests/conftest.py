"""Fixtures for the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.workers import RankPools


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(world_size, function, *args)`: results per rank of a module-level function on gloo ranks."""
    pools = RankPools()
    yield pools.run_ranks
    pools.close()

"""Fixtures for tests of training runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.jobs import Job


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs that end with the test."""
    started: list[Job] = []
    yield started
    for job in started:
        job.kill()

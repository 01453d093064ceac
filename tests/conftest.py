"""Fixtures for the whole suite."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from megakd.common.logging import log
from tests.workers import RankPools

# Files that take longest, the longest first. Where files are handed out to processes they come in this order, so that
# none is left at the end.
LONGEST = (
    "tests/training/test_killed_runs.py", "tests/training/test_nodes.py", "tests/training/test_against_transformers.py",
    "tests/training/test_resuming.py", "tests/training/test_teacher_layouts.py", "tests/cli/test_cache_commands.py",
    "tests/training/test_dedicated_teacher.py", "tests/training/test_experts.py",
    "tests/training/test_cached_teacher.py", "tests/training/test_hangs.py",
    "tests/data/test_inspection.py", "tests/launch/test_launch.py",
)  # fmt: skip

# Nothing here is timed: machines that run tests do other things too.
settings.register_profile("megakd", deadline=None)
settings.load_profile("megakd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(world_size, function, *args)`: results per rank of a module-level function on gloo ranks."""
    pools = RankPools()
    yield pools.run_ranks
    pools.close()


@pytest.fixture(scope="session", autouse=True)
def outside_slurm() -> None:
    """The tests may run inside a Slurm allocation, whose nodes they are not for."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def log_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the project's log says at INFO and above, once each, whatever an earlier test made of its handlers."""
    handler = _Messages()
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    level = log.level
    log.setLevel(logging.INFO)
    yield handler.messages
    log.setLevel(level)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("900k")`: a file system of that size, and another size when called again."""
    mounted = False

    def sized(size: str) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting needs root")
        mounted = True
        return tmp_path

    yield sized
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)

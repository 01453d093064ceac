"""Two launchers that meet over loopback are one job, in which no node outlives what befell another."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megakd.launch.nodes import Nodes
from tests.training.jobs import Job
from tests.training.runs import layout, run_values, write_run_files
from tests.training.test_killed_runs import assert_same_run

STEPS = 40
SLOW = "tests.training.interruptible_worker"


def values_of(files: Path, out: Path) -> dict[str, Any]:
    return run_values(
        files, **layout(2), run__output_dir=str(out / "run"), schedule__train_steps=STEPS,
        checkpoint__save_interval=5, checkpoint__keep_last=2, logging__log_interval=1000,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one node with as many ranks."""
    out = tmp_path_factory.mktemp("whole")
    job = Job(values_of(files, out), 2)
    assert job.end() == 0, job.log[-3000:]
    return out


@pytest.fixture
def started() -> Iterator[list[Job]]:
    """Jobs that end with the test."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.kill()


def start_nodes(started: list[Job], values: dict[str, Any], max_restarts: int = 0, worker: str = SLOW) -> list[Job]:
    """Two nodes of one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        Job(values, 1, max_restarts=max_restarts, worker=worker, nodes=Nodes(2, rank, "127.0.0.1", port))
        for rank in (1, 0)
    ]
    started += nodes
    return nodes[::-1]


def last_line(job: Job) -> str:
    return job.log.splitlines()[-1]


def test_two_nodes_end_as_one_with_as_many_ranks(files: Path, whole: Path, tmp_path: Path, started: list[Job]) -> None:
    nodes = start_nodes(started, values_of(files, tmp_path), worker="megakd.launch.worker")
    assert [node.end() for node in nodes] == [0, 0], [node.log[-3000:] for node in nodes]
    assert_same_run(tmp_path, whole, STEPS)


@pytest.mark.parametrize("max_restarts", [0, 3])
@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_torchrun_ends_the_other_node_with_the_reason(
    files: Path, whole: Path, tmp_path: Path, started: list[Job], max_restarts: int, node: int
) -> None:
    nodes = start_nodes(started, values_of(files, tmp_path), max_restarts)
    nodes[0].wait_for_step(12)
    os.kill(nodes[node].agent().pid, signal.SIGKILL)
    killed = time.monotonic()
    assert [job.end() for job in nodes] == [1, 1]
    assert time.monotonic() - killed < 60
    reason = "torchrun was killed by SIGKILL; all ranks were ended"
    assert last_line(nodes[node]) == f"error: {reason}"
    assert last_line(nodes[1 - node]) == f"error: node {node} ({socket.gethostname()}): {reason}"
    if max_restarts == 0:
        nodes = start_nodes(started, values_of(files, tmp_path), worker="megakd.launch.worker")
        assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
        assert "resumed from" in nodes[0].log + nodes[1].log
        assert_same_run(tmp_path, whole, STEPS)


def test_a_silent_node_ends_the_other(files: Path, tmp_path: Path, started: list[Job]) -> None:
    """Its launcher is killed, and torchrun with it: nobody is left there to say why."""
    nodes = start_nodes(started, values_of(files, tmp_path), max_restarts=3)
    nodes[0].wait_for_step(12)
    os.kill(nodes[1].process.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert nodes[0].end() == 1
    assert time.monotonic() - killed < 60
    assert last_line(nodes[0]).startswith(f"error: node 1 ({socket.gethostname()}) gave no sign of life for 3")


def test_a_killed_rank_is_started_again_on_both_nodes(
    files: Path, whole: Path, tmp_path: Path, started: list[Job]
) -> None:
    nodes = start_nodes(started, values_of(files, tmp_path), max_restarts=3)
    nodes[0].wait_for_step(12)
    os.kill(nodes[1].rank_pids()[0], signal.SIGKILL)
    assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
    assert_same_run(tmp_path, whole, STEPS)


def test_a_signal_to_one_node_saves_and_stops_both(
    files: Path, whole: Path, tmp_path: Path, started: list[Job]
) -> None:
    nodes = start_nodes(started, values_of(files, tmp_path))
    nodes[0].wait_for_step(7)
    nodes[1].process.send_signal(signal.SIGUSR1)
    assert [job.end() for job in nodes] == [75, 75], [job.log[-3000:] for job in nodes]
    assert last_line(nodes[1]) == "stopped by SIGUSR1 after a checkpoint; the same command goes on from it"
    nodes = start_nodes(started, values_of(files, tmp_path), worker="megakd.launch.worker")
    assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
    assert_same_run(tmp_path, whole, STEPS)

"""Two launchers on a network of their own are one job, in which no node outlives what befell another."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from megakd.config.load import config_from_dict, dump_config
from tests.training.interrupted import run_distill
from tests.training.jobs import ROOT, TIMEOUT_SECONDS, Job
from tests.training.networks import Network, two_machines
from tests.training.runs import assert_same_run, layout, run_sides, run_values, write_run_files
from tests.training.slurm import SCRIPT, fake_slurm

STEPS = 40
SLOW = "tests.training.interruptible_worker"
Start = Callable[..., list[Job]]


def values_of(files: Path, out: Path, *, tp: int = 2) -> dict[str, Any]:
    return run_values(
        files, **layout(tp), run__output_dir=str(out / "run"), schedule__train_steps=STEPS,
        checkpoint__save_interval=5, checkpoint__keep_last=2, logging__log_interval=1000, data__micro_batch_size=8,
    )  # fmt: skip


def values_of_two_sides(files: Path, out: Path) -> dict[str, Any]:
    """A student on one rank and its teacher on another."""
    values = values_of(files, out, tp=1)
    values["teacher"].update(placement="dedicated", ranks=1, prefetch_steps=2)
    return values


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """A run of as many ranks on one node, which no launcher started."""
    out = tmp_path_factory.mktemp("whole")
    run_ranks(2, run_distill, values_of(files, out))
    return out


@pytest.fixture(scope="module")
def network(pytestconfig: pytest.Config) -> Iterator[Network]:
    with two_machines() as network:
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\njobs on two nodes: {network.kind}")
        yield network


@pytest.fixture
def start(files: Path, tmp_path: Path, network: Network) -> Iterator[Start]:
    """`start()`: two nodes of one rank each, node 0 first in the list; they end with the test."""
    jobs: list[Job] = []

    def start(max_restarts: int = 0, worker: str = SLOW, values: dict[str, Any] | None = None) -> list[Job]:
        both = [
            Job(values or values_of(files, tmp_path), 1, max_restarts=max_restarts, worker=worker, nodes=nodes,
                prefix=network.prefixes[nodes.rank])
            for nodes in reversed(network.nodes())
        ]  # fmt: skip
        jobs.extend(both)
        return both[::-1]

    yield start
    for job in jobs:
        job.kill()


def last_line(job: Job) -> str:
    return job.log.splitlines()[-1]


def assert_both_end_with(nodes: list[Job], node: int, reason: str) -> None:
    """Both nodes fail, the other one for what befell `node`."""
    assert [job.end() for job in nodes] == [1, 1]
    assert last_line(nodes[node]) == f"error: {reason}"
    assert last_line(nodes[1 - node]) == f"error: node {node} ({socket.gethostname()}): {reason}"


def have_resumed(nodes: list[Job]) -> bool:
    """Node 0 has rank 0, which tells how the run goes."""
    assert "resumed from" not in nodes[1].log
    return "resumed from" in nodes[0].log


def wait_for_step_after_resuming(nodes: list[Job], step: int) -> None:
    """Until the nodes have resumed, metrics.jsonl is what the job before left, which may have it already."""
    nodes[0].wait_for(lambda: have_resumed(nodes))
    nodes[0].wait_for_step(step)


def assert_goes_on(start: Start, whole: Path, out: Path) -> None:
    """The same commands resume and end with the weights of a run that nothing disturbed."""
    nodes = start(worker="megakd.launch.worker")
    assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
    assert have_resumed(nodes)
    assert_same_run(out, whole, STEPS)


def kill_torchrun(nodes: list[Job], node: int) -> None:
    os.kill(nodes[node].agent().pid, signal.SIGKILL)
    assert_both_end_with(nodes, node, "torchrun was killed by SIGKILL; all ranks were ended")


def assert_a_signal_saves_and_stops(nodes: list[Job], pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    assert [job.end() for job in nodes] == [75, 75], [job.log[-3000:] for job in nodes]
    assert last_line(nodes[1]) == "stopped by SIGUSR1 after a checkpoint; the same command goes on from it"


def test_no_node_outlives_the_other_and_the_same_commands_go_on(whole: Path, tmp_path: Path, start: Start) -> None:
    """One run in four jobs, since a job takes long to start; in each something else befalls one node."""
    nodes = start(max_restarts=3)
    nodes[0].wait_for_checkpoint(5)
    kill_torchrun(nodes, 0)

    # A launcher, and torchrun with it: nobody is left there to say why.
    nodes = start(max_restarts=3)
    wait_for_step_after_resuming(nodes, 14)
    os.kill(nodes[1].process.pid, signal.SIGKILL)
    assert nodes[0].end() == 1
    assert re.fullmatch(
        rf"error: node 1 \({socket.gethostname()}\) gave no sign of life for \d+ s", last_line(nodes[0])
    )

    nodes = start()
    wait_for_step_after_resuming(nodes, 21)
    assert_a_signal_saves_and_stops(nodes, [nodes[1].process.pid])

    # A rank is started again, on both nodes.
    nodes = start(max_restarts=3)
    wait_for_step_after_resuming(nodes, 30)
    os.kill(nodes[1].rank_pids()[0], signal.SIGKILL)
    assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
    assert nodes[0].log.count("resumed from") == 2
    assert_same_run(tmp_path, whole, STEPS)


def test_a_teacher_on_a_node_of_its_own_is_started_again_and_ends_as_on_one_node(
    files: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, start: Start, run_ranks: Callable[..., Any]
) -> None:
    whole = tmp_path_factory.mktemp("two-sides")
    run_ranks(2, run_sides, values_of_two_sides(files, whole), teacher_ranks=1)
    nodes = start(max_restarts=1, values=values_of_two_sides(files, tmp_path))
    nodes[0].wait_for_checkpoint(5)
    os.kill(nodes[1].rank_pids()[0], signal.SIGKILL)
    assert [job.end() for job in nodes] == [0, 0], [job.log[-3000:] for job in nodes]
    assert have_resumed(nodes)
    assert_same_run(tmp_path, whole, STEPS)


@pytest.mark.slow
def test_two_nodes_end_as_one_with_as_many_ranks(whole: Path, tmp_path: Path, start: Start) -> None:
    nodes = start(worker="megakd.launch.worker")
    assert [node.end() for node in nodes] == [0, 0], [node.log[-3000:] for node in nodes]
    assert_same_run(tmp_path, whole, STEPS)


@pytest.mark.slow
def test_a_killed_torchrun_of_the_second_node_ends_the_first(whole: Path, tmp_path: Path, start: Start) -> None:
    """Where no restart is allowed either."""
    nodes = start()
    nodes[0].wait_for_step(12)
    kill_torchrun(nodes, 1)
    assert_goes_on(start, whole, tmp_path)


@pytest.mark.slow
def test_a_signal_to_every_process_of_both_nodes_saves_and_stops_them(
    whole: Path, tmp_path: Path, start: Start
) -> None:
    """Slurm sends its warning to all processes of a step at once; its script is tried below."""
    nodes = start()
    nodes[0].wait_for_step(7)
    found = [psutil.Process(job.process.pid) for job in nodes]
    pids = [process.pid for job in found for process in (*job.children(recursive=True), job)]
    assert_a_signal_saves_and_stops(nodes, pids)
    assert_goes_on(start, whole, tmp_path)


@pytest.mark.slow
def test_a_node_that_is_killed_by_signals_ends_both_and_neither_has_finished(start: Start) -> None:
    nodes = start()
    nodes[0].wait_for_checkpoint(5)
    nodes[1].press_ctrl_c_twice()
    assert [job.end() for job in nodes] == [1, 130]
    line = "stopped by SIGINT, then SIGINT; the ranks were killed"
    assert last_line(nodes[1]) == line
    assert last_line(nodes[0]) == f"error: node 1 ({socket.gethostname()}): {line}"


def free_slurm_job() -> int:
    """The number of a job whose port is free."""
    for job in range(os.getpid() % 5000, 9000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 20000 + job)) != 0:
                return job
    raise AssertionError("no port is free")


def test_the_slurm_script_saves_goes_into_the_queue_and_completes(files: Path, whole: Path, tmp_path: Path) -> None:
    """Two nodes on loopback; Slurm's warning goes to every process of the step, and not to the script or srun."""
    fake_slurm(tmp_path)
    config = tmp_path / "my.yaml"
    config.write_text(dump_config(config_from_dict(values_of(files, tmp_path))))
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path), "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(free_slurm_job()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    }  # fmt: skip

    def submit(**variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(config)], cwd=ROOT, env=environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    metrics, first = tmp_path / "run" / "metrics.jsonl", submit()
    started = [first]
    try:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 7:
            assert first.poll() is None, first.communicate()
            time.sleep(0.005)
        tasks = [psutil.Process(int(pid)) for pid in (tmp_path / "tasks").read_text().split()]
        for process in [process for task in tasks for process in (*task.children(recursive=True), task)]:
            process.send_signal(signal.SIGUSR1)
        log = first.communicate(timeout=TIMEOUT_SECONDS)[0]
        assert first.returncode == 75, log[-3000:]
        assert log.count("stopped by SIGUSR1 after a checkpoint; the same command goes on from it") == 2
        assert f"Slurm job {environment['SLURM_JOB_ID']}: 2 nodes (127.0.0.1, 127.0.0.2), meeting at 127.0.0.1:" in log
        assert (tmp_path / "calls").read_text() == f"scontrol requeue {environment['SLURM_JOB_ID']}\n"
        second = submit(SLURM_RESTART_COUNT="1")
        started.append(second)
        log = second.communicate(timeout=TIMEOUT_SECONDS)[0]
        assert second.returncode == 0, log[-3000:]
    finally:
        for script in started:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert ", start 2: 2 nodes" in log and "resumed from" in log
    assert (tmp_path / "calls").read_text().count("requeue") == 1
    assert_same_run(tmp_path, whole, STEPS)

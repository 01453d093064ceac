"""Ranks, torchrun and launcher are killed at any moment: the run restarts and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.interrupted import run_distill
from tests.training.jobs import TIMEOUT_SECONDS, Job, is_saving
from tests.training.runs import assert_same_run, layout, records, run_values, write_run_files

SLOW = "tests.training.interruptible_worker"
KILLS, MANY_KILLS = 5, 200
STEPS_PER_KILL = 20
# How a kill's moment is chosen, in turn; half of all while a checkpoint is written, three of the first five.
MOMENTS = ("saving", "training", "saving", "anywhere")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


def job_values(files: Path, out: Path, steps: int, **settings: Any) -> dict[str, Any]:
    """Of one microbatch to a step: it is not the steps that are tried here."""
    fixed: dict[str, Any] = {
        "run__output_dir": str(out / "run"), "schedule__train_steps": steps, "checkpoint__save_interval": 5,
        "checkpoint__keep_last": 2, "schedule__lr_decay_style": "cosine", "logging__log_interval": 1000,
        "data__micro_batch_size": 8,
    }  # fmt: skip
    return run_values(files, **(layout(2) | fixed | settings))


def wait_for_moment(job: Job, moment: str, rng: random.Random, life: int) -> None:
    """Return when the job is to be killed; its log of this life begins at `life`."""
    if moment == "anywhere":
        time.sleep(rng.uniform(0, 6))
        return
    job.wait_for(lambda: "steps of 128 tokens" in job.log[life:])
    if moment == "saving":
        job.wait_for(lambda: is_saving(job.log[life:]))
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 2))


def kill_many(files: Path, out: Path, run_ranks: Callable[..., list[Any]], jobs: list[Job], kills: int) -> int:
    """Kill random ranks of a job; returns how many died while a checkpoint was written."""
    rng, steps = random.Random(seed_of("kills")), STEPS_PER_KILL * kills
    run_ranks(2, run_distill, job_values(files, out / "whole", steps, checkpoint__save_interval=steps), seconds=3600.0)
    job = Job(job_values(files, out / "killed", steps), 2, max_restarts=kills, worker=SLOW)
    jobs.append(job)
    while_saving = 0
    for number in range(kills):
        life = len(job.log)  # before the ranks of this life say anything
        pids = job.rank_pids()
        wait_for_moment(job, MOMENTS[number % len(MOMENTS)], rng, life)
        victim = rng.choice(pids)
        os.kill(victim, signal.SIGKILL)
        while_saving += is_saving(job.log[life:])
        job.wait_for(lambda pids=pids: not any(psutil.pid_exists(pid) for pid in pids))
    status = job.end(TIMEOUT_SECONDS + steps)  # most steps may be left
    assert status == 0, job.log[-5000:]
    assert_same_run(out / "killed", out / "whole", steps)
    return while_saving


def seed_of(name: str) -> int:
    """The seed to repeat a run of kills with, which is printed."""
    seed = int(os.environ.get("MEGAKD_SEED", time.time_ns() % 2**32))
    print(f"{name}: MEGAKD_SEED={seed}")
    return seed


def test_kills_at_random_moments(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], jobs: list[Job]
) -> None:
    while_saving = kill_many(files, tmp_path, run_ranks, jobs, KILLS)
    print(f"{KILLS} kills, {while_saving} while a checkpoint was written")
    assert 3 * while_saving >= KILLS - 1


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], jobs: list[Job]
) -> None:
    while_saving = kill_many(files, tmp_path, run_ranks, jobs, MANY_KILLS)
    print(f"{MANY_KILLS} kills, {while_saving} while a checkpoint was written")
    assert 3 * while_saving >= MANY_KILLS - 3


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """A run of 40 steps that no launcher started and nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run_ranks(2, run_distill, job_values(files, out, 40))
    return out


@pytest.fixture
def goes_on(files: Path, whole: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> Callable[[], None]:
    """`goes_on()`: what a job left is resumed from, in the pool (that the command does so is tried above)."""

    def goes_on() -> None:
        assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
        assert run_ranks(2, run_distill, job_values(files, tmp_path, 40)) == [None, None]
        assert_same_run(tmp_path, whole, 40)

    return goes_on


def assert_saves_on(job: Job, number: signal.Signals, out: Path, *, at_least: int) -> None:
    """A signal to its launcher ends a job of 40 steps, none of which it was to save, with a checkpoint of the last.

    SIGTERM while that is written, as Slurm sends it when the time after its warning is over, does not disturb it.
    """
    before = {path.name for path in (out / "run" / "checkpoints").glob("step-*")}
    begun = len(job.log)
    job.process.send_signal(number)
    job.wait_for(lambda: is_saving(job.log[begun:]))
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.log[-3000:]
    last = job.log.splitlines()[-1]
    assert last == f"stopped by {number.name} after a checkpoint; the same command goes on from it"
    steps = len(records(out))
    assert at_least <= steps < 40
    saved = {path.name for path in (out / "run" / "checkpoints").iterdir()} - before
    assert saved == {f"step-{steps:08d}"}


def test_without_restarts_a_killed_rank_ends_the_job_soon_with_the_reason(
    files: Path, tmp_path: Path, jobs: list[Job], goes_on: Callable[[], None]
) -> None:
    jobs.append(Job(job_values(files, tmp_path, 40), 2, worker=SLOW))
    jobs[0].wait_for_step(12)
    os.kill(jobs[0].rank_pids()[1], signal.SIGKILL)
    killed = time.monotonic()
    assert jobs[0].end() == 1
    assert time.monotonic() - killed < 60
    assert jobs[0].log.splitlines()[-1].startswith("error: rank ")
    assert "was killed by SIGKILL" in jobs[0].log.splitlines()[-1]
    # The same command goes on, and is stopped in its turn.
    values = job_values(files, tmp_path, 40, checkpoint__save_interval=1000)
    jobs.append(Job(values, 2, max_restarts=3, worker=SLOW))
    jobs[1].wait_for_step(17)
    assert "resumed from" in jobs[1].log
    assert_saves_on(jobs[1], signal.SIGUSR1, tmp_path, at_least=17)
    goes_on()


@pytest.mark.parametrize("victim", ["torchrun", "launcher"])
def test_ranks_do_not_outlive_torchrun_or_the_launcher(
    files: Path, tmp_path: Path, jobs: list[Job], goes_on: Callable[[], None], victim: str
) -> None:
    jobs.append(Job(job_values(files, tmp_path, 40), 2, max_restarts=3, worker=SLOW))
    jobs[0].wait_for_step(12)
    agent, ranks = jobs[0].agent().pid, jobs[0].rank_pids()
    os.kill(agent if victim == "torchrun" else jobs[0].process.pid, signal.SIGKILL)
    killed = time.monotonic()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in ranks):
        assert time.monotonic() - killed < 60
        time.sleep(0.01)
    status = jobs[0].end()
    if victim == "torchrun":
        assert status == 1
        assert jobs[0].log.splitlines()[-1] == "error: torchrun was killed by SIGKILL; all ranks were ended"
    goes_on()


def test_a_signal_saves_and_asks_to_be_gone_on_with(
    files: Path, tmp_path: Path, jobs: list[Job], goes_on: Callable[[], None]
) -> None:
    jobs.append(Job(job_values(files, tmp_path, 40, checkpoint__save_interval=1000), 2, max_restarts=3, worker=SLOW))
    jobs[0].wait_for_step(7)
    assert_saves_on(jobs[0], signal.SIGTERM, tmp_path, at_least=7)
    goes_on()


@pytest.mark.slow
def test_a_second_ctrl_c_kills_a_run_that_saves_and_its_status_says_so(
    files: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    """tests/launch/test_stopped_status.py does it to runs that have not begun to train, which takes seconds less."""
    jobs.append(Job(job_values(files, tmp_path, 40, **layout(1)), 1, worker=SLOW))
    jobs[0].wait_for_checkpoint(5)
    agent, ranks = jobs[0].agent(), jobs[0].rank_pids()
    jobs[0].press_ctrl_c_twice()
    assert jobs[0].end() == 130, jobs[0].log[-3000:]
    assert jobs[0].log.splitlines()[-1] == "stopped by SIGINT, then SIGINT; the ranks were killed"
    assert not any(psutil.pid_exists(pid) for pid in (agent.pid, *ranks))


def test_what_ends_a_run_before_its_first_step_leaves_no_checkpoint_and_is_not_said_to(
    files: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    jobs.append(Job(job_values(files, tmp_path, 40, run__time_limit_minutes=1e-4), 2))
    assert jobs[0].end() == 75, jobs[0].log[-3000:]
    last = jobs[0].log.splitlines()[-1]
    assert last == "stopped by run.time_limit_minutes 0.0001 before the first checkpoint; the same command starts anew"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_sigterm_to_every_process_of_the_job_saves_too(
    files: Path, tmp_path: Path, jobs: list[Job], goes_on: Callable[[], None]
) -> None:
    """As service managers and some queues send it."""
    jobs.append(Job(job_values(files, tmp_path, 40, checkpoint__save_interval=1000), 2, max_restarts=3, worker=SLOW))
    jobs[0].wait_for_step(7)
    for pid in (*jobs[0].rank_pids(), jobs[0].agent().pid, jobs[0].process.pid):
        os.kill(pid, signal.SIGTERM)
    assert jobs[0].end() == 75, jobs[0].log[-3000:]
    goes_on()


def test_a_restart_goes_on_where_only_an_earlier_run_is_not_to_be_gone_on_with(
    files: Path, whole: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    """checkpoint.resume false means: not from what an earlier launch left."""
    values = job_values(files, tmp_path, 40, checkpoint__resume=False)
    shutil.copytree(whole / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    jobs.append(Job(values, 2, max_restarts=1, worker=SLOW))
    jobs[0].wait_for_step(12)
    os.kill(jobs[0].rank_pids()[0], signal.SIGKILL)
    assert jobs[0].end() == 0, jobs[0].log[-3000:]
    assert "resumed from" in jobs[0].log
    assert_same_run(tmp_path, whole, 40)
    assert (tmp_path / "run" / "checkpoints.old-1" / "step-00000040").is_dir()


def test_a_signal_before_the_first_step_is_heard(files: Path, tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(Job(job_values(files, tmp_path, 40), 2))
    jobs[0].rank_pids()
    jobs[0].process.send_signal(signal.SIGUSR1)
    assert jobs[0].end() == 75, jobs[0].log[-3000:]
    assert not (tmp_path / "run" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "run")

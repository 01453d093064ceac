"""A rank that stops ends the job, which names it with the phase and the stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.training.jobs import Job
from tests.training.runs import layout, run_values, write_run_files

# How rank 1 stops, and settings of the run.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sleep": ("sleep", {}),
    "stop": ("stop", {}),
    "two sides": ("sleep", {"placement": "dedicated", "ranks": 1, "parallel": {"tensor_model_parallel_size": 1}}),
}


@pytest.fixture(scope="module")
def all_hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """By name: a job of two ranks, or two and a teacher's, that has ended for rank 1. They run side by side."""
    jobs: dict[str, Job] = {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, (how, own) in JOBS.items():
                patch.setenv("HANG", how)
                values = run_values(
                    write_run_files(tmp_path_factory.mktemp(how)), **layout(2), schedule__train_steps=1000,
                    checkpoint__save_interval=5, safeguards__hang_timeout_seconds=20.0,
                )  # fmt: skip
                values["teacher"].update(own)
                ranks = 2 + own.get("ranks", 0)
                jobs[name] = Job(values, ranks, max_restarts=3, worker="tests.training.hanging_worker")
        pids = {name: job.rank_pids() for name, job in jobs.items()}
        for name, job in jobs.items():
            assert job.end() == 1, job.log[-5000:]
            assert not any(psutil.pid_exists(pid) for pid in pids[name])
        yield jobs
    finally:
        for job in jobs.values():
            job.kill()


@pytest.fixture
def hung(request: pytest.FixtureRequest, all_hung: dict[str, Job]) -> Job:
    """A job that has ended because rank 1 stopped."""
    return all_hung[request.param]


@pytest.mark.parametrize("hung", ["sleep"], indirect=True)
def test_a_rank_that_waits_for_ever_is_named_with_its_phase_and_stack(hung: Job) -> None:
    last = hung.log.splitlines()[-1]
    assert last.startswith("error: rank 1 made no progress for ")
    assert " s in reading data of step 7; rank 0 made no progress" in last
    assert " s in computing of step 7; all ranks were ended" in last
    hang = json.loads((hung.folder / "logs" / "rank-1.hang").read_text())
    assert "never_again" in hang["stacks"] and "hanging_worker.py" in hang["stacks"]
    assert "never_again" in hung.log  # the user need not look for the file
    # No restart: the checkpoint of step 5 is there for who looks into it.
    assert (hung.folder / "checkpoints" / "step-00000005").is_dir()
    assert "resumed from" not in hung.log


@pytest.mark.parametrize("hung", ["stop"], indirect=True)
def test_a_rank_that_gives_no_sign_is_named_by_the_others(hung: Job) -> None:
    last = hung.log.splitlines()[-1]
    assert last.startswith("error: rank 1 gave no sign of life (stopped, or its machine is); rank 0 made no progress")


@pytest.mark.parametrize("hung", ["two sides"], indirect=True)
def test_a_teacher_that_waits_for_a_student_that_hangs_is_named_last(hung: Job) -> None:
    """It has computed step 8, one step ahead."""
    last = hung.log.splitlines()[-1]
    assert last.startswith("error: rank 1 made no progress for ")
    assert " s in reading data of step 7; rank 0 made no progress" in last
    assert " s in waiting for the student of step 9; all ranks were ended" in last

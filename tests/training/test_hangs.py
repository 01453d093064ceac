"""A rank that stops ends the job, which names it with the phase and the stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.training.jobs import Job
from tests.training.runs import layout, run_values, write_run_files

OWN = {"placement": "dedicated", "ranks": 1, "parallel": {"tensor_model_parallel_size": 1}}
# Which rank stops and how, the student's ranks, and settings of the teacher.
JOBS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sleep": ("1 sleep", 2, {}),
    "stop": ("1 stop", 2, {}),
    "two sides": ("1 sleep", 2, OWN),
    "one student": ("0 stop", 1, OWN),
}


@pytest.fixture(scope="module")
def all_hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """By name: a job of two ranks, or a student's and a teacher's, that has ended for one. They run side by side."""
    jobs: dict[str, Job] = {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, (how, students, own) in JOBS.items():
                patch.setenv("HANG", how)
                values = run_values(
                    write_run_files(tmp_path_factory.mktemp(how)), **layout(students), schedule__train_steps=1000,
                    checkpoint__save_interval=5, checkpoint__async_save=False,  # in place before the rank stops
                    safeguards__hang_timeout_seconds=20.0,
                )  # fmt: skip
                values["teacher"].update(own)
                jobs[name] = Job(
                    values, students + own.get("ranks", 0), max_restarts=3, worker="tests.training.hanging_worker"
                )
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
    """A job that has ended because a rank stopped."""
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


@pytest.mark.parametrize("hung", ["one student"], indirect=True)
def test_a_teacher_does_not_wait_for_ever_for_a_student_that_is_frozen(hung: Job) -> None:
    last = hung.log.splitlines()[-1]
    assert last.startswith("error: rank 0 gave no sign of life (stopped, or its machine is); rank 1 made no progress")
    assert " s in waiting for the student of step " in last

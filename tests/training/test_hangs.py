"""A rank that stops ends the job, which names it with the phase and the stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest

from tests.training.jobs import Job
from tests.training.runs import layout, run_values, write_run_files

HOW = ("sleep", "stop")


@pytest.fixture(scope="module")
def all_hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """By how rank 1 stops: a job of two ranks that has ended for it. They wait for one another side by side."""
    jobs: dict[str, Job] = {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for how in HOW:
                patch.setenv("HANG", how)
                values = run_values(
                    write_run_files(tmp_path_factory.mktemp(how)), **layout(2), schedule__train_steps=1000,
                    checkpoint__save_interval=5, safeguards__hang_timeout_seconds=20.0,
                )  # fmt: skip
                jobs[how] = Job(values, 2, max_restarts=3, worker="tests.training.hanging_worker")
        ranks = {how: job.rank_pids() for how, job in jobs.items()}
        for how, job in jobs.items():
            assert job.end() == 1, job.log[-5000:]
            assert not any(psutil.pid_exists(pid) for pid in ranks[how])
        yield jobs
    finally:
        for job in jobs.values():
            job.kill()


@pytest.fixture
def hung(request: pytest.FixtureRequest, all_hung: dict[str, Job]) -> Job:
    """A job of two ranks that has ended because rank 1 stopped."""
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

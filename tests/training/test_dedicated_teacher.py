"""A teacher on ranks of its own through whole runs: evaluation, resuming, kills, signals, an early end."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.jobs import Job
from tests.training.runs import (
    SEQUENCE,
    all_of_records,
    assert_same_run,
    layout,
    records,
    run_sides,
    run_values,
    write_run_files,
)
from tests.workers import RankPools

RANKS, STEPS = 3, 12
WAITS = {"student_wait_share", "teacher_wait_share"}
OWN = {"placement": "dedicated", "ranks": 1, "prefetch_steps": 2, "parallel": {"tensor_model_parallel_size": 1}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def run_once() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks` in a pool that is left afterwards: what a teacher sent ahead to a run that stopped is still there."""
    pools = RankPools()
    yield pools.run_ranks
    pools.close()


def values_of(files: Path, out: Path, *, own: dict[str, Any] = OWN, **settings: Any) -> dict[str, Any]:
    """Two student ranks, measured every few steps on samples that do not fill the teacher's microbatches."""
    fixed: dict[str, Any] = {
        "run__output_dir": str(out / "run"), "schedule__train_steps": STEPS, "checkpoint__save_interval": 4,
        "data__valid_fraction": 0.08, "evaluation__interval": 5, "evaluation__at_start": True,
        "evaluation__at_end": True, "logging__log_interval": 1000,
    }  # fmt: skip
    values = run_values(files, **layout(2), **(fixed | settings))
    values["teacher"].update(own)
    return values


def run_until_stopped(values: dict[str, Any], step: int, rank: int) -> Any:
    """Train until a rank of the student's is told to stop."""
    from tests.training.interrupted import stop_requested_after

    with stop_requested_after(step, rank):
        return run_sides(values)


def assert_same_run_and_scores(found: Path, expected: Path) -> None:
    assert_same_run(found, expected, STEPS)
    assert records(found, "evaluations.jsonl") == records(expected, "evaluations.jsonl")


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run_ranks(RANKS, run_sides, values_of(files, out), teacher_ranks=1) == [None] * RANKS
    return out


def test_a_run_is_that_of_a_teacher_on_the_same_ranks(
    files: Path, whole: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    from tests.training.interrupted import run_distill

    run_ranks(2, run_distill, values_of(files, tmp_path, own={}))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        found, expected = records(whole, name), records(tmp_path, name)
        assert len(found) == len(expected) > 0
        for record, other in zip(found, expected, strict=True):
            assert record == pytest.approx(other, rel=1e-4)
    shares = [[record[key] for key in WAITS] for record in all_of_records(whole)]
    assert len(shares) == STEPS
    assert all(0 <= share <= 1 for pair in shares for share in pair)


def test_evaluation_alone(files: Path, whole: Path, run_ranks: Callable[..., list[Any]]) -> None:
    found = run_ranks(RANKS, run_sides, values_of(files, whole), "evaluate_run", teacher_ranks=1)
    last = records(whole, "evaluations.jsonl")[-1]
    assert found == [{key: value for key, value in last.items() if key != "step"}] * 2 + [None]


def test_a_teacher_for_evaluation_alone(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    from tests.training.interrupted import run_distill

    settings = {"distill__kd_weight": 0, "distill__ce_weight": 1, "schedule__train_steps": 5}
    run_ranks(RANKS, run_sides, values_of(files, tmp_path / "own", **settings), teacher_ranks=1)
    run_ranks(2, run_distill, values_of(files, tmp_path / "same", own={}, **settings))
    found, expected = (records(tmp_path / name, "evaluations.jsonl") for name in ("own", "same"))
    assert len(found) == len(expected) == 2
    for record, other in zip(found, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-4)
    assert not WAITS & all_of_records(tmp_path / "own")[0].keys()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_stopped_run_lets_its_teacher_go_and_goes_on(
    files: Path,
    whole: Path,
    tmp_path: Path,
    run_ranks: Callable[..., list[Any]],
    run_once: Callable[..., list[Any]],
    prefetch_steps: int,
) -> None:
    values = values_of(files, tmp_path, own=OWN | {"prefetch_steps": prefetch_steps})
    assert run_once(RANKS, run_until_stopped, values, 6, 1, teacher_ranks=1) == [
        "a signal to another rank",
        "SIGUSR1",
        None,
    ]
    run_ranks(RANKS, run_sides, values, teacher_ranks=1)
    assert_same_run_and_scores(tmp_path, whole)


def test_patience_ends_a_run_whose_teacher_is_ahead(
    files: Path, tmp_path: Path, run_once: Callable[..., list[Any]]
) -> None:
    settings = {
        "optimizer__lr": 1e-12, "evaluation__metric": "agreement", "evaluation__patience": 1, "evaluation__interval": 2,
    }  # fmt: skip
    run_once(RANKS, run_sides, values_of(files, tmp_path, **settings), teacher_ranks=1)
    assert len(records(tmp_path)) == 4


def most_held(values: dict[str, Any]) -> float:
    """The most bytes of signals in a run with evaluations: on their way from a teacher, or at a student's."""
    from megakd.teacher import RemoteTeacher, TeacherServer

    most, alive = 0, weakref.WeakSet[torch.UntypedStorage]()
    compute, signals = TeacherServer.compute, RemoteTeacher.signals

    def computed(self: TeacherServer, *arguments: Any) -> None:
        nonlocal most
        compute(self, *arguments)
        most = max(most, sum(tensor.nbytes for packed, _ in self._leaving for tensor in packed.values()))

    def received(self: RemoteTeacher, microbatches: Any) -> Any:
        nonlocal most
        found = signals(self, microbatches)
        alive.update(signal.hidden.untyped_storage() for signal in found if signal is not None)
        most = max(most, sum(storage.nbytes() for storage in alive))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherServer, "compute", computed)
        patch.setattr(RemoteTeacher, "signals", received)
        run_sides(values)
    return most


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_what_is_held_is_bounded_in_evaluations_too(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], prefetch_steps: int
) -> None:
    own = OWN | {"prefetch_steps": prefetch_steps, "signal_window": 1}
    values = values_of(files, tmp_path, own=own, schedule__train_steps=5, data__valid_fraction=0.5, run__export=False)
    held = run_ranks(RANKS, most_held, values, teacher_ranks=1)
    sample = SEQUENCE * 48 * 4
    # A step has eight samples and a window two. The student has half of each sequence.
    assert held == [sample, sample, (8 * prefetch_steps + 2) * sample]


def test_a_killed_teacher_ends_the_job_soon_with_the_reason(
    files: Path, whole: Path, tmp_path: Path, jobs: list[Job], run_ranks: Callable[..., list[Any]]
) -> None:
    values = values_of(files, tmp_path)
    jobs.append(Job(values, RANKS, worker="tests.training.interruptible_worker"))
    jobs[0].wait_for_checkpoint(4)
    os.kill(jobs[0].rank_pids()[2], signal.SIGKILL)
    killed = time.monotonic()
    assert jobs[0].end() == 1
    assert time.monotonic() - killed < 60
    assert jobs[0].log.splitlines()[-1].startswith("error: rank 2 (the teacher's) was killed by SIGKILL"), jobs[0].log[
        -3000:
    ]
    assert "DP 1 of rank 2, its own, microbatches of 2, up to 2 steps ahead" in jobs[0].log
    run_ranks(RANKS, run_sides, values, teacher_ranks=1)
    assert_same_run_and_scores(tmp_path, whole)


def test_a_killed_teacher_is_started_again(files: Path, whole: Path, tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(Job(values_of(files, tmp_path), RANKS, max_restarts=1, worker="tests.training.interruptible_worker"))
    jobs[0].wait_for_checkpoint(4)
    os.kill(jobs[0].rank_pids()[2], signal.SIGKILL)
    assert jobs[0].end() == 0, jobs[0].log[-3000:]
    assert "resumed from" in jobs[0].log
    assert_same_run_and_scores(tmp_path, whole)


def test_a_signal_to_the_teacher_saves_and_stops_the_run(files: Path, tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(Job(values_of(files, tmp_path), RANKS, worker="tests.training.interruptible_worker"))
    jobs[0].wait_for_step(3)
    os.kill(jobs[0].rank_pids()[2], signal.SIGTERM)
    assert jobs[0].end() == 75, jobs[0].log[-3000:]
    last = jobs[0].log.splitlines()[-1]
    assert last == "stopped by SIGTERM after a checkpoint; the same command goes on from it"
    assert 3 <= len(records(tmp_path)) < STEPS

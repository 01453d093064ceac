"""Where a step's time goes: on every rank the parts add up, and what is slow shows in its own part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakd.common.step_parts import (
    BACKWARD,
    COMMUNICATION,
    DATA,
    FORWARD,
    LOSS,
    OPTIMIZER,
    STEP_PARTS,
    TEACHER,
    part_seconds,
)
from tests.training.runs import all_of_records, layout, run_values, write_run_files

DELAY = 0.2
SHARDED = {
    "optimizer__use_distributed_optimizer": True, "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@contextmanager
def slowed(place: str | None, rank: int = 0) -> Iterator[None]:
    """Inside, one function on one rank takes DELAY longer."""
    from megakd.data.batches import TrainBatches
    from megakd.losses import distillation
    from megakd.teacher import OnlineTeacher
    from megakd.training import objective
    from megakd.training import step as steps

    owners: dict[str, tuple[Any, str]] = {
        DATA: (TrainBatches, "microbatches"),
        TEACHER: (OnlineTeacher, "signals"),
        FORWARD: (objective, "run_stage"),
        LOSS: (objective, "distillation_loss"),
        "loss backward": (distillation._FusedLoss, "backward"),
        OPTIMIZER: (steps, "_all_finite"),
    }
    if place is None or dist.get_rank() != rank:
        yield
        return
    owner, name = owners[place]
    original = vars(owner)[name]
    call = getattr(owner, name)

    def slow(*arguments: Any, **settings: Any) -> Any:
        time.sleep(DELAY)
        return original(*arguments, **settings) if not isinstance(original, staticmethod) else call(*arguments)

    setattr(owner, name, staticmethod(slow) if isinstance(original, staticmethod) else slow)
    try:
        yield
    finally:
        setattr(owner, name, original)


def run_slowed(values: dict[str, Any], place: str | None, rank: int = 0) -> None:
    from megakd.config.load import config_from_dict
    from megakd.training.loop import distill

    with slowed(place, rank):
        distill(config_from_dict(values))


def values_of(files: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return run_values(
        files, run__output_dir=str(out / "run"), run__export=False, checkpoint__save_at_end=False,
        logging__log_interval=2, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, layout()), (4, layout(2, 2, parallel__sequence_parallel=True)), (2, layout(**SHARDED))],
    ids=["one", "tp2_pp2_sp", "dp2_sharded"],
)
def test_parts_add_up_to_the_step_on_every_rank(
    files: Path, tmp_path: Path, world_size: int, settings: dict[str, Any], run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(world_size, run_slowed, values_of(files, tmp_path, **settings), None)
    stages = settings["parallel__pipeline_model_parallel_size"]
    for record in all_of_records(tmp_path, "metrics.jsonl"):
        parts = part_seconds(record)
        assert parts is not None
        assert sum(parts.values()) == pytest.approx(record["step_seconds"], abs=1e-5)
        assert all(parts[part] > 0 for part in (DATA, TEACHER, FORWARD, LOSS, BACKWARD, OPTIMIZER))
        assert parts[COMMUNICATION] > 0  # of one rank, in the groups of one that megatron-core reduces over
        assert record["teacher_share"] == pytest.approx(parts[TEACHER] / record["step_seconds"], abs=1e-3)
        assert 0 < record["memory_bytes"] <= record["peak_memory_bytes"]
    told = all_of_records(tmp_path, "step_times.jsonl")
    assert [(line["step"], line["steps"]) for line in told] == [(1, 1), (2, 1), (4, 2)]
    by_step = {record["step"]: record for record in all_of_records(tmp_path, "metrics.jsonl")}
    for line in told:
        assert [row["rank"] for row in line["rows"]] == list(range(world_size))
        for row in line["rows"]:
            assert row["stage"] == row["rank"] * stages // world_size
            assert list(row["seconds"]) == list(STEP_PARTS)
            assert (row["seconds"][LOSS] > 0) == (row["stage"] == stages - 1)
        of_interval = [
            by_step[step]["step_seconds"] for step in range(line["step"] - line["steps"] + 1, line["step"] + 1)
        ]
        mean = sum(sum(row["seconds"].values()) for row in line["rows"]) / world_size
        assert mean == pytest.approx(sum(of_interval) / len(of_interval), abs=2e-5)


@pytest.mark.parametrize("place", [DATA, TEACHER, FORWARD, LOSS, "loss backward", OPTIMIZER])
def test_what_is_slow_shows_in_its_part(
    files: Path, tmp_path: Path, place: str, run_ranks: Callable[..., list[Any]]
) -> None:
    values = values_of(files, tmp_path, data__global_batch_size=2, schedule__train_steps=1)
    run_ranks(1, run_slowed, values, place)
    (record,) = all_of_records(tmp_path, "metrics.jsonl")
    parts = part_seconds(record)
    assert parts is not None
    part = LOSS if place == "loss backward" else place
    assert parts[part] >= DELAY
    assert record["step_seconds"] - parts[part] == pytest.approx(sum(parts.values()) - parts[part], abs=1e-5)


def test_a_slow_stage_is_waited_for_by_the_others(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = values_of(files, tmp_path, **layout(2, 2), schedule__train_steps=1, data__global_batch_size=2)
    run_ranks(4, run_slowed, values, FORWARD, 0)
    (line,) = all_of_records(tmp_path, "step_times.jsonl")
    for row in line["rows"]:
        slow = FORWARD if row["rank"] == 0 else COMMUNICATION
        assert row["seconds"][slow] >= 0.9 * DELAY, row


def test_with_the_step_the_wrappers_are_gone(files: Path, tmp_path: Path) -> None:
    from megakd.parallel.timed_collectives import collectives_timed
    from megakd.platform import StepClock

    clock = StepClock()
    before = dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))
    with collectives_timed(clock):
        assert (dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))) == before  # the clock is not running
    clock.start()
    with pytest.raises(RuntimeError), collectives_timed(clock):
        assert dict(vars(dist.ProcessGroup)) != before[0]
        raise RuntimeError
    assert (dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))) == before


def many_ranks_told() -> dict[str, Any]:
    """A line of a run on 40 ranks in two stages, from one process."""
    from types import SimpleNamespace
    from unittest import mock

    from megakd.platform import build_platform
    from megakd.training import timing

    mesh: Any = SimpleNamespace(ranks=tuple(range(40)), pp_size=2, describe=lambda: "TP 1 x PP 2 x DP 20")

    def gather(places: list[torch.Tensor], figures: torch.Tensor) -> None:
        for rank, place in enumerate(places):
            place.copy_(figures * (rank + 1))

    with (
        mock.patch.object(timing.dist, "get_world_size", lambda: 40),
        mock.patch.object(timing.dist, "all_gather", gather),
    ):
        ranks = timing.RankTimes(mesh, build_platform())
        ranks.gather(dict.fromkeys(STEP_PARTS, 0.5))
        ranks.gather(dict.fromkeys(STEP_PARTS, 1.5))
        return ranks.take(2)


def test_many_ranks_are_told_by_stage(run_ranks: Callable[..., list[Any]]) -> None:
    line = run_ranks(1, many_ranks_told)[0]
    assert (line["step"], line["steps"], line["layout"]) == (2, 2, "TP 1 x PP 2 x DP 20")
    assert [(row["stage"], row["ranks"]) for row in line["rows"]] == [(0, 20), (1, 20)]
    assert line["rows"][0]["seconds"][TEACHER] == pytest.approx(10.5)
    assert line["rows"][1]["seconds"][TEACHER] == pytest.approx(30.5)

"""A step that is not finite on one rank is skipped on all, counted, told with its samples, and changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakd.common.errors import UserError
from megakd.config.load import config_from_dict
from tests.training.interrupted import run_distill, run_until_killed, run_until_stopped
from tests.training.runs import build, layout, records, run_values, write_run_files

SHARDED = {
    "optimizer__use_distributed_optimizer": True, "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "tp2": (2, layout(2)),
    "pp2": (2, layout(1, 2)),
    "tp2_pp2_sp": (4, layout(2, 2, parallel__sequence_parallel=True)),
    "dp2": (2, layout()),
    "dp2_sharded": (2, layout(**SHARDED)),
    "dp2_bf16": (2, layout(run__dtype="bf16", **SHARDED)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@contextmanager
def gradients_poisoned(parameter: str, steps: set[int], rank: int, value: float) -> Iterator[None]:
    """Inside, one rank's own gradient of the parameters whose names hold `parameter` goes wrong before steps' ends."""
    from megakd.training import step

    accumulate = step.accumulate_gradients
    count = 0

    def poisoned(student: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        found = accumulate(student, *arguments)
        if count in steps and dist.get_rank() == rank:
            named = [p for name, p in student.model.named_parameters() if parameter in name]
            assert named, parameter
            named[-1].main_grad.view(-1)[0] = value
        return found

    step.accumulate_gradients = poisoned
    try:
        yield
    finally:
        step.accumulate_gradients = accumulate


def state_around_a_skipped_step(values: dict[str, Any], parameter: str, rank: int, value: float) -> dict[str, Any]:
    """Two steps, one that goes wrong on `rank`, one more; beside a run without the third."""
    from megakd.training.step import train_step

    def tensors(run: Any) -> list[torch.Tensor]:
        (inner,) = run.optimizer.chained_optimizers
        moments = [value for state in inner.optimizer.state.values() for value in state.values()]
        return [t.detach().clone() for t in (*run.student.model.parameters(), *moments) if isinstance(t, torch.Tensor)]

    def step(run: Any, number: int) -> Any:
        batches = run.batches()
        try:
            return train_step(
                run.student, run.teacher, run.objective, run.optimizer, batches.microbatches(number), 4e-3, run.platform
            )
        finally:
            batches.close()

    run = build(values)
    run.train(0, 2)
    with gradients_poisoned(parameter, {1}, rank, value):
        skipped = step(run, 2)
    following = step(run, 3)
    other = build(values)
    other.train(0, 2)
    expected = step(other, 3)
    return {
        "skipped": skipped.skipped,
        "norm": skipped.grad_norm,
        "followed": (following.skipped, following.loss, following.grad_norm),
        "expected": (expected.skipped, expected.loss, expected.grad_norm),
        "same": all(torch.equal(a, b) for a, b in zip(tensors(run), tensors(other), strict=True)),
    }


# A norm's weight is held by both tensor ranks alike; a column of a matrix by one alone.
@pytest.mark.parametrize("parameter", ["layernorm", "linear_fc2"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e30])
def test_one_rank_s_gradient_skips_the_step_on_all(
    files: Path, name: str, parameter: str, value: float, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = LAYOUTS[name]
    if value != value or name in ("one", "tp2", "dp2_sharded"):
        found = run_ranks(
            world_size, state_around_a_skipped_step, run_values(files, **settings), parameter, world_size - 1, value
        )
        for rank in found:
            assert rank["skipped"] and math.isnan(rank["norm"])
            assert rank["same"]
            assert rank["followed"] == rank["expected"]


def run_poisoned(values: dict[str, Any], steps: set[int], rank: int) -> None:
    from megakd.training.loop import distill

    with gradients_poisoned("layernorm", steps, rank, math.nan):
        distill(config_from_dict(values))


@contextmanager
def losses_poisoned(steps: set[int], factor: float) -> Iterator[None]:
    """Inside, the losses of some steps are multiplied; their gradients stay what they are."""
    from megakd.training import objective

    call = objective.Objective.__call__
    count = 0

    def poisoned(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        total, weight_sum, record = call(self, *arguments)
        if (count + 3) // 4 in steps:  # four microbatches a step
            record[:3] *= factor
        return total, weight_sum, record

    objective.Objective.__call__ = poisoned  # type: ignore[method-assign]
    try:
        yield
    finally:
        objective.Objective.__call__ = call  # type: ignore[method-assign]


def run_with_wrong_losses(values: dict[str, Any], steps: set[int], factor: float) -> None:
    from megakd.training.loop import distill

    with losses_poisoned(steps, factor):
        distill(config_from_dict(values))


def samples_of(values: dict[str, Any], step: int) -> list[int]:
    from megakd.training.train_data import open_train_data

    size = values["data"]["global_batch_size"]
    return open_train_data(config_from_dict(values)).order.sample_ids((step - 1) * size, size).tolist()


def test_what_is_told_of_a_skipped_step(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(
        files, **layout(2), run__output_dir=str(tmp_path / "run"), schedule__train_steps=8,
        safeguards__max_skipped_steps=3,
    )  # fmt: skip
    run_ranks(2, run_poisoned, values, {2, 3, 5, 6}, 1)
    found = records(tmp_path)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [record["skipped_steps"] for record in found] == [0, 1, 2, 2, 3, 4, 4, 4]
    for record in found:
        skipped = record["step"] in (2, 3, 5, 6)
        assert record.get("skipped", False) == skipped
        assert (record["grad_norm"] is None) == skipped
        if skipped:
            assert record["sample_ids"] == samples_of(values, record["step"])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines())


def test_a_loss_that_is_none_is_skipped(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(files, run__output_dir=str(tmp_path / "run"))
    run_ranks(1, run_with_wrong_losses, values, {3}, math.inf)
    found = records(tmp_path)
    assert [record.get("skipped", False) for record in found] == [False, False, True, False]
    assert found[2]["loss"] is None


def test_too_many_in_a_row_end_the_run_and_keep_the_checkpoint(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = run_values(
        files, run__output_dir=str(tmp_path / "run"), schedule__train_steps=20, checkpoint__save_interval=2,
        safeguards__max_skipped_steps=3,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^3 steps in a row .* up to step 7; .*lower optimizer.lr") as error:
        run_ranks(2, run_poisoned, values, {2, 3, 5, 6, 7}, 1)
    assert "\n" not in str(error.value)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 8))
    # None after a skipped step: what it went wrong on may be in the weights.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    run_ranks(2, run_distill, values)
    assert records(tmp_path)[-1]["skipped_steps"] == 2  # of those before the checkpoint of step 4


def test_the_last_checkpoint_before_skipped_steps_outlives_those_saved_for_a_wish_to_stop(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = run_values(
        files, run__output_dir=str(tmp_path / "run"), schedule__train_steps=20, checkpoint__save_interval=2,
        checkpoint__keep_last=1,
    )  # fmt: skip
    run_ranks(1, run_poisoned_until_stopped, values, {4, 5, 6}, 5)
    assert kept(tmp_path) == [2, 5]
    # Of the ranks' second life, in which their fourth step is the run's ninth.
    run_ranks(1, run_poisoned_until_stopped, values, {4, 5}, 10)
    assert kept(tmp_path) == [8, 10]


def run_poisoned_until_stopped(values: dict[str, Any], steps: set[int], stop: int) -> None:
    with gradients_poisoned("linear_fc2", steps, 0, math.nan):
        run_until_stopped(values, stop, 0)


def kept(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "run" / "checkpoints").iterdir())


def test_a_run_whose_every_step_is_skipped_saves_nothing(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = run_values(files, run__output_dir=str(tmp_path / "run"), checkpoint__save_interval=1)
    run_ranks(1, run_poisoned, values, {1, 2, 3, 4}, 0)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_jumps_is_told_and_counts(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(
        files, run__output_dir=str(tmp_path / "run"), schedule__train_steps=30, checkpoint__save_interval=10,
        optimizer__lr=1e-5,
    )  # fmt: skip
    run_ranks(1, run_with_wrong_losses, values, {25}, 3.0)
    found = {record["step"]: record for record in records(tmp_path)}
    assert [step for step, record in found.items() if "loss_spike" in record] == [25]
    assert found[25]["sample_ids"] == samples_of(values, 25) and found[25]["skipped_steps"] == 0


def test_the_mean_goes_on_after_resuming(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """Whether a loss is a spike follows from losses before the checkpoint, too."""
    settings = {"schedule__train_steps": 26, "checkpoint__save_interval": 12, "optimizer__lr": 1e-5}
    settings |= {"safeguards__loss_spike_deviations": 0.5}
    whole = run_values(files, run__output_dir=str(tmp_path / "whole" / "run"), **settings)
    halves = run_values(files, run__output_dir=str(tmp_path / "halves" / "run"), **settings)
    run_ranks(1, run_distill, whole)
    run_ranks(1, run_until_killed, halves, 18)
    run_ranks(1, run_distill, halves)
    assert records(tmp_path / "halves") == records(tmp_path / "whole")
    assert any("loss_spike" in record for record in records(tmp_path / "whole"))

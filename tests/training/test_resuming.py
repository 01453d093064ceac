"""A run that is cut in two is the run in one piece, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.common.errors import UserError
from megakd.config.load import config_from_dict
from megakd.torch_dist import TorchDistFolder
from tests.training.interrupted import run_distill, run_until_killed, run_until_stopped
from tests.training.runs import layout, records, run_values, weights, write_run_files, write_tokens

STEPS = 10
SHARDED = {
    "optimizer__use_distributed_optimizer": True, "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}  # fmt: skip
TEACHERS: dict[str, dict[str, Any]] = {
    "online": {},
    "none": {"distill__kd_weight": 0.0, "teacher": None},
    "sampled": {"cache": {"mode": "sampled", "num_samples": 8}},
    "topk": {"cache": {"mode": "topk", "k": 8}},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "tp2_pp2": (4, layout(2, 2)),
    "dp2_sharded": (2, layout(**SHARDED)),
}
CASES = [("online", name) for name in LAYOUTS] + [(teacher, "one") for teacher in TEACHERS if teacher != "online"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"), tied=True, samples=40)  # ten steps are two epochs
    write_tokens(folder / "held_out", torch.arange(100).numpy())
    return folder


def write_cache(values: dict[str, Any]) -> None:
    from megakd.training.caching import write_cache

    write_cache(config_from_dict(values))


def values_of(files: Path, out: Path, teacher: str, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    sections = {key: value for key, value in TEACHERS[teacher].items() if "__" not in key}
    settings |= {key: value for key, value in TEACHERS[teacher].items() if "__" in key}
    defaults = {
        "run__output_dir": str(out / "run"), "schedule__train_steps": STEPS, "schedule__lr_decay_style": "cosine",
        "schedule__lr_warmup_steps": 3, "data__valid": str(files / "held_out"), "evaluation__interval": 2,
        "checkpoint__save_interval": 3,
    }  # fmt: skip
    values = run_values(files, **(defaults | settings))
    values |= sections
    return values


def in_folder(values: dict[str, Any], out: Path) -> dict[str, Any]:
    """The same run elsewhere."""
    return {**values, "run": {**values["run"], "output_dir": str(out / "run")}}


def tensors_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the optimizer's too, whole."""
    folder = TorchDistFolder(out / "run" / "checkpoints" / f"step-{step:08d}")
    return {key: folder.read(key, (0,) * len(folder.shape(key)), folder.shape(key)) for key in folder.keys}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def assert_same_run(found: Path, expected: Path) -> None:
    assert [record["step"] for record in records(found)] == list(range(1, STEPS + 1))
    assert records(found) == records(expected)
    assert records(found, "evaluations.jsonl") == records(expected, "evaluations.jsonl")
    assert_equal(weights(found), weights(expected))
    assert_equal(tensors_of(found, STEPS), tensors_of(expected, STEPS))


class Whole:
    """A run that nothing interrupted."""

    def __init__(self, files: Path, out: Path, teacher: str, name: str, run_ranks: Callable[..., list[Any]]) -> None:
        self.out = out
        self.world_size, settings = LAYOUTS[name]
        self.values = values_of(files, out, teacher, settings)
        if teacher in ("sampled", "topk"):
            run_ranks(1, write_cache, {**self.values, "cache": self.values["cache"] | {"path": str(out / "cache")}})
            self.values["teacher"] = {"source": "cache", "path": str(out / "cache")}
            del self.values["cache"]
        assert run_ranks(self.world_size, run_distill, self.values) == [None] * self.world_size


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def whole(
    request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory,
    run_ranks: Callable[..., list[Any]],
) -> Whole:  # fmt: skip
    return Whole(files, tmp_path_factory.mktemp("whole"), *request.param, run_ranks)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_killed_run_ends_as_the_uninterrupted_one(
    whole: Whole, tmp_path: Path, in_background: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    values = in_folder(whole.values, tmp_path)
    values["checkpoint"] = {**values["checkpoint"], "async_save": in_background}
    run_ranks(whole.world_size, run_until_killed, values, 5)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    run_ranks(whole.world_size, run_until_killed, values, 8)
    run_ranks(whole.world_size, run_distill, values)
    assert_same_run(tmp_path, whole.out)


def test_a_stopped_run_goes_on_where_it_stopped(
    whole: Whole, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = in_folder(whole.values, tmp_path)
    last = whole.world_size - 1
    reasons = run_ranks(whole.world_size, run_until_stopped, values, 4, last)
    assert reasons[last] == "SIGUSR1" and all(reasons)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    run_ranks(whole.world_size, run_distill, values)
    assert_same_run(tmp_path, whole.out)


@pytest.mark.parametrize("name", ["one", "pp2_dp2", "tp2_dp2"])
def test_another_layout_continues_the_curve(
    files: Path, tmp_path: Path, name: str, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = {
        "one": (1, layout()), "pp2_dp2": (4, layout(1, 2)), "tp2_dp2": (4, layout(2)),
    }[name]  # fmt: skip
    whole = values_of(files, tmp_path / "whole", "online", layout(2))
    run_ranks(2, run_distill, whole)
    run_ranks(2, run_until_killed, in_folder(whole, tmp_path / "halves"), 5)
    run_ranks(world_size, run_distill, values_of(files, tmp_path / "halves", "online", settings))
    found, expected = records(tmp_path / "halves"), records(tmp_path / "whole")
    assert len(found) == STEPS
    for name in ("loss", "kd_loss", "ce_loss", "tokens", "learning_rate"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=1e-4), name


def test_a_wish_to_stop_before_the_first_step_saves_nothing(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = values_of(files, tmp_path, "online", {})
    assert run_ranks(2, run_until_stopped, values, 0, 1) == ["a signal to another rank", "SIGUSR1"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert records(tmp_path) == []


def test_a_wish_to_stop_at_the_end_comes_too_late(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    assert run_ranks(1, run_until_stopped, values_of(files, tmp_path, "online", {}), STEPS, 0) == [None]
    assert weights(tmp_path)


def test_the_time_limit_saves_and_stops(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = values_of(files, tmp_path, "online", {"run__time_limit_minutes": 1e-6})
    assert run_ranks(2, run_distill, values) == ["run.time_limit_minutes 1e-06"] * 2
    assert not (tmp_path / "run" / "student").exists()


def test_a_run_that_has_ended_only_exports(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = values_of(files, tmp_path, "online", {})
    run_ranks(1, run_distill, values)
    before, trained = records(tmp_path), weights(tmp_path)
    run_ranks(1, run_distill, values)
    assert records(tmp_path) == before
    assert_equal(weights(tmp_path), trained)


def test_a_longer_run_is_another_where_the_learning_rate_decays(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(1, run_until_killed, values_of(files, tmp_path, "online", {}), 5)
    longer = values_of(files, tmp_path, "online", {"schedule__train_steps": 12})
    with pytest.raises(UserError, match="schedule.train_steps was 10 and is 12.*--accept-changes"):
        run_ranks(1, run_distill, longer)
    run_ranks(1, run_distill, longer, True)
    assert len(records(tmp_path)) == 12


def random_states_over_steps(values: dict[str, Any]) -> bool:
    """Whether three steps leave the random states as they are."""
    from megakd.checkpoint.random_states import random_states
    from tests.training.runs import build

    run = build(values)
    before = random_states()
    run.train(0, 3)
    after = random_states()
    return before.keys() == after.keys() and all(torch.equal(after[name], state) for name, state in before.items())


def test_training_draws_nothing(files: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """So a run on another layout, which begins its random states anew, is the same run."""
    assert run_ranks(2, random_states_over_steps, run_values(files, **layout(2))) == [True, True]

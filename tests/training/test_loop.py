"""A run that is cut in two is the run in one piece, to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import layout, records, run_values, weights, write_run_files, write_tokens

SHARDED = {
    "run__dtype": "bf16", "optimizer__use_distributed_optimizer": True, "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_bf16_overlapped": (2, layout(**SHARDED)),
}
STEPS = 6


def run_distill(values: dict[str, Any]) -> dict[int, Any]:
    """The scores that a run reports, by step."""
    from megakd.config.schema import Config
    from megakd.training import distill

    result = distill(Config.model_validate(values), accept_changes=True)
    return {step: scores.to_dict() for step, scores in result.scores.items()}


def values_of(files: Path, out: Path, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    return run_values(
        files, **settings, run__output_dir=str(out / "run"), schedule__train_steps=steps, checkpoint__save_interval=3,
        data__valid=str(files / "held_out"), evaluation__at_end=True, evaluation__interval=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"), tied=True, samples=40)  # more than an epoch is read
    write_tokens(folder / "held_out", torch.arange(100).numpy())
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_run_equals_the_uninterrupted_one(
    files: Path, name: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = LAYOUTS[name]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    scores = run_ranks(world_size, run_distill, values_of(files, whole, STEPS, settings))
    first = run_ranks(world_size, run_distill, values_of(files, halves, STEPS // 2, settings))
    assert [record["step"] for record in records(halves)] == [1, 2, 3]
    second = run_ranks(world_size, run_distill, values_of(files, halves, STEPS, settings))

    assert [record["step"] for record in records(whole)] == [1, 2, 3, 4, 5, 6]
    assert records(halves) == records(whole)
    assert list(scores[0]) == [2, 4, 6] and list(first[0]) == [2, 3] and list(second[0]) == [4, 6]
    assert {**first[0], **second[0]}.items() >= scores[0].items()
    assert all(of_rank == scores[0] for of_rank in scores)
    found, expected = weights(halves), weights(whole)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


def test_going_back_to_an_older_checkpoint_logs_each_step_once(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    values = values_of(files, tmp_path, 5, {"checkpoint__save_at_end": False})
    run_ranks(1, run_distill, values)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    before, scored = records(tmp_path), records(tmp_path, "evaluations.jsonl")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short in the middle of a line
    run_ranks(1, run_distill, values)
    assert [record["step"] for record in before] == [1, 2, 3, 4, 5]
    assert records(tmp_path) == before
    assert records(tmp_path, "evaluations.jsonl") == scored


def test_without_resume_a_run_starts_over(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = values_of(files, tmp_path, 3, {"checkpoint__resume": False})
    run_ranks(1, run_distill, values)
    first, trained = records(tmp_path), weights(tmp_path)
    shutil.rmtree(tmp_path / "run" / "student")
    run_ranks(1, run_distill, values)
    assert records(tmp_path) == first
    assert all(torch.equal(weight, trained[key]) for key, weight in weights(tmp_path).items())


def run_twice(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of the initial student, of a run's end, and of its newest checkpoint read again."""
    from megakd.config.schema import Config
    from megakd.training import distill, evaluate_run

    config = Config.model_validate(values)
    initial = evaluate_run(config).to_dict()
    end = distill(config).scores[3].to_dict()
    return [initial, end, evaluate_run(config).to_dict()]


def test_evaluating_a_run_reads_its_newest_checkpoint(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    initial, end, again = run_ranks(1, run_twice, values_of(files, tmp_path, 3, {}))[0]
    assert again == end
    assert initial["cross_entropy"] != pytest.approx(end["cross_entropy"], rel=1e-3)


def train_with_moved_models(values: dict[str, Any], folders: list[Path]) -> None:
    """Train, with the models' config.json gone before the first step."""
    from megakd.config.schema import Config
    from megakd.training import distill, run

    train_step = run.Run._train_step

    def move_away(self: Any, *arguments: Any) -> None:
        for folder in folders:
            (folder / "config.json").rename(folder / "gone.json")
        run.Run._train_step = train_step  # type: ignore[method-assign]
        train_step(self, *arguments)

    run.Run._train_step = move_away  # type: ignore[method-assign]
    try:
        distill(Config.model_validate(values))
    finally:
        run.Run._train_step = train_step  # type: ignore[method-assign]


@pytest.mark.parametrize("kd_weight", [0.5, 0.0])
def test_a_run_reads_no_model_s_folder_once_it_has_started(
    tmp_path: Path, run_ranks: Callable[..., list[Any]], kd_weight: float
) -> None:
    """All weights are in memory; a folder on a network may be moved, or its server away for a while."""
    write_run_files(tmp_path, tied=True, samples=40)
    write_tokens(tmp_path / "held_out", torch.arange(100).numpy())
    values = values_of(tmp_path, tmp_path, 3, {"run__export": False, "distill__kd_weight": kd_weight})
    run_ranks(1, train_with_moved_models, values, [tmp_path / "teacher", tmp_path / "student"])
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]

"""The best checkpoint by each metric is kept, and a run without a better one ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.checkpoint.folders import checkpoint_steps, prune, step_folder
from megakd.training.watch import Best, LossSpikes
from tests.training.interrupted import run_distill, run_until_killed
from tests.training.runs import records, run_values, weights, write_run_files, write_tokens

METRICS = ("cross_entropy", "perplexity", "kl_to_teacher", "agreement")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"))
    write_tokens(folder / "held_out", torch.arange(200).numpy())
    return folder


def values_of(files: Path, out: Path, metric: str | None, **settings: Any) -> dict[str, Any]:
    fixed = {
        "run__output_dir": str(out / "run"), "schedule__train_steps": 12, "data__valid": str(files / "held_out"),
        "evaluation__interval": 1, "evaluation__metric": metric, "checkpoint__keep_last": 1,
    }  # fmt: skip
    return run_values(files, **(fixed | settings))


def kept(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "run" / "checkpoints").iterdir())


def best_step(out: Path, metric: str, until: int) -> int:
    """By the file of evaluations: the first of the best ones."""
    scored = [r for r in records(out, "evaluations.jsonl") if r["step"] <= until]
    sign = -1 if metric == "agreement" else 1
    return min(scored, key=lambda record: (sign * record[metric], record["step"]))["step"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_is_kept_beside_the_newest(
    files: Path, tmp_path: Path, metric: str, run_ranks: Callable[..., list[Any]]
) -> None:
    # Held-out tokens unlike the training data: the student soon gets worse on them.
    run_ranks(1, run_distill, values_of(files, tmp_path, metric, optimizer__lr=2e-2))
    best = best_step(tmp_path, metric, 12)
    assert kept(tmp_path) == sorted({best, 12})
    record = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "record.json").read_text())
    assert record["counters"]["best"]["step"] == best


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_the_run(files: Path, tmp_path: Path, patience: int, run_ranks: Callable[..., list[Any]]) -> None:
    settings = {"evaluation__patience": patience, "optimizer__lr": 2e-2, "schedule__train_steps": 60}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(1, run_distill, values_of(files, whole, "cross_entropy", **settings))
    last = len(records(whole))
    assert patience < last < 60
    best = best_step(whole, "cross_entropy", last)
    assert last == best + patience
    assert kept(whole) == [best, last]
    trained = weights(whole)  # exported although it ended early
    # A second start does not train on.
    run_ranks(1, run_distill, values_of(files, whole, "cross_entropy", **settings))
    assert len(records(whole)) == last
    # Cut in two between the best step and the end, it ends at the same step.
    values = values_of(files, halves, "cross_entropy", **settings, checkpoint__save_interval=1)
    run_ranks(1, run_until_killed, values, best)
    run_ranks(1, run_distill, values)
    assert records(halves) == records(whole)
    assert all(torch.equal(weight, trained[key]) for key, weight in weights(halves).items())
    assert kept(halves) == [best, last]


def test_another_metric_does_not_compare_with_the_old_ones_best(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(1, run_until_killed, values_of(files, tmp_path, "cross_entropy", checkpoint__save_interval=1), 4)
    run_ranks(1, run_distill, values_of(files, tmp_path, "agreement", evaluation__patience=30))
    best = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "record.json").read_text())["counters"][
        "best"
    ]
    scored = {r["step"]: r["agreement"] for r in records(tmp_path, "evaluations.jsonl") if r["step"] > 3}
    assert best["value"] == max(scored.values()) == scored[best["step"]]
    assert best["measure"].startswith("agreement on ")


def test_a_best_one_that_was_not_written_does_not_cost_the_one_before(tmp_path: Path) -> None:
    best = Best()
    for step, value in ((1, 3.0), (2, 2.0), (4, 1.0)):
        best.take(step, value, larger_is_better=False)
    assert best.steps == [4, 2]
    for step in (1, 2, 3):
        step_folder(tmp_path, step).mkdir()
    prune(tmp_path, 1, [best.steps])
    assert list(checkpoint_steps(tmp_path)) == [2, 3]


def test_without_a_metric_nothing_is_kept_for_being_good(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(1, run_distill, values_of(files, tmp_path, None))
    assert kept(tmp_path) == [12]


def test_equal_values_are_not_better() -> None:
    best = Best()
    assert [best.take(step, 1.0, larger_is_better=False) for step in (1, 2, 3)] == [True, False, False]
    assert (best.step, best.since) == (1, 2)
    assert not best.take(4, float("nan"), larger_is_better=False)
    first = Best()
    assert [first.take(step, value, larger_is_better=False) for step, value in enumerate((math.nan, 2.0))] == [
        False,
        True,
    ]


def test_a_spike_is_far_above_the_recent_mean() -> None:
    spikes = LossSpikes()
    quiet = [2.0 + 0.01 * (step % 5) for step in range(60)]
    assert not any(spikes.is_spike(loss, 6.0) for loss in quiet)
    assert spikes.is_spike(3.0, 6.0)
    # A spike hardly moves the mean, so that a second one is one, too.
    assert spikes.is_spike(3.0, 6.0)
    assert not spikes.is_spike(1.0, 6.0)
    assert not spikes.is_spike(10.0, None)


def test_the_first_losses_and_a_steady_fall_are_no_spikes() -> None:
    spikes = LossSpikes()
    assert not any(spikes.is_spike(loss, 6.0) for loss in [5.0, 50.0, 4.0, 3.0])
    spikes = LossSpikes()
    assert not any(spikes.is_spike(10 / (1 + 0.1 * step), 6.0) for step in range(300))

"""A checkpoint continues a run under any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import build, layout, run_values, write_run_files

SHARDED = {"optimizer__use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {"optimizer__overlap_grad_reduce": True, "optimizer__overlap_param_gather": True}
# What saves: layouts of four ranks.
SOURCES: dict[str, dict[str, Any]] = {
    "tp2_pp2": layout(2, 2),
    "tp2_pp2_distributed_optimizer": layout(2, 2, **SHARDED),
    "tp2_dp2_distributed_optimizer": layout(2, **OVERLAPPED),
    "experts_tp2_pp2": layout(2, 2, parallel__sequence_parallel=True, **SHARDED),
}
# What loads.
TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, layout()),
    "pp2": (2, layout(1, 2)),
    "tp2": (2, layout(2, parallel__sequence_parallel=True)),
    "dp2": (2, layout()),
}


def save_and_go_on(values: dict[str, Any], folder: Path) -> list[float]:
    """Two steps, a checkpoint, and the losses of three more."""
    run = build(values)
    run.train(0, 2)
    run.save(folder, 2, tokens=256)
    return run.train(2, 5)


def load_and_go_on(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[float]]:
    run = build(values)
    return run.load(folder), run.train(2, 5)


class Saved:
    """A checkpoint of four ranks and how its run went on."""

    def __init__(self, folder: Path, name: str, run_ranks: Callable[..., list[Any]]) -> None:
        self.folder, self.settings = folder, SOURCES[name]
        self.losses = run_ranks(4, save_and_go_on, run_values(folder, **self.settings), folder / "checkpoints")[0]


@pytest.fixture(scope="module", params=SOURCES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]
) -> Saved:
    # A tied head across stages has a copy of the embedding to save.
    name = request.param
    folder = write_run_files(tmp_path_factory.mktemp(name), tied=name == "tp2_pp2", experts=name.startswith("experts"))
    return Saved(folder, request.param, run_ranks)


@pytest.mark.parametrize("name", TARGETS)
def test_another_layout_goes_on_as_the_run_itself(saved: Saved, name: str, run_ranks: Callable[..., list[Any]]) -> None:
    world_size, settings = TARGETS[name]
    kept = {key: value for key, value in saved.settings.items() if key == "optimizer__use_distributed_optimizer"}
    values = run_values(saved.folder, **settings, **kept)
    counters, losses = run_ranks(world_size, load_and_go_on, values, saved.folder / "checkpoints")[0]
    assert counters == {"tokens": 256}
    assert losses == pytest.approx(saved.losses, rel=1e-5)
    # Without the optimizer's moments the next losses are others.
    assert len(set(saved.losses)) == 3


def go_on_without_moments(values: dict[str, Any], folder: Path) -> list[float]:
    run = build(values)
    run.checkpoints(folder).load_model(folder / "step-00000002")
    return run.train(2, 5)


def test_the_moments_matter(saved: Saved, run_ranks: Callable[..., list[Any]]) -> None:
    """What the test above allows is far less than what a fresh optimizer changes."""
    found = run_ranks(1, go_on_without_moments, run_values(saved.folder), saved.folder / "checkpoints")[0]
    assert found[0] == pytest.approx(saved.losses[0], rel=1e-5)  # the weights are those saved
    assert found != pytest.approx(saved.losses, rel=5e-5)


def steps_after_loading(values: dict[str, Any], folder: Path) -> list[list[float]]:
    """Adam's step counts after loading a checkpoint of two steps, and after one step more."""
    run = build(values)
    run.load(folder)
    (inner,) = run.optimizer.chained_optimizers

    def steps() -> list[float]:
        return sorted({float(state["step"]) for state in inner.optimizer.state.values()})

    loaded = steps()
    run.train(2, 3)
    return [loaded, steps()]


def test_adam_counts_on(saved: Saved, run_ranks: Callable[..., list[Any]]) -> None:
    kept = {key: value for key, value in saved.settings.items() if key == "optimizer__use_distributed_optimizer"}
    values = run_values(saved.folder, **kept)
    assert run_ranks(2, steps_after_loading, values, saved.folder / "checkpoints") == [[[2.0], [3.0]]] * 2

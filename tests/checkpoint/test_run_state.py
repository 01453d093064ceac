"""A checkpoint continues a run under any layout, and is one only when all of it is written."""

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
    from megakd.checkpoint.run_state import save_checkpoint
    from megakd.training.export import parameters_gathered

    run = build(values)
    run.train(0, 2)
    with parameters_gathered(run.student.model):
        save_checkpoint(folder, 2, run.student.model, run.optimizer, run.mesh, {"step": 2, "tokens": 256})
    return run.train(2, 5)


def load_and_go_on(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[float]]:
    from megakd.checkpoint.run_state import latest_checkpoint, load_checkpoint

    run = build(values)
    path = latest_checkpoint(folder)
    assert path is not None
    counters = load_checkpoint(path, run.student.model, run.optimizer, run.mesh)
    return counters, run.train(2, 5)


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
    assert counters == {"step": 2, "tokens": 256}
    assert losses == pytest.approx(saved.losses, rel=1e-5)
    # Without the optimizer's moments the next losses are others.
    assert len(set(saved.losses)) == 3


def go_on_without_moments(values: dict[str, Any], folder: Path) -> list[float]:
    from megakd.checkpoint.run_state import latest_checkpoint, load_checkpoint

    run = build(values)
    path = latest_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, run.student.model, None, run.mesh)
    return run.train(2, 5)


def test_the_moments_matter(saved: Saved, run_ranks: Callable[..., list[Any]]) -> None:
    """What the test above allows is far less than what a fresh optimizer changes."""
    found = run_ranks(1, go_on_without_moments, run_values(saved.folder), saved.folder / "checkpoints")[0]
    assert found[0] == pytest.approx(saved.losses[0], rel=1e-5)  # the weights are those saved
    assert found != pytest.approx(saved.losses, rel=5e-5)


def steps_after_loading(values: dict[str, Any], folder: Path) -> list[list[float]]:
    """Adam's step counts after loading a checkpoint of two steps, and after one step more."""
    from megakd.checkpoint.run_state import latest_checkpoint, load_checkpoint

    run = build(values)
    path = latest_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, run.student.model, run.optimizer, run.mesh)
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


def save_and_fail(values: dict[str, Any], folder: Path) -> str:
    """A save that breaks while it writes, after one that succeeded."""
    from megakd.checkpoint import run_state

    run = build(values)
    arguments = (run.student.model, run.optimizer, run.mesh)
    run.train(0, 1)
    run_state.save_checkpoint(folder, 1, *arguments, {"step": 1})
    write = run_state.dist_checkpointing.save

    def break_off(state: dict[str, Any], path: str) -> None:
        write(state, path)
        raise OSError("disk full")

    run_state.dist_checkpointing.save = break_off
    try:
        run_state.save_checkpoint(folder, 2, *arguments, {"step": 2})
    except OSError as error:
        return str(error)
    finally:
        run_state.dist_checkpointing.save = write
    return "saved"


def save_twice(values: dict[str, Any], folder: Path) -> None:
    from megakd.checkpoint.run_state import save_checkpoint

    run = build(values)
    run.train(0, 2)
    for counter in (2, 3):
        save_checkpoint(folder, 2, run.student.model, run.optimizer, run.mesh, {"step": 2, "again": counter})


def test_a_save_that_broke_off_is_no_checkpoint(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    from megakd.checkpoint.run_state import checkpoint_steps, latest_checkpoint

    values, folder = run_values(write_run_files(tmp_path)), tmp_path / "checkpoints"
    assert latest_checkpoint(folder) is None
    assert run_ranks(1, save_and_fail, values, folder) == ["disk full"]
    assert (folder / "step-00000002.partial" / "metadata.json").exists()  # all but its name
    assert list(checkpoint_steps(folder)) == [1]
    run_ranks(1, save_twice, values, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    counters, _ = run_ranks(1, load_and_go_on, values, folder)[0]
    assert counters == {"step": 2, "again": 3}


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    from megakd.checkpoint.run_state import checkpoint_steps, latest_checkpoint

    for name in ("step-00000010", "step-00000009", "step-00000011.partial", "step-12", "notes"):
        (tmp_path / name).mkdir()
    assert list(checkpoint_steps(tmp_path)) == [9, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"

"""What a checkpoint holds is the state at its step, and it has its name only when all of it is on disk."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import build, layout, run_values, write_run_files

SHARDED = {
    "run__dtype": "bf16", "optimizer__use_distributed_optimizer": True, "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "tp2_pp2": (4, layout(2, 2)),
    "dp2_bf16_overlapped": (2, layout(**SHARDED)),
    "dp2_distributed_optimizer": (2, layout(optimizer__use_distributed_optimizer=True)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"), tied=True)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    from megakd.torch_dist import TorchDistFolder

    folder = TorchDistFolder(path)
    return {key: folder.read(key, (0,) * len(folder.shape(key)), folder.shape(key)) for key in folder.keys}


def save_while_training(values: dict[str, Any], folder: Path, late: Path) -> dict[str, Any]:
    """The same step written at once and, three times over, in the background while training goes on."""
    from megakd.checkpoint import writer
    from megakd.training.export import parameters_gathered

    run = build(values)
    run.train(0, 2)
    run.save(folder, 2)
    checkpoints = run.checkpoints(late, in_background=True)
    write, may_write = writer._write, threading.Event()
    seen = {}

    def later(*arguments: Any) -> Any:
        assert may_write.wait(120)
        return write(*arguments)

    writer._write = later
    try:
        with parameters_gathered(run.student.model):
            assert checkpoints.save(run.record(2)) is None
        run.train(2, 4)
        seen["while writing"] = sorted(path.name for path in late.iterdir())
        seen["is_written"] = checkpoints.is_written
        may_write.set()
        assert checkpoints.finish() is None
        # The next ones use the memory of the first.
        for step in (4, 6):
            with parameters_gathered(run.student.model):
                assert checkpoints.save(run.record(step)) is None
            run.train(step, step + 2)
        assert checkpoints.finish() is None
    finally:
        writer._write = write
    run = build(values)
    run.load(folder)
    run.train(2, 6)
    run.save(folder, 6)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_in_the_background_is_the_state_at_its_step(
    files: Path, name: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = LAYOUTS[name]
    at_once, late = tmp_path / "at_once", tmp_path / "late"
    seen = run_ranks(world_size, save_while_training, run_values(files, **settings), at_once, late)
    assert all(each["while writing"] == ["step-00000002.partial"] for each in seen)
    assert not any(each["is_written"] for each in seen)
    for step in ("step-00000002", "step-00000006"):
        expected, found = tensors_of(at_once / step), tensors_of(late / step)
        assert expected.keys() == found.keys() and len(expected) > 10
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (step, key)


def save_many(values: dict[str, Any], folder: Path, kept: list[list[int]]) -> list[str]:
    run = build(values)
    checkpoints = run.checkpoints(folder, keep_last=2, in_background=True)
    for step in range(1, 6):
        assert checkpoints.save(run.record(step), kept) is None
    assert checkpoints.finish() is None
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("kept", "left"), [([], [4, 5]), ([[2]], [2, 4, 5]), ([[5]], [4, 5]), ([[9, 2, 1]], [2, 4, 5])]
)
def test_the_newest_and_the_best_are_kept(
    files: Path, tmp_path: Path, kept: list[list[int]], left: list[int], run_ranks: Callable[..., list[Any]]
) -> None:
    names = run_ranks(1, save_many, run_values(files), tmp_path, kept)[0]
    assert names == [f"step-{step:08d}" for step in left]


def save_over(values: dict[str, Any], folder: Path) -> list[Any]:
    """A step written twice has what the second save wrote."""
    run = build(values)
    run.train(0, 2)
    for mark in (1, 2):
        run.save(folder, 2, mark=mark)
    return [run.load(folder), sorted(path.name for path in folder.iterdir())]


def test_a_step_can_be_written_again(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, save_over, run_values(files), tmp_path) == [[{"mark": 2}, ["step-00000002"]]] * 2


def fill(values: dict[str, Any], folder: Path, in_background: bool) -> list[Any]:
    """Save until the disk is full, and once more; then with room again."""
    run = build(values)
    run.train(0, 1)
    checkpoints = run.checkpoints(folder, in_background=in_background)
    problems = []
    for step in (1, 2, 3):
        problems.append(checkpoints.save(run.record(step, mark=step)) or checkpoints.finish())
    left = sorted(path.name for path in folder.iterdir())
    mark = run.load(folder)["mark"]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "step-00000001").rename(folder.parent / "elsewhere")
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder.parent)], check=True)
    torch.distributed.barrier()
    problems.append(checkpoints.save(run.record(4, mark=4)) or checkpoints.finish())
    return [problems, left, mark, run.load(folder)["mark"]]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(
    files: Path, small_disk: Callable[[str], Path], in_background: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    for found in run_ranks(2, fill, run_values(files), small_disk("900k") / "checkpoints", in_background):
        (first, *full, last), left, mark, mark_then = found
        assert first is None and last is None
        assert len(full) == 2 and all("rank" in line and "No space left on device" in line for line in full)
        assert left == ["step-00000001"] and mark == 1 and mark_then == 4


def draw_after_loading(values: dict[str, Any], folder: Path) -> list[list[float]]:
    """What torch and megatron-core's tracker draw next: in the run that saved, and after loading."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draws() -> list[float]:
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(3).tolist()
        return torch.rand(3).tolist() + tracked

    run = build(values)
    run.train(0, 1)
    draws()
    run.save(folder, 1)
    following = draws()
    run = build(values)
    fresh = draws()
    run.load(folder)
    return [following, draws(), fresh]


def test_random_states_go_on(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    results = run_ranks(2, draw_after_loading, run_values(files, **layout(2)), tmp_path)
    for following, resumed, fresh in results:
        assert resumed == following != fresh
    assert results[0][0][3:] != results[1][0][3:]  # the ranks' own


def load_elsewhere(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = build(values)
    return run.load(folder)


def test_random_states_of_another_layout_are_left(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(2, draw_after_loading, run_values(files, **layout(2)), tmp_path)
    assert run_ranks(4, load_elsewhere, run_values(files, **layout(2, 2)), tmp_path) == [{}] * 4

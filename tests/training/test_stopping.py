"""What a full disk does to a run, as configured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from tests.training.interrupted import run_and_listen, run_distill
from tests.training.runs import records, run_values, write_run_files

STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


def values_of(files: Path, out: Path, **settings: Any) -> dict[str, Any]:
    fixed = {
        "run__output_dir": str(out / "run"), "run__export": False, "schedule__train_steps": STEPS,
        "checkpoint__save_interval": 2,
    }  # fmt: skip
    return run_values(files, **(fixed | settings))


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("in_background", [True, False])
def test_a_run_goes_on_without_checkpoints(
    files: Path, small_disk: Callable[[str], Path], in_background: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    disk = small_disk("1100k")  # for one checkpoint
    text, _ = run_ranks(2, run_and_listen, values_of(files, disk, checkpoint__async_save=in_background))
    assert text.count("a checkpoint could not be written (rank 0: No space left on device") == 3
    assert names(disk) == ["step-00000002"]
    small_disk("8m")
    assert [record["step"] for record in records(disk)] == list(range(1, STEPS + 1))
    run_ranks(2, run_distill, values_of(files, disk))
    assert names(disk)[-1] == "step-00000008"
    assert [record["step"] for record in records(disk)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_run_stops_where_that_is_configured(
    files: Path, small_disk: Callable[[str], Path], in_background: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    disk = small_disk("1100k")
    values = values_of(files, disk, checkpoint__async_save=in_background, checkpoint__on_write_error="stop")
    line = r"could not be written \(rank 0: No space left on device.*the same command goes on"
    with pytest.raises(UserError, match=line):
        run_ranks(2, run_distill, values)
    assert names(disk) == ["step-00000002"]
    small_disk("8m")
    run_ranks(2, run_distill, values)
    assert [record["step"] for record in records(disk)] == list(range(1, STEPS + 1))

"""Lines of a run are there once each, whatever became of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megakd.training.line_file import LineFile


def write(path: Path, step: int, steps: range) -> None:
    file = LineFile(path, step)
    for number in steps:
        file.append({"step": number})
    file.close()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step": 4}', "[1]\n", "\0\0\0\0"])
@pytest.mark.parametrize("resumed", [1, 3])
def test_what_is_later_or_cut_short_goes(tmp_path: Path, end: str, resumed: int) -> None:
    path = tmp_path / "lines"
    write(path, 0, range(1, 4))
    with path.open("a") as file:
        file.write(end)
    write(path, resumed, range(resumed + 1, 6))
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_run_from_the_start_begins_the_file_anew(tmp_path: Path) -> None:
    write(tmp_path / "lines", 0, range(4))
    write(tmp_path / "lines", 0, range(2))
    assert steps(tmp_path / "lines") == [0, 1]


def test_figures_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines", 0)
    file.append({"step": 1, "a": math.nan, "b": -math.inf, "c": 0.1, "d": None, "e": "text"})
    file.close()
    found = json.loads((tmp_path / "lines").read_text())
    assert found == {"step": 1, "a": None, "b": None, "c": 0.1, "d": None, "e": "text"}


def test_lines_wait_while_the_disk_is_full(small_disk: Callable[[str], Path], log_messages: list[str]) -> None:
    disk = small_disk("12k")
    file = LineFile(disk / "lines", 0)
    (disk / "ballast").write_bytes(b"x" * 4096)
    text = "x" * 1000
    for step in range(1, 16):
        file.append({"step": step, "text": text})
    lost = steps(disk / "lines")
    assert 0 < len(lost) < 15 and lost == list(range(1, len(lost) + 1))
    assert len(log_messages) == 1 and "cannot be written (No space left on device)" in log_messages[0]
    (disk / "ballast").unlink()
    small_disk("64k")
    file.append({"step": 16, "text": text})
    file.sync()
    assert steps(disk / "lines") == list(range(1, 17))
    file.close()


def test_lines_that_never_found_room_are_told(small_disk: Callable[[str], Path], log_messages: list[str]) -> None:
    disk = small_disk("12k")
    file = LineFile(disk / "lines", 0)
    for step in range(1, 16):
        file.append({"step": step, "text": "x" * 1000})
    file.close()
    assert "lacks its last" in log_messages[-1]

"""What a watchdog notices, and which rank is named."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from megakd.common import watchdog as module
from megakd.common.watchdog import HANG_STATUS, Hang, Watchdog, describe_hang, hang_file, load_hangs


def hang(rank: int, step: int, progress: int, phase: str = "computing") -> Hang:
    return Hang(rank, step, phase, progress, 30.0, "stacks")


def save(folder: Path, *hangs: Hang) -> None:
    for one in hangs:
        hang_file(folder, one.rank).write_text(json.dumps(vars(one)))


def test_the_rank_furthest_behind_comes_first(tmp_path: Path) -> None:
    save(tmp_path, hang(0, 7, 20), hang(1, 7, 19, "reading data"), hang(2, 8, 21))
    line = describe_hang(load_hangs(tmp_path), 3)
    assert line.startswith("rank 1 made no progress for 30 s in reading data of step 7; rank 0 ")
    assert "\n" not in line


def test_a_rank_without_a_record_is_the_one(tmp_path: Path) -> None:
    save(tmp_path, hang(0, 7, 20), hang(2, 7, 20))
    assert describe_hang(load_hangs(tmp_path), 4).startswith("rank 1, 3 gave no sign of life")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses that a watchdog ended the process with; no time is given to other ranks."""
    statuses: list[int] = []
    monkeypatch.setattr(module.os, "_exit", statuses.append)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    return statuses


def wait_for(statuses: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not statuses:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_without_progress_is_ended_with_its_stacks(
    tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    dog = Watchdog(tmp_path / "logs", 3, 0.2)
    dog.enter("reading data", 5)

    def waits_for_ever() -> None:
        wait_for(ended)

    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    wait_for(ended)
    thread.join()
    assert ended == [HANG_STATUS]
    (found,) = load_hangs(tmp_path / "logs")
    assert (found.rank, found.step, found.phase) == (3, 5, "reading data")
    assert "waits_for_ever" in found.stacks
    assert "rank 3 made no progress" in capfd.readouterr().err


def test_beats_and_phases_are_progress(tmp_path: Path, ended: list[int]) -> None:
    dog = Watchdog(tmp_path, 0, 0.5)
    for _ in dog.beats(range(20)):
        time.sleep(0.05)
    for step in range(20):
        time.sleep(0.05)
        dog.enter("computing", step)
    dog.close()
    assert ended == [] and load_hangs(tmp_path) == []


def test_without_a_timeout_nothing_is_ended(tmp_path: Path) -> None:
    before = threading.active_count()
    Watchdog(tmp_path, 0, None).enter("computing", 1)
    assert threading.active_count() == before


def test_a_new_watchdog_forgets_the_last_hang(tmp_path: Path) -> None:
    save(tmp_path, hang(0, 7, 20), hang(1, 7, 20))
    Watchdog(tmp_path, 0, None)
    assert [found.rank for found in load_hangs(tmp_path)] == [1]


def test_who_waits_for_others_ends_when_they_hang_and_is_named_last(tmp_path: Path, ended: list[int]) -> None:
    save(tmp_path, hang(1, 3, 2))  # of an earlier attempt
    old = time.time() - 100
    os.utime(hang_file(tmp_path, 1), (old, old))
    dog = Watchdog(tmp_path, 2, 0.2)
    dog.enter("waiting for the student", 7, waits=True)
    for _ in range(20):
        time.sleep(0.05)
        dog.beat()  # the others live
    assert ended == [], "it waits longer than the timeout"
    save(tmp_path, hang(0, 9, 40))
    wait_for(ended)
    found = load_hangs(tmp_path)
    assert [one.rank for one in found] == [1, 0, 2], "the one that waits comes last, whatever its step"
    assert found[-1].phase == "waiting for the student"
    dog.close()


def test_who_waits_for_others_that_give_no_sign_ends_too(tmp_path: Path, ended: list[int]) -> None:
    dog = Watchdog(tmp_path, 2, 0.2)
    dog.enter("waiting for the student", 7, waits=True)
    wait_for(ended)
    assert describe_hang(load_hangs(tmp_path), 3).startswith("rank 0, 1 gave no sign of life")
    dog.close()

"""Weights & Biases, offline and for real; whatever happens to it, the run goes on."""

from __future__ import annotations

import json
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.config.schema import WandbSection
from megakd.training import boards
from megakd.training.boards import WeightsAndBiases
from tests.training.interrupted import run_distill, run_until_stopped
from tests.training.runs import records, run_values, write_run_files

OFFLINE = {"project": "distillation", "mode": "offline", "tags": ["small"], "group": "tests"}


def stored(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB of pieces (4 bytes sum, 2 length, 1 kind)."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for record in stored(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.setdefault(record.history.step.num or row.get("_step", 0), {}).update(row)
    return found


def test_a_run_and_its_continuation_are_one_run(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    pytest.importorskip("wandb")
    values = run_values(
        write_run_files(tmp_path), run__name="wb", run__export=False, logging__wandb=OFFLINE, schedule__train_steps=4,
        data__valid=str(tmp_path / "data"), evaluation__at_end=True, evaluation__max_tokens=32,
    )  # fmt: skip
    assert run_ranks(1, run_until_stopped, values, 2, 0) == ["SIGUSR1"]
    assert run_ranks(1, run_distill, values) == [None]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    run_id = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    halves = [history(file) for file in files]
    assert [sorted(half) for half in halves] == [[1, 2], [3, 4]]
    logged = {record["step"]: record for record in records(tmp_path)}
    for half in halves:
        for step, row in half.items():
            assert row["train/loss"] == logged[step]["loss"]
            assert row["train/teacher_seconds"] > 0 and row["train/memory_bytes"] > 0
    assert halves[1][4]["held_out/cross_entropy"] > 0
    (described,) = [r.run for r in stored(files[0]) if r.WhichOneof("record_type") == "run"][:1]
    assert (described.project, described.display_name, described.run_group) == ("distillation", "wb", "tests")
    assert list(described.tags) == ["small"]
    settings = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert settings["optimizer"]["lr"] == values["optimizer"]["lr"]


class FakeRun:
    url = "https://wandb.example/run"

    def __init__(self, fails_in: str, release: threading.Event) -> None:
        self.fails_in, self.release = fails_in, release
        self.logged: list[int] = []

    def log(self, figures: dict[str, Any], step: int) -> None:
        if self.fails_in == "log":
            raise ConnectionError("no\nroute")
        self.logged.append(step)

    def finish(self) -> None:
        if self.fails_in == "finish":
            raise ConnectionError("no\nroute")
        if self.fails_in == "never finishes":
            self.release.wait(30)


@pytest.mark.parametrize("fails_in", ["import", "init", "log", "finish", "never finishes", "nothing"])
def test_its_failures_are_said_once_and_end_nothing(
    fails_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    release = threading.Event()
    run = FakeRun(fails_in, release)

    def init(**settings: Any) -> FakeRun:
        if fails_in == "init":
            raise ConnectionError("no\nroute")
        return run

    fake = SimpleNamespace(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", None if fails_in == "import" else fake)
    monkeypatch.setattr(boards, "_SECONDS_TO_FINISH", 0.05)
    board = WeightsAndBiases(tmp_path, WandbSection(project="p"), "name", {}, 0)
    for step in (1, 2, 3):
        board.add(step, {"train/loss": 1.0})
    board.close()
    release.set()
    assert run.logged == ([] if fails_in in ("import", "init", "log") else [1, 2, 3])
    warned = [message for message in log_messages if "gets no more figures" in message]
    assert len(warned) == (0 if fails_in == "nothing" else 1)
    assert all("\n" not in message for message in warned)
    if fails_in in ("init", "log", "finish"):
        assert "(ConnectionError: no route)" in warned[0]
    if fails_in not in ("import", "init"):
        assert any(FakeRun.url in message for message in log_messages)


def test_a_run_from_the_start_or_in_another_project_is_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    fake = SimpleNamespace(
        init=lambda **settings: ids.append(settings["id"]) or FakeRun("", threading.Event()),  # type: ignore[func-returns-value]
        Settings=lambda **settings: settings,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for project, step in (("p", 0), ("p", 4), ("p", 0), ("other", 4), ("other", 4)):
        WeightsAndBiases(tmp_path, WandbSection(project=project), "name", {}, step)
    assert ids[0] == ids[1] and ids[3] == ids[4] and len(set(ids)) == 3

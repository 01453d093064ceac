"""Records go to files once per step; ranks that are not the writer leave nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megakd.training.boards import TensorBoard
from megakd.training.metrics import MetricsWriter, describe_scores

SCORES = {
    "num_tokens": 1200, "cross_entropy": 2.0, "perplexity": math.exp(2.0), "kl_to_teacher": 0.5, "agreement": 0.75,
    "teacher_cross_entropy": 1.5,
}  # fmt: skip

ALONE = {**SCORES, "kl_to_teacher": None, "agreement": None, "teacher_cross_entropy": None}  # without a teacher


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "loss": 1.0 / step, "kd_loss": 0.5, "ce_loss": 0.25, "grad_norm": 1.0, "learning_rate": 1e-3,
        "tokens": 128 * step, "tokens_per_second": 1e3, "tflops_per_rank": 0.1, "teacher_share": 0.3,
        "step_seconds": 0.1, "peak_memory_bytes": 1,
    }  # fmt: skip


def open_writer(folder: Path, start: int = 0, *, is_writer: bool = True, board: bool = False) -> MetricsWriter:
    boards = [TensorBoard(folder, start)] if board and is_writer else []
    return MetricsWriter(folder, is_writer=is_writer, start_step=start, total_steps=9, log_interval=4, boards=boards)


def steps(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def write(folder: Path, start: int, stop: int) -> None:
    with open_writer(folder, start) as writer:
        for step in range(start + 1, stop + 1):
            writer.step(record(step))
            if step % 2 == 0:
                writer.evaluation(step, SCORES)
            if writer.is_told(step):
                writer.step_times({"step": step, "steps": 4, "rows": []})


@pytest.mark.parametrize(("resumed_at", "logged"), [(0, 6), (3, 6), (4, 6), (6, 6)])
def test_each_step_stands_once_after_resuming(tmp_path: Path, resumed_at: int, logged: int) -> None:
    write(tmp_path, 0, logged)
    write(tmp_path, resumed_at, 9)
    assert steps(tmp_path, "metrics.jsonl") == list(range(1, 10))
    assert steps(tmp_path, "evaluations.jsonl") == [2, 4, 6, 8]
    assert steps(tmp_path, "step_times.jsonl") == [1, 4, 8, 9]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    write(tmp_path, 3, 5)
    assert steps(tmp_path, "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_a_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.step(record(1))
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record(1)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_writer(tmp_path, is_writer=False, board=True) as writer:
        writer.step(record(1))
        writer.evaluation(1, SCORES)
    assert list(tmp_path.iterdir()) == []


def test_the_console_gets_the_first_the_last_and_every_nth_step(tmp_path: Path, log_messages: list[str]) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(1, 10):
            writer.step(record(step))
    assert [message.split()[1] for message in log_messages] == ["1/9", "4/9", "8/9", "9/9"]


def test_tensorboard_holds_every_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_writer(tmp_path, board=True) as writer:
        writer.step(record(1))
        writer.step(record(2))
        writer.evaluation(2, ALONE)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    figures = {f"train/{name}" for name in record(1) if name != "step"}
    figures |= {f"held_out/{name}" for name, value in ALONE.items() if value is not None}
    assert set(events.Tags()["scalars"]) == figures
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_scores_in_one_line() -> None:
    line = describe_scores(7, SCORES)
    assert line.startswith("held out after 7 steps (1,200 tokens): cross-entropy 2.0000, perplexity 7.39")
    assert "KL to teacher 0.5000" in line and "0.7500" in line and "1.5000" in line
    assert "teacher" not in describe_scores(7, ALONE)


def test_a_full_disk_ends_the_board_and_not_the_run(tmp_path: Path, log_messages: list[str]) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path, 0)
    board._writer.close()
    board._writer = Full()
    with MetricsWriter(tmp_path, is_writer=True, start_step=0, total_steps=9, log_interval=4, boards=[board]) as writer:
        writer.step(record(1))
        writer.step(record(2))
    assert steps(tmp_path, "metrics.jsonl") == [1, 2]
    told = [message for message in log_messages if "TensorBoard" in message]
    assert told == ["TensorBoard's events cannot be written (No space left on device); there are no more of them"]

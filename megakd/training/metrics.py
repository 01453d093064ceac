"""Where a run's figures go: console, progress bar, files of lines, boards. Only rank 0 writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megakd.common.logging import log
from megakd.training.boards import Board
from megakd.training.line_file import LineFile

METRICS, EVALUATIONS, STEP_TIMES = "metrics.jsonl", "evaluations.jsonl", "step_times.jsonl"


class MetricsWriter:
    """Writes one record per step and one per evaluation; on ranks other than 0 it does nothing.

    Args:
        folder: the run's folder; metrics.jsonl, evaluations.jsonl and step_times.jsonl are appended to.
        start_step: steps already done; records of later ones, from a run cut short, are dropped.
        boards: where the figures go as well.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_writer: bool,
        start_step: int,
        total_steps: int,
        log_interval: int,
        boards: Sequence[Board] = (),
    ) -> None:
        self._is_writer = is_writer
        self._log_interval, self._total = log_interval, total_steps
        self._boards = boards
        self._progress: Any = None
        if not is_writer:
            return
        self._metrics = LineFile(folder / METRICS, start_step)
        self._evaluations = LineFile(folder / EVALUATIONS, start_step)
        self._step_times = LineFile(folder / STEP_TIMES, start_step)
        if sys.stdout.isatty():
            self._progress = _progress_bar(total_steps, start_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_writer:
            return
        for file in (self._metrics, self._evaluations, self._step_times):
            file.close()
        for board in self._boards:
            board.close()
        if self._progress is not None:
            self._progress.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Write a training step's record; `step` counts from 1."""
        if not self._is_writer:
            return
        self._metrics.append(record)
        self._to_boards("train", record)
        step = record["step"]
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
        if self.is_told(step):
            log.info(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {record['loss']:.4f}  "
                f"kd {record['kd_loss']:.4f}  ce {record['ce_loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
                f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
                f"{record['tflops_per_rank']:.3f} TFLOP/s/rank  {_describe_teacher(record)}"
            )

    def is_told(self, step: int) -> bool:
        """Whether the console gets a line of this step."""
        return step % self._log_interval == 0 or step in (1, self._total)

    def step_times(self, line: dict[str, Any]) -> None:
        """Write where the time of the steps up to `step` went, by rank."""
        if self._is_writer:
            self._step_times.append(line)

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        """Write held-out scores after `step` steps."""
        if not self._is_writer:
            return
        self._evaluations.append({"step": step, **scores})
        self._to_boards("held_out", {"step": step, **scores})
        log.info(describe_scores(step, scores))

    def sync(self) -> None:
        """Make the records durable: a checkpoint that is to be named must not be ahead of them."""
        if self._is_writer:
            for file in (self._metrics, self._evaluations, self._step_times):
                file.sync()

    def _to_boards(self, prefix: str, record: dict[str, Any]) -> None:
        figures = {
            f"{prefix}/{key}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        }
        for board in self._boards:
            board.add(record["step"], figures)


def _describe_teacher(record: dict[str, Any]) -> str:
    """Where the teacher's time goes: into the step, or where it has ranks of its own, how long either side waits."""
    if "teacher_wait_share" not in record:
        return f"teacher {100 * record['teacher_share']:.0f} %"
    return (
        f"waiting: student {100 * record['student_wait_share']:.0f} %, "
        f"teacher {100 * record['teacher_wait_share']:.0f} %"
    )


def describe_scores(step: int, scores: dict[str, Any]) -> str:
    """Held-out scores after `step` steps, in one line."""
    line = f"held out after {step} steps ({scores['num_tokens']:,} tokens): cross-entropy {scores['cross_entropy']:.4f}"
    line += f", perplexity {scores['perplexity']:.2f}"
    if scores["kl_to_teacher"] is not None:
        line += f", KL to teacher {scores['kl_to_teacher']:.4f}, top-1 agreement {scores['agreement']:.4f}"
        line += f" (the teacher's cross-entropy {scores['teacher_cross_entropy']:.4f})"
    return line


def _progress_bar(total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), redirect_stdout=True
    )
    bar.add_task("training", total=total, completed=done)
    bar.start()
    return bar

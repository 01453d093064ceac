"""Where a run's figures go: console, progress bar, metrics.jsonl, TensorBoard. Only rank 0 writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megakd.common.logging import log
from megakd.training.line_file import LineFile


class MetricsWriter:
    """Writes one record per step and one per evaluation; on ranks other than 0 it does nothing.

    Args:
        folder: the run's folder; metrics.jsonl and evaluations.jsonl are appended to.
        start_step: steps already done; records of later ones, from a run cut short, are dropped.
    """

    def __init__(
        self, folder: Path, *, is_writer: bool, start_step: int, total_steps: int, log_interval: int, tensorboard: bool
    ) -> None:
        self._is_writer = is_writer
        self._log_interval, self._total = log_interval, total_steps
        self._progress: Any = None
        self._board: Any = None
        if not is_writer:
            return
        self._metrics = LineFile(folder / "metrics.jsonl", start_step)
        self._evaluations = LineFile(folder / "evaluations.jsonl", start_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if sys.stdout.isatty():
            self._progress = _progress_bar(total_steps, start_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_writer:
            return
        self._metrics.close()
        self._evaluations.close()
        self._on_board(lambda board: board.close())
        if self._progress is not None:
            self._progress.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Write a training step's record; `step` counts from 1."""
        if not self._is_writer:
            return
        self._metrics.append(record)
        self._to_board("train", record)
        step = record["step"]
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
        if step % self._log_interval == 0 or step in (1, self._total):
            log.info(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {record['loss']:.4f}  "
                f"kd {record['kd_loss']:.4f}  ce {record['ce_loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
                f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
                f"{record['tflops_per_rank']:.3f} TFLOP/s/rank  teacher {100 * record['teacher_share']:.0f} %"
            )

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        """Write held-out scores after `step` steps."""
        if not self._is_writer:
            return
        self._evaluations.append({"step": step, **scores})
        self._to_board("held_out", {"step": step, **scores})
        log.info(describe_scores(step, scores))

    def sync(self) -> None:
        """Make the records durable: a checkpoint that is to be named must not be ahead of them."""
        if self._is_writer:
            self._metrics.sync()
            self._evaluations.sync()

    def _to_board(self, prefix: str, record: dict[str, Any]) -> None:
        figures = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}

        def add(board: Any) -> None:
            for name, value in figures.items():
                board.add_scalar(f"{prefix}/{name}", value, record["step"])

        self._on_board(add)

    def _on_board(self, action: Callable[[Any], object]) -> None:
        """Do something with TensorBoard's writer, which a full disk ends; the figures are in metrics.jsonl too."""
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            self._board = None
            log.warning(f"TensorBoard's events cannot be written ({error.strerror}); there are no more of them")


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

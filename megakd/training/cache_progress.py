"""How far the writing of a cache is: a bar where somebody watches, a line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from megakd.data.progress import note

_LINE_SECONDS = 30.0


class CacheProgress:
    """Tokens, bytes per token and the time left, of one rank times `ranks`; says nothing where not `shown`.

    Args:
        total, done: samples of all ranks, and how many an earlier run wrote.
    """

    def __init__(self, *, total: int, done: int, ranks: int, shown: bool) -> None:
        self._total, self._done, self._ranks, self._shown = total, done, ranks, shown
        self._samples = self._rows = 0
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.add_task("", total=total, completed=done, figures="")

    def add(self, samples: int, rows: int, written: int) -> None:
        """Samples and stored positions of this rank since the last call; all its bytes."""
        self._samples += samples
        self._rows += rows
        if not self._shown or not self._rows:
            return
        now = time.monotonic()
        done = min(self._total, self._done + self._samples * self._ranks)
        figures = f"{self._rows * self._ranks:,} tokens, {written / self._rows:.1f} bytes per token"
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=done, figures=figures)
        elif now - self._said >= _LINE_SECONDS:
            self._said = now
            new = max(done - self._done, 1)
            left = duration((self._total - done) * (now - self._started) / new)
            rate = self._rows * self._ranks / max(now - self._started, 1e-6)
            note(f"{done:,} of {self._total:,} samples, {figures}, {rate:,.0f} tokens/s, {left} left")

    def __enter__(self) -> CacheProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds in words: 5 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"

"""What a run says on standard error while it works: notes, and a bar where somebody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


def note(line: str) -> None:
    """Print a line; above the bar where one is shown."""
    print(line, file=sys.stderr)


class InputBar:
    """A bar over the bytes of input, with the tokens per second; nothing where standard error is no terminal."""

    def __init__(self, total_bytes: int) -> None:
        self._bar: Any = None
        self._tokens = 0
        if total_bytes and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task("", total=total_bytes, rate=0.0)

    def update(self, position: int, tokens: int) -> None:
        """`position` in bytes of all input; `tokens` written since the last call."""
        if self._bar is not None:
            self._tokens += tokens
            task = self._bar.tasks[0]
            self._bar.update(task.id, completed=position, rate=self._tokens / max(task.elapsed or 0.0, 1e-3))

    def __enter__(self) -> InputBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

"""A file of JSON lines, one per step or evaluation, that survives kills, resuming and a full disk."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megakd.common.logging import log


class LineFile:
    """Appends records that have a `step`; what cannot be written waits for the next record.

    Args:
        path: gone on with; lines of steps after `step`, of a run cut short, are cut off, and all where `step` is 0.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_end_of(path, step) if step else 0)
        # Whole lines that end here are on disk; what a failed write left after them is cut off by the next one.
        self._end = os.fstat(self._file.fileno()).st_size
        self._waiting: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; figures that are not finite, which JSON has no word for, become null."""
        self._waiting.append(json.dumps(_finite(record), allow_nan=False).encode("ascii") + b"\n")
        self._write()

    def sync(self) -> None:
        """Make what was written durable, as far as the disk lets it."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.warning(f"{self._path} may not be on disk ({error.strerror})")

    def close(self) -> None:
        """Write what waits, and close."""
        self._write()
        if self._waiting:
            log.warning(f"{self._path} lacks its last {len(self._waiting)} lines")
        self._file.close()

    def _write(self) -> None:
        lines = b"".join(self._waiting)
        if not lines:
            return
        try:
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(28, "the disk is full")
        except OSError as error:
            self._file.truncate(self._end)
            if len(self._waiting) == 1:
                log.warning(f"{self._path} cannot be written ({error.strerror}); its lines wait in memory")
            return
        self._end += len(lines)
        self._waiting.clear()


def _end_of(path: Path, step: int) -> int:
    """Where the lines of steps up to `step` end: before the first line of a later one, or cut short."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    return end


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }

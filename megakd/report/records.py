"""Lines of a run's files, each checked before anything is made of it: one that is damaged costs no more than itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError
from megakd.common.step_parts import STEP_PARTS, seconds_key

Record = dict[str, Any]
Check = Callable[[Record], None]

# Beyond them sums and axes would leave what a float holds; no run comes near.
_MOST_STEPS, _MOST = 10**15, 1e100
_TOLD_LINES = 3

# Figures of a step that a report uses.
STEP_KEYS = (
    "loss", "kd_loss", "ce_loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "tflops_per_rank",
    "student_wait_share", "teacher_wait_share", "memory_bytes", "peak_memory_bytes", *map(seconds_key, STEP_PARTS),
)  # fmt: skip
# Figures of an evaluation, with their names for people.
SCORES = {
    "cross_entropy": "cross-entropy", "perplexity": "perplexity", "kl_to_teacher": "KL to teacher",
    "agreement": "agreement", "teacher_cross_entropy": "teacher's cross-entropy",
}  # fmt: skip
_SECONDS = frozenset(map(seconds_key, STEP_PARTS))


def read_records(path: Path, check: Check) -> tuple[list[Record], list[str]]:
    """A file's records, and a line of text on each that is passed over; of very many, on the first.

    A last line that is being written does not count. A file that is not there has none.

    Args:
        check: raises ValueError for a record with a value of a wrong kind; makes null of what is not finite.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.exists():
        return [], []
    *lines, _ = read_text(path).split("\n")
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_record(line, check))
        except ValueError as error:
            wrong.append((number, str(error)))
    told = [f"{path.name} line {number} is passed over: {reason}." for number, reason in wrong[:_TOLD_LINES]]
    if left := wrong[_TOLD_LINES:]:
        more = f"{len(left):,} more lines are" if len(left) > 1 else "1 more line is"
        told.append(f"{path.name}: {more} passed over, up to line {left[-1][0]:,}.")
    return found, told


def read_text(path: Path) -> str:
    """A file's text, whatever bytes are in it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); a report needs it.") from error


def check_step(record: Record) -> None:
    """A line of metrics.jsonl. Keys that a report does not draw may hold anything."""
    for key in STEP_KEYS:
        record[key] = _figure(key, record.get(key), least=0 if key in _SECONDS else -_MOST)


def check_evaluation(record: Record) -> None:
    """A line of evaluations.jsonl."""
    for key in SCORES:
        record[key] = _figure(key, record.get(key), least=-_MOST)


def check_step_times(record: Record) -> None:
    """A line of step_times.jsonl."""
    record["steps"] = _whole("steps", record.get("steps", 1), least=1)
    rows, layout = record.get("rows"), record.get("layout")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rows is {_shown(rows)}; it must be a list of ranks or stages")
    if layout is not None and not isinstance(layout, str):
        raise ValueError(f"layout is {_shown(layout)}; it must be text")
    for number, row in enumerate(rows):
        _check_row(f"rows[{number}]", row)


def _check_row(place: str, row: object) -> None:
    seconds = row.get("seconds") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(seconds, dict):
        raise ValueError(f"{place} has no seconds by part")
    for key in ("stage", "rank", "ranks"):
        if key in row:
            _whole(f"{place}.{key}", row[key], least=0)
    row["memory_bytes"] = _figure(f"{place}.memory_bytes", row.get("memory_bytes"), least=0)
    for part in STEP_PARTS:
        name = f"{place}.seconds.{part}"
        seconds[part] = _figure(name, seconds.get(part, 0.0), least=0)
        if seconds[part] is None:
            raise ValueError(f"{name} is null or not finite; it must be a number")


def _record(line: str, check: Check) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(record, dict):
        raise ValueError(f"it is {_shown(record)}; it must be an object")
    _whole("step", record.get("step"), least=0)
    check(record)
    return record


def _whole(name: str, value: object, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST_STEPS:
        raise ValueError(f"{name} is {_shown(value)}; it must be a whole number from {least} to {_MOST_STEPS:.0e}")
    return value


def _figure(name: str, value: object, *, least: float) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is {_shown(value)}; it must be a number or null")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not least <= value <= _MOST:
        raise ValueError(f"{name} is {_shown(value)}; it must be from {least:g} to {_MOST:g}")
    return value


def _shown(value: object) -> str:
    """A value in few words: it may be of any depth and length."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."

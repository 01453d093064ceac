"""Where the time of a run's steps went on each rank, or stage, over the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.common.step_parts import STEP_PARTS
from megakd.report.runs import RunData


@dataclass(frozen=True)
class RankTime:
    """Seconds a step by part, the mean over the run's steps, of one rank or of a stage's ranks; bytes at most."""

    place: str
    seconds: dict[str, float]
    memory_bytes: int | None

    @property
    def total(self) -> float:
        """A step's length."""
        return sum(self.seconds.values())


def rank_times(run: RunData) -> list[RankTime]:
    """By rank, in order; empty where the run has not written any.

    The first step, which also warms up, counts only where there is no other. Of a run that was resumed under another
    layout the newest layout counts.
    """
    lines = [line for line in run.step_times if _rows(line)]
    if not lines:
        return []
    places = [_place(row) for row in _rows(lines[-1])]
    alike = [line for line in lines if [_place(row) for row in _rows(line)] == places]
    warm = [line for line in alike if line["step"] > 1] or alike
    weights = [max(int(line.get("steps", 1)), 1) for line in warm]
    found = []
    for number, place in enumerate(places):
        rows = [_rows(line)[number] for line in warm]
        seconds = {
            part: sum(weight * float(row["seconds"].get(part, 0.0)) for weight, row in zip(weights, rows, strict=True))
            / sum(weights)
            for part in STEP_PARTS
        }
        memory = [int(row["memory_bytes"]) for row in rows if isinstance(row.get("memory_bytes"), int | float)]
        found.append(RankTime(place, seconds, max(memory, default=None)))
    return found


def mean_of(times: Sequence[RankTime]) -> dict[str, float]:
    """Seconds by part, the mean over ranks; stages have equally many."""
    return {part: sum(time.seconds[part] for time in times) / len(times) for part in STEP_PARTS}


def _rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = line.get("rows")
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("seconds"), dict)]


def _place(row: Mapping[str, Any]) -> str:
    if "rank" in row:
        return f"rank {row['rank']} · stage {row.get('stage', 0)}"
    return f"stage {row.get('stage', 0)} · {row.get('ranks', '?')} ranks"

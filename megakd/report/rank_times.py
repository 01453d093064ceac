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
    alike = _of_newest_layout(run.step_times)
    warm = [line for line in alike if line["step"] > 1] or alike
    if not warm:
        return []
    steps = sum(line["steps"] for line in warm)
    found = []
    for number, place in enumerate(_places(warm[-1])):
        rows = [line["rows"][number] for line in warm]
        seconds = {
            part: sum(line["steps"] * row["seconds"][part] for line, row in zip(warm, rows, strict=True)) / steps
            for part in STEP_PARTS
        }
        memory = [int(row["memory_bytes"]) for row in rows if row["memory_bytes"] is not None]
        found.append(RankTime(place, seconds, max(memory, default=None)))
    return found


def layout_note(run: RunData) -> str:
    """Which steps `rank_times` is of, where the run has had several layouts; else nothing."""
    alike = _of_newest_layout(run.step_times)
    left = sum(line["steps"] for line in run.step_times) - sum(line["steps"] for line in alike)
    if not left:
        return ""
    named = f"the newest layout, {alike[-1]['layout']}" if alike[-1].get("layout") else "the newest layout"
    return (
        f"Of {named}, up to step {alike[-1]['step']:,}; {left:,} step{'s' if left > 1 else ''} under another layout "
        f"{'are' if left > 1 else 'is'} not counted."
    )


def _of_newest_layout(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Ranks and stages are the same under many layouts; versions that did not write the layout have only them."""
    kinds = [(line.get("layout"), _places(line)) for line in lines]
    return [line for line, kind in zip(lines, kinds, strict=True) if kind == kinds[-1]]


def mean_of(times: Sequence[RankTime]) -> dict[str, float]:
    """Seconds by part, the mean over ranks; stages have equally many."""
    return {part: sum(time.seconds[part] for time in times) / len(times) for part in STEP_PARTS}


def _places(line: Mapping[str, Any]) -> list[str]:
    return [_place(row) for row in line["rows"]]


def _place(row: Mapping[str, Any]) -> str:
    if "rank" in row:
        return f"rank {row['rank']} · stage {row.get('stage', 0)}"
    return f"stage {row.get('stage', 0)} · {row.get('ranks', '?')} ranks"

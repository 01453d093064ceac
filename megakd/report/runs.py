"""What a run has written of itself, read back: also of one that is going on, was resumed, or is of another version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.config.yaml_text import parse_yaml
from megakd.report.records import STEP_KEYS, check_evaluation, check_step, check_step_times, read_records, read_text

Column = NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """A run as far as it has come.

    Attributes:
        label: its name, told apart from the other runs of a report.
        steps: [n] the steps that are recorded, ascending.
        columns: figures [n] by key of metrics.jsonl; not a number where a record has none.
        events: steps by what is marked in their record: skipped, loss_spike.
        config: sections of the resolved configuration; empty where there is none.
        description: run.json; empty where there is none.
        notes: what could not be read, for the reader.
    """

    folder: Path
    label: str
    steps: NDArray[np.int64]
    columns: dict[str, Column]
    events: dict[str, list[int]]
    evaluations: list[dict[str, Any]]
    step_times: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def column(self, key: str) -> Column | None:
        """Figures of that key, None where no step has one."""
        values = self.columns.get(key)
        return values if values is not None and np.isfinite(values).any() else None

    def last(self, key: str) -> float | None:
        """The newest figure of that key."""
        values = self.column(key)
        return None if values is None else float(values[np.isfinite(values)][-1])

    @property
    def planned_steps(self) -> int | None:
        """The step at which the run ends, where that is known."""
        steps = self.description.get("steps") or (self.config.get("schedule") or {}).get("train_steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def load_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs, each labelled with its name, and with its folder too where names are alike.

    Raises:
        UserError: a folder is no run's, is given twice, or has no metrics yet; a file cannot be read.
    """
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{folders[number]} is given twice. Name each run once.")
    described = [_describe(folder) for folder in folders]
    names = [_printable((config.get("run") or {}).get("name") or folder.name or folder)
             for folder, (config, _, _) in zip(folders, described, strict=True)]  # fmt: skip
    labels = [
        name if names.count(name) == 1 else f"{name} ({_printable(folder)})"
        for name, folder in zip(names, folders, strict=True)
    ]
    return [_load(folder, label, *found) for folder, label, found in zip(folders, labels, described, strict=True)]


def _printable(value: object) -> str:
    """A name for a page and a picture, which hold no halves of characters."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _describe(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(configuration, run.json, notes); the files may be missing or of another version."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}; give a run's folder (run.output_dir).")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        if (folder / "config.yaml").exists() or (folder / "run.json").exists():
            raise UserError(f"{folder} has no metrics yet. Wait for the run's first step.")
        raise UserError(f"{folder} is no run's folder: it has no metrics.jsonl. Give a folder that is run.output_dir.")
    notes: list[str] = []
    config, description = _mapping(folder / "config.yaml", notes), _mapping(folder / "run.json", notes)
    sections = {name: value for name, value in config.items() if value is None or isinstance(value, dict)}
    return sections, description, notes


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A YAML or JSON file that should hold a mapping."""
    if not path.exists():
        notes.append(f"There is no {path.name}.")
        return {}
    text = read_text(path)
    try:
        found = parse_yaml(text, str(path))  # JSON is YAML too
    except UserError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is damaged.")
        return {}
    return found


def _load(folder: Path, label: str, config: dict[str, Any], description: dict[str, Any], notes: list[str]) -> RunData:
    records, wrong = read_records(folder / "metrics.jsonl", check_step)
    if wrong and not records:
        raise UserError(f"{folder} has no metrics that can be used: {wrong[0]} Give the folder of another run.")
    if not records:
        raise UserError(f"{folder} has no metrics yet. Wait for the run's first step.")
    # Where a step was trained again, its newest record counts.
    by_step = {record["step"]: record for record in records}
    ordered = [by_step[step] for step in sorted(by_step)]
    # None becomes not a number.
    columns = {key: np.array([record[key] for record in ordered], dtype=np.float64) for key in STEP_KEYS}
    events = {
        event: [record["step"] for record in ordered if record.get(event) is True]
        for event in ("skipped", "loss_spike")
    }
    evaluations, wrong_evaluations = read_records(folder / "evaluations.jsonl", check_evaluation)
    step_times, wrong_times = read_records(folder / "step_times.jsonl", check_step_times)
    return RunData(
        folder,
        label,
        np.array(sorted(by_step), dtype=np.int64),
        columns,
        events,
        evaluations,
        step_times,
        config,
        description,
        [*notes, *wrong, *wrong_evaluations, *wrong_times],
    )

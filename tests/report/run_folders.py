"""Folders as runs leave them, without the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megakd.common.step_parts import STEP_PARTS, seconds_key

SECONDS = dict(zip(STEP_PARTS, (0.001, 0.2, 0.1, 0.05, 0.15, 0.04, 0.01, 0.002), strict=True))


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A step's record; a change to ... takes its key away."""
    record: dict[str, Any] = {
        "step": number, "loss": 2 + 1 / number, "kd_loss": 1 / number, "ce_loss": 3 + 1 / number, "grad_norm": 1.5,
        "learning_rate": 1e-3, "tokens": 100 * number, "tokens_per_second": 1000.0 + number, "tflops_per_rank": 0.5,
        "step_seconds": sum(SECONDS.values()), "memory_bytes": 3 * 2**30, "peak_memory_bytes": 4 * 2**30,
        "skipped_steps": 0, **{seconds_key(part): seconds for part, seconds in SECONDS.items()},
    }  # fmt: skip
    return {key: value for key, value in (record | changes).items() if value is not ...}


def evaluation(number: int, **changes: Any) -> dict[str, Any]:
    """An evaluation's record, better the later it is."""
    kl = 0.5 + 1 / (1 + number)
    return {
        "step": number, "num_tokens": 1000, "cross_entropy": 2 + kl, "perplexity": math.exp(2 + kl),
        "kl_to_teacher": kl, "agreement": 1 - kl / 2, "teacher_cross_entropy": 2.0, **changes,
    }  # fmt: skip


def times(number: int, steps: int = 1, ranks: int = 4, scale: float = 1.0, layout: str | None = None) -> dict[str, Any]:
    """A line of step_times.jsonl: two stages, a rank's time longer by its number; the layout where it is given."""
    rows = [
        {
            "stage": rank * 2 // ranks, "rank": rank, "memory_bytes": 2**30,
            "seconds": {part: scale * seconds * (1 + rank) for part, seconds in SECONDS.items()},
        }
        for rank in range(ranks)
    ]  # fmt: skip
    named = {} if layout is None else {"layout": layout}
    return {"step": number, "steps": steps, **named, "rows": rows}


def write_run(
    folder: Path,
    *,
    steps: list[dict[str, Any]] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
    step_times: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    end: str = "",
) -> Path:
    """A run's folder of 8 steps, or of what is given; `end` stands behind the last line of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(name: str, records: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    lines("metrics.jsonl", [step(n) for n in range(1, 9)] if steps is None else steps)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(end)
    lines("evaluations.jsonl", [evaluation(n) for n in (0, 4, 8)] if evaluations is None else evaluations)
    lines("step_times.jsonl", [times(1, scale=9.0), times(8, 7)] if step_times is None else step_times)
    settings = {
        "run": {"name": folder.name, "seed": 1}, "distill": {"kd_weight": 1.0, "ce_weight": 0.0},
        "data": {"train": [{"path": "data/train", "weight": None}]}, "evaluation": {"metric": None},
        "schedule": {"train_steps": 8},
    }  # fmt: skip
    for key, value in (config or {}).items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    # JSON is YAML too.
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "run.json").write_text(
        json.dumps({"name": folder.name, "world_size": 4, "layout": "TP 2 x PP 2 x DP 1", "steps": 8,
                    "python": "3.11.7", "packages": {"torch": "2.13.0"}, "git_revision": None})
    )  # fmt: skip
    return folder

"""The quickstart's configuration, data and caches, for benchmarks of caches in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure  # noqa: F401  puts the repository on the path

from megakd.config.load import load_config
from megakd.config.schema import Config
from megakd.report.quickstart import prepare_text

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
TEACHER = str(QUICKSTART / "teacher")
SAMPLED = {"cache.mode": "sampled", "cache.num_samples": 32}
TOPK = {"cache.mode": "topk", "cache.k": 32}
BUCKET = TOPK | {"cache.tail_samples": 0}


def quickstart_config(folder: Path, **settings: Any) -> Config:
    """The quickstart's run on one rank, with settings as section__key; its data is prepared where it is not there."""
    data = folder / "data"
    if not (data / "held_out.idx").exists():
        prepare_text(QUICKSTART, TEACHER, data)
    values: dict[str, Any] = {
        "teacher.path": TEACHER,
        "student.init.path": TEACHER,
        "data.train": str(data / "train"),
        "data.valid": str(data / "held_out"),
        "parallel.tensor_model_parallel_size": 1,
        "parallel.pipeline_model_parallel_size": 1,
        "parallel.num_layers_in_first_pipeline_stage": None,
        "checkpoint.resume": False,
        "evaluation.at_start": False,
        "evaluation.at_end": False,
        "logging.tensorboard": False,
        "run.export": False,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return load_config(QUICKSTART / "distill.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])

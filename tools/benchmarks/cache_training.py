"""Students trained from the teacher itself and from caches, and their KL to it on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from cache_runs import BUCKET, SAMPLED, TOPK, quickstart_config
from pair import platform

from megakd.platform import init_distributed
from megakd.teacher import cached
from megakd.training.caching import write_cache
from megakd.training.loop import distill, evaluate_run

STEPS = 200


def measure_training(folder: Path) -> None:
    """Print the held-out KL of each, and how far it is from online distillation's."""
    init_distributed(platform)
    course = {"schedule__train_steps": STEPS, "cache__scope": "run", "data__micro_batch_size": 16}
    online = _student(folder, "online", course)
    print(f"{'online':30}{online:10.4f}", flush=True)
    kinds: dict[str, tuple[dict[str, Any], str, str | None]] = {
        "sampled, N 32": (SAMPLED, "sampled", None),
        "topk, k 32, draws of the tail": (TOPK, "topk", None),
        "topk, k 32, tail as a bucket": (BUCKET, "bucket", None),
        "topk, k 32, renormalised": (BUCKET, "bucket", "renormalised"),
    }
    for name, (cache, cache_name, mode) in kinds.items():
        path = folder / "training" / f"cache-{cache_name}"
        settings = course | {key.replace(".", "__"): value for key, value in cache.items()} | {"cache__path": str(path)}
        if not (path / "manifest.json").exists():
            write_cache(quickstart_config(folder, **settings))
        with mock.patch.object(cached, "signal_mode", (lambda _, m=mode: m) if mode else cached.signal_mode):
            kl = _student(folder, name.replace(" ", "-").replace(",", ""), settings, path)
        print(f"{name:30}{kl:10.4f}{kl / online - 1:+9.2%}", flush=True)


def _student(folder: Path, name: str, settings: dict[str, Any], cache: Path | None = None) -> float:
    """Train, then measure with the teacher itself."""
    settings = settings | {"run__output_dir": str(folder / "training" / name), "logging__log_interval": 50}
    config = quickstart_config(folder, **settings)
    teacher = {} if cache is None else {"teacher__source": "cache", "teacher__path": str(cache)}
    distill(quickstart_config(folder, **settings, **teacher))
    resumed = config.checkpoint.model_copy(update={"resume": True})
    scores = evaluate_run(config.model_copy(update={"checkpoint": resumed}))
    assert scores is not None and scores.kl_to_teacher is not None
    return scores.kl_to_teacher

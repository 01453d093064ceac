"""What a run's folder says about the run: resolved configuration, versions, git revision."""

from __future__ import annotations

import json
import platform as python_platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from megakd.config.layouts import teacher_is_dedicated, teacher_layout_text, teacher_ranks
from megakd.config.load import dump_config
from megakd.config.schema import Config

CHECKPOINTS, LOGS = "checkpoints", "logs"
_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic",
             "transformer-engine", "triton")  # fmt: skip


def describe_run(config: Config, world_size: int, layout: str, steps: int) -> dict[str, Any]:
    """Versions, place and length of this run, for run.json."""
    return {
        "name": config.run.name,
        "world_size": world_size,
        "layout": layout,
        "teacher_layout": _teacher_layout(config, world_size),
        "steps": steps,
        "python": python_platform.python_version(),
        "machine": python_platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def save_run_description(folder: Path, config: Config, world_size: int, layout: str, steps: int) -> None:
    """Write config.yaml and run.json into the run's folder; `steps` is the step at which the run ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps(describe_run(config, world_size, layout, steps), indent=2) + "\n")


def _teacher_layout(config: Config, world_size: int) -> str | None:
    """The layout of a teacher that runs, and on how many ranks of its own if it has some."""
    if config.teacher is None or config.teacher.source != "online":
        return None
    own = f" on {teacher_ranks(config, world_size)} ranks of its own" if teacher_is_dedicated(config) else ""
    return teacher_layout_text(config, world_size) + own


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree, with -dirty for local changes; None outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None

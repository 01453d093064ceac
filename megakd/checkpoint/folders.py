"""A run's checkpoints as they lie on disk: `step-<8 digits>` each, complete once it has that name."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

_STEP_FOLDER = re.compile(r"step-(\d{8})")
# What a killed run leaves: checkpoints being written, and those being removed.
_REMAINS = re.compile(r"step-\d{8}\.(?:partial|removed)")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f"step-{step:08d}.partial"


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints under `folder` by step, ascending."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items()))


def remove_checkpoint(path: Path) -> None:
    """Take a checkpoint's name away first, then its files: what is killed meanwhile leaves no half of one."""
    removed = path.with_name(f"{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_remains(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _REMAINS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep_last: int | None, kept: Sequence[Sequence[int]]) -> None:
    """Remove all checkpoints but the newest `keep_last` (None: all) and, of each in `kept`, the first that exists."""
    steps = checkpoint_steps(folder)
    spared = {next((step for step in choice if step in steps), None) for choice in kept}
    for step, path in list(steps.items())[:-keep_last] if keep_last is not None else ():
        if step not in spared:
            remove_checkpoint(path)


def set_aside(path: Path, word: str) -> Path:
    """Rename `path` to the first free `<path>.<word>-<n>`, which is returned."""
    free = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{word}-{n}").exists())
    return path.rename(path.with_name(f"{path.name}.{word}-{free}"))

"""Folders as `datasets.save_to_disk` writes them: Arrow files, and JSON files that say which and in what order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
LARGEST = 1 << 26  # bytes, far above that of thousands of files; what is larger is data of such a name
# Under which names the versions of `datasets` kept the rows that a selection or a shuffle left, and their order.
_INDICES = ("_indices_data_files", "_indices_files")


def shards_of(folder: Path) -> list[Path] | None:
    """Return the Arrow files of a data set in their order; None where the folder is none.

    Raises UserError for a folder of several splits, for a file that is not there, and where the rows that count are not
    all of the files' rows in their order.
    """
    splits = _read(folder / SPLITS)
    names = splits.get("splits") if splits is not None else None
    if isinstance(names, list) and names:
        raise UserError(
            f"--input {folder} holds the splits {', '.join(map(str, names))} of a data set. Name one: --input "
            f"{folder / str(names[0])}"
        )
    state = _read(folder / STATE)
    files = None if state is None else _files(state)
    if state is None or files is None:
        return None
    _check_indices(folder, state)
    shards = [folder / name for name in files]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is not there, and {folder / STATE} names it. Copy the folder again, whole.")
    if not shards:
        raise UserError(f"{folder / STATE} names no file of data. Save the data set again, or leave the folder out.")
    return shards


def check_members(paths: Sequence[Path]) -> None:
    """Raise UserError where a file that is named by itself is of such a folder, and not a whole part of its data."""
    for folder, members in groupby(sorted(paths), lambda path: path.parent):
        names = [path.name for path in members]
        if SPLITS in names:
            shards_of(folder)  # which names the splits
        state = _read(folder / STATE)
        files = None if state is None else _files(state)
        if state is None or files is None:
            continue
        _check_indices(folder, state)
        others = set(names) - set(files)
        if others:
            raise UserError(
                f"{folder / min(others)} is not among the files of its data set ({STATE}). Name the folder: {folder}"
            )


def _check_indices(folder: Path, state: dict[str, Any]) -> None:
    if any(state.get(key) for key in _INDICES):
        raise UserError(
            f"{folder}: {STATE} lists the rows that a selection or shuffle left (_indices_data_files), which are not "
            "read. Save the data set again: datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(NEW)"
        )


def _files(state: dict[str, Any]) -> list[str] | None:
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        return None
    # What names no file names the folder, which is not there as a file.
    return [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in entries]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        is_small = path.is_file() and path.stat().st_size <= LARGEST
        found = json.loads(path.read_bytes()) if is_small else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

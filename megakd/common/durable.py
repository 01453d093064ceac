"""Files that are there whole or not at all, also after the machine loses power."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, *parts: bytes) -> None:
    """Write a file under another name, make it durable and give it its own; raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

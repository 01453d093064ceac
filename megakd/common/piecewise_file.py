"""Files of many gigabytes, written so that the kernel takes the least time for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 128 * 1024


class PiecewiseFile(io.FileIO):
    """A new file that hands the kernel pieces which end at multiples of 128 KiB, as cp does.

    For one write of megabytes Linux looks for large unbroken stretches of memory to cache it in, and on a virtual
    machine touches memory its host has yet to provide: several times the time of small pieces, which reuse what was
    freed last.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path), "wb")

    def write(self, data: Buffer) -> int:
        """Write all of it, as a buffered file does."""
        rest = memoryview(data).cast("B")
        total, position = len(rest), self.tell()
        while rest:
            written = super().write(rest[: PIECE_BYTES - position % PIECE_BYTES])
            position, rest = position + written, rest[written:]
        return total

"""Where the bytes of a tensor lie in a checkpoint's file."""

from __future__ import annotations

import io
import mmap
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

_LOCAL_HEADER_BYTES = 30


class MappedFiles:
    """Files of a checkpoint, mapped when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, file: str, offset: int, length: int) -> Tensor | None:
        """The tensor that torch.save wrote at `offset`, over the file's own bytes; None where it must be loaded.

        What is written into it stays in memory. Raises what a damaged file makes zipfile and torch raise.
        """
        mapped = self._map(file)
        record = io.BufferedReader(_Part(memoryview(mapped)[offset : offset + length]))
        # Sizes and strides, without the bytes.
        shape = torch.load(record, map_location="meta", weights_only=True)
        if not isinstance(shape, Tensor) or not shape.is_contiguous() or shape.storage_offset() or not shape.numel():
            return None
        with zipfile.ZipFile(record) as archive:
            root = archive.namelist()[0].split("/")[0]
            order, data = (archive.getinfo(f"{root}/{name}") for name in ("byteorder", "data/0"))
        start = _first_byte(mapped, offset, order)
        written_alike = mapped[start : start + order.file_size].decode() == sys.byteorder
        whole = data.compress_type == zipfile.ZIP_STORED and data.file_size == shape.nbytes
        start = _first_byte(mapped, offset, data)
        if not written_alike or not whole or start + shape.nbytes > offset + length:
            return None
        return torch.frombuffer(mapped, dtype=shape.dtype, count=shape.numel(), offset=start).view(shape.shape)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self._folder / file).open("rb") as stream:
                # Copied on write, since torch wants memory that can be written.
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _first_byte(mapped: mmap.mmap, offset: int, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: its local header ends with the lengths of its name and of what pads it."""
    start = offset + entry.header_offset
    header = mapped[start : start + _LOCAL_HEADER_BYTES]
    return start + len(header) + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Part(io.RawIOBase):
    """A part of mapped memory as a file."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._position = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._memory)}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self._memory[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

"""Where the bytes of a tensor lie in a checkpoint's file."""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

_LOCAL_HEADER_BYTES = 30
DAMAGES = (
    OSError, RuntimeError, EOFError, LookupError, AssertionError, ValueError, TypeError, AttributeError,
    pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What a damaged file makes zipfile and torch raise."""


class MappedFiles:
    """Files of a checkpoint, mapped when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, file: str, offset: int, length: int) -> Tensor:
        """The tensor that torch.save wrote at `offset`, over the file's own bytes where they lie as in memory.

        What is written into it stays in memory.

        Raises:
            DAMAGES: the file is missing or damaged, or holds something else there.
        """
        mapped = self._map(file)
        if offset + length > len(mapped):
            raise ValueError(f"{file} ends before it")
        memory = memoryview(mapped)[offset : offset + length]
        # Sizes and strides, without the bytes.
        shape = _load(memory, "meta")
        if shape.is_contiguous() and not shape.storage_offset() and shape.numel():
            with zipfile.ZipFile(_Part(memory)) as archive:
                root = archive.namelist()[0].split("/")[0]
                order, data = (archive.getinfo(f"{root}/{name}") for name in ("byteorder", "data/0"))
            start = _first_byte(mapped, offset, order)
            written_alike = mapped[start : start + order.file_size].decode() == sys.byteorder
            whole = data.compress_type == zipfile.ZIP_STORED and data.file_size == shape.nbytes
            start = _first_byte(mapped, offset, data)
            if written_alike and whole and start + shape.nbytes <= offset + length:
                return torch.frombuffer(mapped, dtype=shape.dtype, count=shape.numel(), offset=start).view(shape.shape)
        return _load(memory, "cpu")

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self._folder / file).open("rb") as stream:
                # Copied on write, since torch wants memory that can be written.
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _load(memory: memoryview, device: str) -> Tensor:
    value = torch.load(io.BufferedReader(_Part(memory)), map_location=device, weights_only=True)
    if not isinstance(value, Tensor):
        raise ValueError(f"it is a {type(value).__name__}, not a tensor")
    return value


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

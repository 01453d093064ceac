"""Shards: files of records, each written by one rank alone."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd.cache.layout import (
    END_MAGIC,
    ENTRY,
    FOOTER,
    HEADER,
    SHARD_MAGIC,
    Damage,
    pack_header,
    read_header,
)
from megakd.common.durable import sync_folder

SHARD_BYTES = 256 << 20
SHARD_SECONDS = 600.0
ALL, SOME = 0, 1
"""A record's first byte: every position of the sample is stored, or those alone that the bits after it say."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.bin"


def shard_number(name: str) -> int:
    """The number in a shard's file name."""
    return int(name.removeprefix("shard-").removesuffix(".bin"))


class ShardWriter:
    """Writes `PATH.partial` and, when closed, gives it its name; before that nobody takes it for a shard."""

    def __init__(self, path: Path, job: bytes) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._file = self._partial.open("wb")
        self._entries: list[tuple[int, ...]] = []
        self.size = self._file.write(pack_header(SHARD_MAGIC, job))

    def add(self, sample_id: int, token_hash: int, stored: NDArray[np.bool_], content: bytes) -> None:
        """Append a sample's record: which of its positions are stored, [S], and the codec's bytes of those rows."""
        rows = int(stored.sum())
        if rows == len(stored):
            record = bytes([ALL]) + content
        else:
            record = bytes([SOME]) + np.packbits(stored, bitorder="little").tobytes() + content
        entry = (sample_id, self.size, token_hash, len(record), rows, zlib.crc32(record), 0)
        self.size += self._file.write(record)
        self._entries.append(entry)

    def close(self) -> None:
        """Write the table, make everything durable, give the file its name."""
        table = np.array(self._entries, dtype=ENTRY).tobytes()
        footer = FOOTER.pack(len(self._entries), self.size, zlib.crc32(table), 0, END_MAGIC)
        begin, end = footer[:-12], footer[-8:]
        self._file.write(table + begin + zlib.crc32(begin).to_bytes(4, "little") + end)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        sync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardSeries:
    """The shards of one data-parallel rank: every `step`-th number from `first` on, each up to a size and an age.

    Several ranks write to one folder without a word to each other.
    """

    def __init__(
        self,
        folder: Path,
        job: bytes,
        first: int,
        step: int,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._job = folder, job
        self._next, self._step = first, step
        self._shard_bytes, self._shard_seconds, self._clock = shard_bytes, shard_seconds, clock
        self._shard: ShardWriter | None = None
        self._opened = 0.0
        self.written = 0  # bytes of records

    def add(self, sample_id: int, token_hash: int, stored: NDArray[np.bool_], content: bytes) -> None:
        """See ShardWriter.add."""
        if self._shard is None:
            self._shard = ShardWriter(self._folder / shard_name(self._next), self._job)
            self._opened, self._next = self._clock(), self._next + self._step
        before = self._shard.size
        self._shard.add(sample_id, token_hash, stored, content)
        self.written += self._shard.size - before
        if self._shard.size >= self._shard_bytes or self._clock() - self._opened >= self._shard_seconds:
            self.close()

    def close(self) -> None:
        """Finish the shard at hand."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def abort(self) -> None:
        """Drop the shard at hand."""
        if self._shard is not None:
            self._shard.abort()
            self._shard = None


def read_table(path: Path, job: bytes) -> NDArray[np.void]:
    """A shard's entries, ENTRY [samples], after checks of its header, size, footer and table.

    Raises:
        Damage: one does not hold.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        found, _, _ = read_header(file.read(HEADER.size), SHARD_MAGIC)
        if found != job:
            raise Damage("is of another cache")
        if size < HEADER.size + FOOTER.size:
            raise Damage(f"is cut short at {size} bytes")
        file.seek(size - FOOTER.size)
        footer = file.read(FOOTER.size)
        count, start, table_crc, crc, magic = FOOTER.unpack(footer)
        if magic != END_MAGIC or crc != zlib.crc32(footer[:-12]):
            raise Damage("is cut short, or damaged at its end")
        if start + count * ENTRY.itemsize + FOOTER.size != size:
            raise Damage(f"is {size} bytes and its footer speaks of {start + count * ENTRY.itemsize + FOOTER.size}")
        file.seek(start)
        table = file.read(count * ENTRY.itemsize)
    if zlib.crc32(table) != table_crc:
        raise Damage("is damaged in its table of samples")
    entries: NDArray[np.void] = np.frombuffer(table, dtype=ENTRY)
    ends = entries["offset"] + entries["length"]
    if count and (
        int(entries["offset"][0]) != HEADER.size or int(ends[-1]) != start or (ends[:-1] != entries["offset"][1:]).any()
    ):
        raise Damage("has a table of samples that does not fit its records")
    return entries


def stored_positions(record: memoryview, sequence_length: int, rows: int) -> tuple[NDArray[np.bool_], memoryview]:
    """Which of a sample's positions a record stores, [S], and the rest of it; raises ValueError."""
    flag = record[0] if len(record) else -1
    if flag == ALL:
        stored, start = np.ones(sequence_length, dtype=np.bool_), 1
    elif flag == SOME:
        start = 1 + -(-sequence_length // 8)
        bits = np.frombuffer(record[1:start], dtype=np.uint8)
        if len(bits) != start - 1:
            raise ValueError(f"{len(record)} bytes are too few")
        stored = np.unpackbits(bits, count=sequence_length, bitorder="little").view(np.bool_)
    else:
        raise ValueError(f"it begins with {flag}")
    if int(stored.sum()) != rows:
        raise ValueError(f"{int(stored.sum())} positions for {rows} rows")
    return stored, record[start:]

"""Reads records by sample id; what does not fit is an error that names shard and sample, never another row."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.cache.codec import Rows
from megakd.cache.layout import (
    COLUMNS,
    HEADER,
    INDEX_ENTRY_BYTES,
    INDEX_MAGIC,
    SHARD_MAGIC,
    Damage,
    job_id,
    read_header,
)
from megakd.cache.manifest import REMEDY, read_manifest
from megakd.cache.shards import stored_positions
from megakd.common.errors import UserError

INDEX = "index.bin"


@dataclass(frozen=True)
class CachedSample:
    """What is known of the teacher on one sample: at which positions, bool [S], and what, one row each."""

    stored: NDArray[np.bool_]
    rows: Rows


class Entry(NamedTuple):
    """Where a record lies and what it must be."""

    sample_id: int
    offset: int
    token_hash: int
    length: int
    rows: int
    crc32: int
    shard: int


class CacheReader:
    """A complete cache, memory-mapped.

    Raises:
        UserError: it is not complete or not one, a file is missing or has another size, or is of another cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        try:
            self._codec = self.manifest.codec
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.folder}: its mode is not known here ({error}). {REMEDY}") from error
        self._job = job_id(self.manifest.job)
        self._columns = self._open_index()
        self._shards: dict[int, mmap.mmap] = {}
        for shard in self.manifest.shards:
            self._check_size(shard.name, shard.bytes)
        ids = self._columns["sample_id"]
        self._is_dense = bool(len(ids)) and int(ids[0]) == 0 and int(ids[-1]) == len(ids) - 1

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def sample_ids(self) -> NDArray[np.uint64]:
        """Of all samples, ascending."""
        return self._columns["sample_id"]

    def contains(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these samples there are."""
        ids, wanted = self.sample_ids, sample_ids.astype(np.uint64)
        if self._is_dense or not len(ids):
            return wanted < len(ids)
        places = np.searchsorted(ids, wanted)
        found: NDArray[np.bool_] = ids[np.minimum(places, len(ids) - 1)] == wanted
        return found

    def entry(self, sample_id: int) -> Entry:
        """A sample's place; raises UserError where it has none."""
        ids = self.sample_ids
        place = sample_id if self._is_dense or sample_id < 0 else int(np.searchsorted(ids, np.uint64(sample_id)))
        if not 0 <= place < len(ids) or int(ids[place]) != sample_id:
            raise UserError(
                f"{self.folder} has no sample {sample_id}. Write a cache of the data and the split that this run has."
            )
        return Entry(*(int(self._columns[name][place]) for name, _ in COLUMNS))

    def read(self, sample_id: int, token_hash: int | None = None) -> CachedSample:
        """A sample's record; with `token_hash` (see `sample_hash`) only if it was made of that sample.

        Raises:
            UserError: the cache has no such sample, made it of other tokens, or is damaged there.
        """
        entry = self.entry(sample_id)
        if token_hash is not None and token_hash != entry.token_hash:
            raise UserError(
                f"{self._place(entry)} was made of other tokens, positions or documents than the run's sample "
                f"{sample_id} has. Write the cache again from this run's data."
            )
        try:
            record = self.record(entry)
            stored, content = stored_positions(record, self.manifest.sequence_length, entry.rows)
            return CachedSample(stored, self._codec.decode(content, entry.rows))
        except ValueError as error:
            raise UserError(f"{self._place(entry)} is damaged ({error}). {REMEDY}") from error

    def record(self, entry: Entry) -> memoryview:
        """The bytes of a record; raises ValueError where they are not those that were written."""
        if not 0 <= entry.shard < len(self.manifest.shards):
            raise ValueError(f"the index names shard {entry.shard} of {len(self.manifest.shards)}")
        if entry.shard not in self._shards:
            self._shards[entry.shard] = self._map_shard(entry.shard)
        data = memoryview(self._shards[entry.shard])[entry.offset : entry.offset + entry.length]
        if len(data) != entry.length or zlib.crc32(data) != entry.crc32:
            raise ValueError("its checksum is of other bytes")
        return data

    def check_index(self) -> None:
        """Hold the whole index against its checksum; raises UserError."""
        path = self.folder / INDEX
        state = 0
        with path.open("rb") as file:
            _, _, content = read_header(file.read(HEADER.size), INDEX_MAGIC)
            while block := file.read(1 << 22):
                state = zlib.crc32(block, state)
        if state != content:
            raise UserError(f"{path} is damaged. {REMEDY}")

    def _open_index(self) -> dict[str, NDArray[np.uint64]]:
        path, count = self.folder / INDEX, self.manifest.samples
        self._check_size(INDEX, HEADER.size + count * INDEX_ENTRY_BYTES)
        self._check_header(path, INDEX_MAGIC)
        if not count:
            return {name: np.empty(0, dtype=kind) for name, kind in COLUMNS}
        data = np.memmap(path, dtype=np.uint8, mode="r")
        columns, start = {}, HEADER.size
        for name, kind in COLUMNS:
            end = start + count * np.dtype(kind).itemsize
            columns[name] = data[start:end].view(kind)
            start = end
        return columns

    def _map_shard(self, number: int) -> mmap.mmap:
        path = self.folder / self.manifest.shards[number].name
        self._check_header(path, SHARD_MAGIC)
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). {REMEDY}") from error

    def _check_size(self, name: str, expected: int) -> None:
        path = self.folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); it is a part of the cache. {REMEDY}") from error
        if size != expected:
            raise UserError(f"{path} is {size} bytes; {expected} were written. {REMEDY}")

    def _check_header(self, path: Path, magic: bytes) -> None:
        try:
            with path.open("rb") as file:
                job, _, _ = read_header(file.read(HEADER.size), magic)
            if job != self._job:
                raise Damage("is of another cache")
        except Damage as error:
            raise UserError(f"{path} {error}. {REMEDY}") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). {REMEDY}") from error

    def _place(self, entry: Entry) -> str:
        shards = self.manifest.shards
        name = shards[entry.shard].name if 0 <= entry.shard < len(shards) else INDEX
        return f"{self.folder / name}: sample {entry.sample_id}"


def sample_hash(tokens: NDArray[np.int64], position_ids: NDArray[np.int64], segments: Sequence[int]) -> int:
    """64 bits of what the teacher saw of a sample.

    Args:
        tokens, position_ids: [S].
        segments: lengths of the stretches within which tokens attend to each other; they add up to S.
    """
    state = hashlib.blake2b(digest_size=8)
    for values in (tokens, position_ids, np.array(segments, dtype=np.int64)):
        state.update(values.astype("<u4").tobytes())
    return int.from_bytes(state.digest(), "little")

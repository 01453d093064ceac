"""The folder in which a cache grows: one job at a time, gone on with after an interruption, complete at the end."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.cache.layout import COLUMNS, ENTRY, INDEX_MAGIC, Damage, canonical_json, job_id, pack_header
from megakd.cache.manifest import MANIFEST, Manifest, ShardFile, write_manifest
from megakd.cache.reader import INDEX
from megakd.cache.shards import read_table, shard_number
from megakd.common.durable import write_durably
from megakd.common.errors import UserError
from megakd.common.locks import try_lock

JOB = "job.json"
LOCK = "megakd.lock"
TEACHER = "teacher"
"""Where the teacher's configuration and tokenizer lie."""


class CacheFolder:
    """A folder that this process holds for writing; close it at the end.

    Shards that an earlier run of the same job completed stay, and `done` are the samples in them, ascending; a shard
    that was being written is removed. The folder is a cache when `finish` has returned, and not before.

    Args:
        job: see Manifest; what must be equal to go on.
        overwrite: remove what is there, a complete cache or another job's.

    Raises:
        UserError: another process writes there, a complete cache is there, another job was begun there, a shard is
            damaged, or the folder holds something else.
        OSError: nothing can be written there.
    """

    def __init__(self, path: str | Path, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.job = Path(path), job
        self._job_id = job_id(job)
        self._tables: dict[str, NDArray[np.void]] = {}
        self._lock = _lock(self.path)
        try:
            self._take_over(overwrite)
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> NDArray[np.int64]:
        """Ids of the samples in the shards that were complete at the start, ascending."""
        parts = [table["sample_id"] for table in self._tables.values()]
        return np.sort(np.concatenate([np.empty(0, dtype=np.uint64), *parts])).astype(np.int64)

    @property
    def next_shard(self) -> int:
        """The first shard number that is free."""
        return max((shard_number(name) + 1 for name in self._tables), default=0)

    def finish(self, expected: NDArray[np.int64], notes: Mapping[str, Any]) -> Manifest:
        """Write the index and, last, the manifest.

        Args:
            expected: ids of the samples that the cache must hold, ascending.

        Raises:
            UserError: a shard is damaged, or holds other samples.
        """
        self._read_shards()
        names = sorted(self._tables)
        tables = [self._tables[name] for name in names]
        entries = np.concatenate([np.empty(0, dtype=ENTRY), *tables])
        shards = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(table) for table in tables])
        order = np.argsort(entries["sample_id"], kind="stable")
        entries, shards = entries[order], shards[order]
        _check_samples(self.path, entries["sample_id"].astype(np.int64), expected)
        columns = [(shards if name == "shard" else entries[name]).astype(kind).tobytes() for name, kind in COLUMNS]
        crc = 0
        for column in columns:
            crc = zlib.crc32(column, crc)
        header = pack_header(INDEX_MAGIC, self._job_id, len(entries), crc)
        write_durably(self.path / INDEX, header, *columns)
        files = tuple(_describe(self.path / name, table) for name, table in zip(names, tables, strict=True))
        size = sum(file.bytes for file in files) + (self.path / INDEX).stat().st_size
        manifest = Manifest(self.job, notes, len(entries), int(entries["rows"].sum()), size, files)
        write_manifest(self.path, manifest)
        (self.path / JOB).unlink(missing_ok=True)
        return manifest

    def close(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _take_over(self, overwrite: bool) -> None:
        found = {entry.name for entry in self.path.iterdir()} - {LOCK}
        foreign = sorted(name for name in found if not _is_ours(name))
        if foreign or (found and not found & {JOB, MANIFEST, f"{JOB}.partial"}):
            raise UserError(
                f"{self.path} holds {foreign[0] if foreign else min(found)}, which is not a teacher cache's. Choose "
                "another cache.path."
            )
        if overwrite:
            self._empty(found)
        elif MANIFEST in found:
            raise UserError(
                f"{self.path} is a complete cache. Train from it (teacher.source cache, teacher.path {self.path}), "
                "choose another cache.path, or write it anew with --overwrite."
            )
        elif JOB in found:
            self._check_job()
        for path in self.path.glob("*.partial"):
            path.unlink()
        if not (self.path / JOB).exists():
            write_durably(self.path / JOB, canonical_json(self.job) + b"\n")
        self._read_shards()

    def _check_job(self) -> None:
        path = self.path / JOB
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}). Remove {self.path}, or begin anew with --overwrite."
            ) from error
        difference = next(_differences(begun, json.loads(canonical_json(self.job))), None)
        if difference is not None:
            raise UserError(
                f"{self.path} was begun with another {difference}. Use the same settings and files to go on, choose "
                "another cache.path, or begin anew with --overwrite."
            )

    def _read_shards(self) -> None:
        for path in sorted(self.path.glob("shard-*.bin")):
            if path.name in self._tables:
                continue
            try:
                self._tables[path.name] = read_table(path, self._job_id)
            except Damage as error:
                raise UserError(f"{path} {error}. Remove it: the command writes what was in it again.") from error

    def _empty(self, names: set[str]) -> None:
        # Without its manifest it is no cache, whatever else is left.
        for name in sorted(names, key=lambda name: name != MANIFEST):
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _lock(path: Path) -> int | None:
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"{path} is a file; a cache is a folder. Choose another cache.path.") from error
        lock = try_lock(path / LOCK, f"another process is writing {path}. Wait for it, or choose another cache.path.")
        if lock is not None:
            return lock


def _is_ours(name: str) -> bool:
    if name in (JOB, MANIFEST, INDEX, TEACHER):
        return True
    if name.endswith(".partial"):
        return _is_ours(name.removesuffix(".partial"))
    return name.startswith("shard-") and name.endswith(".bin") and name[6:-4].isdigit()


def _differences(begun: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(begun, dict) and isinstance(wanted, dict):
        for key in sorted({*begun, *wanted}):
            yield from _differences(begun.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif begun != wanted:
        yield f"{name} ({_short(begun)} there, {_short(wanted)} now)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_samples(folder: Path, found: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
    twice = found[1:][found[1:] == found[:-1]]
    for name, ids in (
        ("twice", twice),
        ("not at all", np.setdiff1d(expected, found)),
        ("though it is not of the data", np.setdiff1d(found, expected)),
    ):
        if len(ids):
            raise UserError(
                f"{folder} holds sample {int(ids[0])} {name} ({len(ids)} such). Begin anew with --overwrite."
            )


def _describe(path: Path, table: NDArray[np.void]) -> ShardFile:
    return ShardFile(path.name, path.stat().st_size, len(table), zlib.crc32(table.tobytes()))

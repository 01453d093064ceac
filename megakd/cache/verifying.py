"""Reads every record of a cache and tells what is wrong with it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from megakd.cache.layout import Damage, job_id
from megakd.cache.reader import CacheReader
from megakd.cache.shards import read_table
from megakd.common.errors import UserError


def find_faults(reader: CacheReader) -> Iterator[str]:
    """Yield a line for everything that is wrong with a cache: its index, its shards, each of its records."""
    try:
        reader.check_index()
    except (UserError, Damage) as error:
        yield str(error)
    job = job_id(reader.manifest.job)
    for shard in reader.manifest.shards:
        path = reader.folder / shard.name
        try:
            table = read_table(path, job)
            if len(table) != shard.samples or zlib.crc32(table.tobytes()) != shard.table_crc32:
                yield f"{path} is not the shard that the manifest speaks of."
        except (Damage, OSError) as error:
            yield f"{path} {error}."
    for sample_id in reader.sample_ids.tolist():
        try:
            reader.read(sample_id)
        except UserError as error:
            yield str(error)

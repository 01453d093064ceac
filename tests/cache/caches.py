"""Small caches whose every record is known."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from megakd.cache import layout, manifest
from megakd.cache.folder import CacheFolder
from megakd.cache.layout import job_id
from megakd.cache.reader import sample_hash
from megakd.cache.sampled import SampledCodec
from megakd.cache.shards import ShardSeries, ShardWriter

LENGTH, VOCAB, DRAWS = 12, 50, 4
CODEC = SampledCodec(VOCAB, DRAWS)
JOB: dict[str, Any] = {"codec": CODEC.settings(), "sequence_length": LENGTH, "temperature": 1.0, "seed": 3}
NOTES = {"teacher": "somewhere"}


def tokens(sample_id: int) -> Any:
    return np.random.default_rng([7, sample_id]).integers(0, VOCAB, LENGTH)


def token_hash(sample_id: int) -> int:
    return sample_hash(tokens(sample_id), np.arange(LENGTH), [LENGTH])


def stored(sample_id: int) -> Any:
    """Every third sample stores all of its positions, some store none."""
    if sample_id % 3 == 0:
        return np.ones(LENGTH, dtype=bool)
    return np.random.default_rng([8, sample_id]).random(LENGTH) < (sample_id % 3 - 1) * 0.6


def rows(sample_id: int) -> tuple[Any, Any]:
    random = np.random.default_rng([9, sample_id])
    count = int(stored(sample_id).sum())
    return np.sort(random.integers(0, VOCAB, (count, DRAWS)), axis=1), random.random(count)


def add(series: Any, sample_id: int) -> None:
    series.add(sample_id, token_hash(sample_id), stored(sample_id), CODEC.encode(*rows(sample_id)))


def write(path: Path, ids: list[int], *, ranks: int = 1, shard_bytes: int = 200, **options: Any) -> manifest.Manifest:
    """Write a cache as its ranks do, one after another, going on where an earlier call was ended."""
    folder = CacheFolder(path, JOB, **options)
    try:
        todo = np.setdiff1d(ids, folder.done)
        first = folder.next_shard
        for rank in range(ranks):
            series = ShardSeries(path, job_id(JOB), first + rank, ranks, shard_bytes=shard_bytes)
            for sample_id in todo[rank::ranks].tolist():
                add(series, sample_id)
            series.close()
        return folder.finish(np.array(sorted(ids)), NOTES)
    finally:
        folder.close()


OWNERS: dict[str, Any] = {"shard": ShardWriter, "folder": CacheFolder, "layout": layout, "manifest": manifest, "os": os}


def write_and_die(path: Path, ids: list[int], step: str) -> None:
    """In a process of its own: `step` is "owner name n", the call at which the process is killed."""
    owner, name, count = step.split()
    original = getattr(OWNERS[owner], name)
    left = [int(count)]

    def counted(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(OWNERS[owner], name, counted)
    write(path, ids)

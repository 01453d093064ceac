"""A cache is complete or no cache: interruptions, other jobs, other writers, a full disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.cache.folder import CacheFolder
from megakd.cache.layout import job_id
from megakd.cache.manifest import MANIFEST
from megakd.cache.reader import CacheReader
from megakd.cache.shards import ShardSeries, ShardWriter
from megakd.common.errors import UserError
from tests.cache.caches import DRAWS, JOB, LENGTH, add, rows, stored, token_hash, write, write_and_die

IDS = [0, 1, 2, 3, 4, 6, 7, 9, 14, 30, 31, 32]


def check(path: Path, ids: list[int]) -> None:
    """Every record is what was written, and there is no other."""
    reader = CacheReader(path)
    assert reader.sample_ids.tolist() == sorted(ids)
    for sample_id in ids:
        sample = reader.read(sample_id, token_hash(sample_id))
        assert np.array_equal(sample.stored, stored(sample_id))
        drawn, entropy = rows(sample_id)
        for row, found, p in zip(drawn, sample.rows.ids, sample.rows.probabilities, strict=True):
            values, counts = np.unique(row, return_counts=True)
            assert found[found >= 0].tolist() == values.tolist()
            assert (p[found >= 0] * DRAWS).tolist() == counts.tolist()
        assert sample.rows.entropy is not None
        np.testing.assert_allclose(sample.rows.entropy, entropy, rtol=1e-3)


@pytest.mark.parametrize("ids", [IDS, list(range(20)), [5], [1 << 40, 3]])
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, ids: list[int], ranks: int) -> None:
    manifest = write(tmp_path / "c", ids, ranks=ranks)
    check(tmp_path / "c", ids)
    assert manifest == CacheReader(tmp_path / "c").manifest
    assert manifest.samples == len(ids) and manifest.rows == sum(int(stored(i).sum()) for i in ids)
    files = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir()}
    assert set(files) == {"index.bin", "manifest.json", *(shard.name for shard in manifest.shards)}
    assert manifest.bytes == sum(files.values()) - files["manifest.json"]


def test_a_cache_of_nothing_is_a_cache(tmp_path: Path) -> None:
    write(tmp_path / "c", [])
    reader = CacheReader(tmp_path / "c")
    assert len(reader) == 0 and not reader.contains(np.array([0, 3])).any()


KILLED = [
    *(f"shard add {n}" for n in (0, 1, 5, 11)),
    *(f"shard close {n}" for n in (0, 1, 2)),
    *(f"os fsync {n}" for n in range(9)),
    "folder finish 0",
    "folder _read_shards 1",
    "manifest write_durably 0",
    "folder close 0",
]


@pytest.mark.parametrize("step", KILLED)
def test_a_killed_writer_leaves_no_cache_and_the_next_goes_on(tmp_path: Path, step: str) -> None:
    path, whole = tmp_path / "c", tmp_path / "whole"
    write(whole, IDS)
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path, IDS, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    complete = {p.name: p.read_bytes() for p in path.glob("shard-*.bin")}
    if (path / MANIFEST).exists():
        assert step == "folder close 0"
        check(path, IDS)
        return
    with pytest.raises(UserError, match=r"is no teacher cache: manifest.json does not exist"):
        CacheReader(path)
    write(path, IDS, ranks=2)
    check(path, IDS)
    for name, content in complete.items():
        assert (path / name).read_bytes() == content  # what was complete was not written again


def test_an_interrupted_cache_that_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    path, whole = tmp_path / "c", tmp_path / "whole"
    write(whole, IDS)
    write_in_part(path, 5)
    write(path, IDS)
    for name in ("manifest.json", "index.bin"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()


def write_in_part(path: Path, count: int) -> None:
    """As a killed run leaves it: some shards complete, one begun, the lock free."""
    folder = CacheFolder(path, JOB)
    series = ShardSeries(path, job_id(JOB), 0, 1, shard_bytes=200)
    for sample_id in IDS[:count]:
        add(series, sample_id)
    if series._shard is not None:
        series._shard._file.flush()
    assert folder._lock is not None
    os.close(folder._lock)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "c", JOB)
    with pytest.raises(UserError, match="another process is writing .*Wait for it, or choose another cache.path"):
        CacheFolder(tmp_path / "c", JOB, overwrite=True)
    folder.close()
    write(tmp_path / "c", IDS)


def test_another_job_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_in_part(path, 5)
    other = {**JOB, "codec": {**JOB["codec"], "num_samples": 8}}
    with pytest.raises(UserError, match=r"was begun with another codec.num_samples \(4 there, 8 now\)"):
        CacheFolder(path, other)
    folder = CacheFolder(path, other, overwrite=True)
    assert not len(folder.done) and not list(path.glob("shard-*"))
    folder.close()


def test_a_complete_cache_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, IDS)
    with pytest.raises(UserError, match=r"is a complete cache. Train from it \(teacher.source cache.*--overwrite"):
        write(path, IDS)
    check(path, IDS)
    write(path, [1, 2], overwrite=True)
    check(path, [1, 2])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds notes.txt, which is not a teacher cache's"):
            CacheFolder(tmp_path, JOB, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file; a cache is a folder"):
        CacheFolder(tmp_path / "notes.txt", JOB)


@pytest.mark.parametrize("place", ["header", "record", "table", "footer", "cut", "empty"])
def test_a_damaged_shard_is_not_gone_on_from(tmp_path: Path, place: str) -> None:
    path = tmp_path / "c"
    write_in_part(path, 8)
    shard = min(path.glob("shard-*.bin"))
    content = bytearray(shard.read_bytes())
    if place == "cut":
        shard.write_bytes(content[:-1])
    elif place == "empty":
        shard.write_bytes(b"")
    elif place != "record":
        content[{"header": 20, "table": -50, "footer": -20}[place]] ^= 1
        shard.write_bytes(content)
    if place == "record":  # found when it is read; the writer does not read every record again
        return
    with pytest.raises(UserError, match=rf"{shard.name} .*Remove it: the command writes what was in it again"):
        CacheFolder(path, JOB)
    shard.unlink()
    write(path, IDS)
    check(path, IDS)


def test_missing_foreign_and_repeated_samples_are_no_cache(tmp_path: Path) -> None:
    def finish(ids: list[int], expected: list[int], message: str) -> None:
        folder = CacheFolder(tmp_path / "c", JOB, overwrite=True)
        series = ShardSeries(tmp_path / "c", job_id(JOB), 0, 1)
        for sample_id in ids:
            add(series, sample_id)
        series.close()
        with pytest.raises(UserError, match=message):
            folder.finish(np.array(expected), {})
        folder.close()
        assert not (tmp_path / "c" / MANIFEST).exists()

    finish([1, 2, 2], [1, 2], "holds sample 2 twice")
    finish([1, 3], [1, 2, 3], "holds sample 2 not at all")
    finish([1, 2, 3], [1, 3], "holds sample 2 though it is not of the data")


def test_a_full_disk_leaves_the_complete_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    original, left = ShardWriter.close, [2]

    def close(self: ShardWriter) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", close)
        with pytest.raises(OSError, match="No space left"):
            write(path, IDS)
    assert len(list(path.glob("shard-*.bin"))) == 2 and not (path / MANIFEST).exists()
    write(path, IDS)
    check(path, IDS)


def test_shards_end_by_size_and_by_age(tmp_path: Path) -> None:
    now = [0.0]
    folder = CacheFolder(tmp_path / "c", JOB)
    series = ShardSeries(tmp_path / "c", job_id(JOB), 4, 3, shard_seconds=10, clock=lambda: now[0])
    for seconds, sample_id in ((0, 1), (5, 2), (10, 3), (11, 4), (40, 6)):
        now[0] = float(seconds)
        add(series, sample_id)
    series.close()
    folder.close()
    sizes = {p.name: len(CacheFolder_entries(p)) for p in sorted((tmp_path / "c").glob("shard-*.bin"))}
    assert sizes == {"shard-000004.bin": 3, "shard-000007.bin": 2}


def CacheFolder_entries(path: Path) -> Any:
    from megakd.cache.shards import read_table

    return read_table(path, job_id(JOB))


def test_a_sample_of_no_positions(tmp_path: Path) -> None:
    assert not stored(1).any()
    write(tmp_path / "c", [1])
    sample = CacheReader(tmp_path / "c").read(1)
    assert sample.stored.shape == (LENGTH,) and sample.rows.ids.shape[0] == 0

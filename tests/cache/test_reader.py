"""What is read is what was written of that very sample, or an error that names the place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.cache import layout
from megakd.cache.manifest import read_manifest
from megakd.cache.reader import CacheReader, sample_hash
from megakd.cache.verifying import find_faults
from megakd.common.errors import UserError
from tests.cache.caches import JOB, LENGTH, rows, stored, token_hash, tokens, write

IDS = [0, 1, 2, 3, 4, 6, 7, 9, 14, 30]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "c"
    write(path, IDS, ranks=2)
    return path


def test_another_sample_s_tokens_are_refused(cache: Path) -> None:
    reader = CacheReader(cache)
    with pytest.raises(UserError, match=r"shard-\d{6}.bin: sample 4 was made of other tokens.*Write the cache again"):
        reader.read(4, token_hash(3))


@pytest.mark.parametrize("missing", [5, 31, -1, 1 << 50])
def test_a_missing_sample_is_named(cache: Path, missing: int) -> None:
    with pytest.raises(UserError, match=f"has no sample {missing}"):
        CacheReader(cache).read(missing)


def test_which_samples_there_are(cache: Path, tmp_path: Path) -> None:
    asked = np.arange(40)
    assert np.flatnonzero(CacheReader(cache).contains(asked)).tolist() == IDS
    write(tmp_path / "dense", list(range(7)))
    assert np.flatnonzero(CacheReader(tmp_path / "dense").contains(asked)).tolist() == list(range(7))


def test_the_hash_is_of_tokens_positions_and_documents() -> None:
    plain = sample_hash(tokens(1), np.arange(LENGTH), [LENGTH])
    assert plain == sample_hash(tokens(1).astype(np.int32), np.arange(LENGTH), (LENGTH,))
    assert plain != sample_hash(tokens(2), np.arange(LENGTH), [LENGTH])
    assert plain != sample_hash(tokens(1), np.arange(LENGTH) % 5, [LENGTH])
    assert plain != sample_hash(tokens(1), np.arange(LENGTH), [5, LENGTH - 5])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_no_change_of_any_byte_gives_another_row(cache: Path, tmp_path: Path, data: st.DataObject) -> None:
    names = sorted(path.name for path in cache.iterdir())
    name = data.draw(st.sampled_from(names))
    content = bytearray((cache / name).read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, 8 * len(content) - 1))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for other in names:
        (copy / other).write_bytes((cache / other).read_bytes())
    (copy / name).write_bytes(content)
    try:
        reader = CacheReader(copy)
    except UserError as error:
        assert str(copy) in str(error)
        return
    for sample_id in IDS:
        try:
            sample = reader.read(sample_id, token_hash(sample_id))
        except UserError as error:
            assert f"sample {sample_id}" in str(error) or "shard-" in str(error)
            continue
        assert np.array_equal(sample.stored, stored(sample_id))
        drawn, _ = rows(sample_id)
        for row, found in zip(drawn, sample.rows.ids, strict=True):
            assert found[found >= 0].tolist() == np.unique(row).tolist()
    assert list(find_faults(reader)), "verify finds what reading may pass over"


def test_verify_finds_nothing_wrong_where_nothing_is(cache: Path) -> None:
    assert list(find_faults(CacheReader(cache))) == []


def test_what_is_missing_or_no_cache(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give the folder of a teacher cache"):
        CacheReader(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no teacher cache: manifest.json does not exist"):
        CacheReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not the manifest of a teacher cache"):
        CacheReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        CacheReader(tmp_path)
    (tmp_path / "manifest.json").write_bytes((cache / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"index.bin cannot be read.*it is a part of the cache"):
        CacheReader(tmp_path)


def test_another_version_and_an_edited_manifest(cache: Path, tmp_path: Path) -> None:
    values = json.loads((cache / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(UserError, match="has format version 2; this version of megakd reads 1"):
        read_manifest(tmp_path)
    values["job"]["temperature"] = 2.0
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="is damaged: its checksum is of other contents"):
        read_manifest(tmp_path)


def test_a_shard_of_another_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    monkeypatch.setitem(JOB, "seed", 4)
    write(other, IDS, ranks=2)
    monkeypatch.undo()
    shard = read_manifest(cache).shards[0].name
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in cache.iterdir():
        (mixed / path.name).write_bytes(((other if path.name == shard else cache) / path.name).read_bytes())
    reader = CacheReader(mixed)
    entry = next(reader.entry(i) for i in IDS if reader.entry(i).shard == 0)
    with pytest.raises(UserError, match=rf"{shard} is of another cache"):
        reader.read(entry.sample_id)


def test_a_program_of_its_own_can_read_it(cache: Path) -> None:
    """From the description of the format alone: the index's columns, a record's bytes."""
    data = (cache / "index.bin").read_bytes()
    assert data[:8] == b"MKDINDEX" and layout.HEADER.size == 64
    count = int.from_bytes(data[32:40], "little")
    assert count == len(IDS)
    ids = [int.from_bytes(data[64 + 8 * i : 72 + 8 * i], "little") for i in range(count)]
    assert ids == IDS
    lengths_at = 64 + 24 * count
    for place in range(count):
        offset = int.from_bytes(data[64 + 8 * (count + place) :][:8], "little")
        length = int.from_bytes(data[lengths_at + 4 * place :][:4], "little")
        shard = int.from_bytes(data[lengths_at + 4 * (3 * count + place) :][:4], "little")
        names = [entry["name"] for entry in json.loads((cache / "manifest.json").read_text())["shards"]]
        record = (cache / names[shard]).read_bytes()[offset : offset + length]
        assert record[0] == (0 if stored(IDS[place]).all() else 1)

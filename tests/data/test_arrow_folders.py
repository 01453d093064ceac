"""Folders as `datasets.save_to_disk` writes them: all their rows in their order, and nothing else that lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from megakd.common.errors import UserError
from megakd.data.records import Item, Problem
from megakd.data.sources import Position, file_sources


def save(folder: Path, shards: list[list[str]], **state: Any) -> Path:
    """Write the files that `datasets` 3 writes, without it: streams of Arrow, state.json and dataset_info.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    features = {"text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([("text", pyarrow.string())], metadata=metadata)
    for name, texts in zip(names, shards, strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), schema) as writer:
            for begin in range(0, len(texts), 1000):
                writer.write_table(pyarrow.table({"text": texts[begin : begin + 1000]}, schema=schema))
    written = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "d5cbb8d9e4b5d1f0",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
        **state,
    }
    (folder / "state.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2))
    return folder


def items_of(*inputs: object) -> list[Item]:
    return [item for source in file_sources([str(one) for one in inputs]) for item in source.read(["text"], Position())]


def test_shards_are_read_in_the_order_of_the_state(tmp_path: Path) -> None:
    shards = [[f"{name} {row}" for row in range(rows)] for name, rows in (("a", 2500), ("b", 0), ("c", 3))]
    folder = save(tmp_path / "saved", shards)
    expected = [(row + 1, {"text": text}) for texts in shards for row, text in enumerate(texts)]
    assert items_of(folder) == expected
    # What map and filter leave there is no data, and a folder may lie among others.
    (folder / "cache-5e1d.arrow").write_bytes((folder / "data-00002-of-00003.arrow").read_bytes())
    (tmp_path / "z.txt").write_text("a file beside it")
    assert items_of(tmp_path) == [(1, {"text": "a file beside it"}), *expected]
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert [value for _, value in items_of(folder)] == [{"text": t} for texts in reversed(shards) for t in texts]
    assert items_of(folder / "data-00002-of-00003.arrow") == expected[-3:]
    position = Position()
    (source, *_) = [one for one in file_sources([str(folder)]) if one.size > 10_000]
    assert len(list(source.read(["text"], position))) == 2500
    assert source.size - 8 <= position.tell() <= source.size  # but for the mark at the end


def test_a_folder_of_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "all" / split, [[split]])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for named in (tmp_path / "all", tmp_path, tmp_path / "all" / "*.json"):
        with pytest.raises(UserError, match="all holds the splits train, test of a data set") as error:
            file_sources([str(named)])
    remedy = str(error.value).rsplit("--input ")[-1]
    assert items_of(remedy) == [(1, {"text": "train"})]


@pytest.mark.parametrize("key", ["_indices_data_files", "_indices_files"])
def test_rows_in_another_order_are_refused(tmp_path: Path, key: str) -> None:
    folder = save(tmp_path / "shuffled", [["a", "b"]], **{key: [{"filename": "indices.arrow"}]})
    for named in (folder, folder / "data-00000-of-00001.arrow"):
        with pytest.raises(UserError, match=r"shuffled: state.json lists the rows .*flatten_indices"):
            file_sources([str(named)])
    save(folder, [["a", "b"]], **{key: None})
    assert len(items_of(folder)) == 2


def test_files_that_are_missing_or_are_no_data_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", [["a"], ["b"]])
    stray = folder / "cache-1.arrow"
    (folder / "data-00001-of-00002.arrow").rename(stray)
    with pytest.raises(UserError, match="data-00001-of-00002.arrow is not there, and .*state.json names it"):
        file_sources([str(folder)])
    with pytest.raises(UserError, match="cache-1.arrow is not among the files of its data set"):
        file_sources([str(stray)])
    for name in ("state.json", "dataset_info.json"):  # as a pattern names them
        with pytest.raises(UserError, match=f"{name} is not among the files .*Name the folder: {folder}"):
            file_sources([f"{folder}/{name[:5]}*.json"])
    save(folder, [])
    with pytest.raises(UserError, match="state.json names no file of data"):
        file_sources([str(folder)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text('{"text": "a state of something else"}')
    assert items_of(tmp_path / "other") == [(1, {"text": "a state of something else"})]


def test_a_stream_that_is_cut_or_altered_is_damaged(tmp_path: Path) -> None:
    texts = [str(row) for row in range(3000)]
    (path,) = save(tmp_path / "saved", [texts]).glob("*.arrow")
    data = path.read_bytes()
    # Where a batch ends exactly, Arrow's own reader sees nothing wrong.
    for cut, read in ((len(data) - 8, 3000), (len(data) - 1, 3000), (len(data) // 2, 1000)):
        path.write_bytes(data[:cut])
        items = items_of(path.parent)
        assert items[:-1] == [(row + 1, {"text": text}) for row, text in enumerate(texts[:read])]
        assert items[-1][0] == read + 1
        assert isinstance(items[-1][1], Problem) and items[-1][1].reason == "damaged file"


def test_a_column_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    (source,) = file_sources([str(save(tmp_path / "saved", [["a", "b"]]))])
    [(row, problem)] = source.read(["body"], Position())
    assert row == 1 and str(problem) == "missing key: no 'body' (there: text)"

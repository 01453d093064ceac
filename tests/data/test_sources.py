"""Every format yields its records with their true places, and what is damaged as a problem in its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.data import tables
from megakd.data.file_contents import Contents, Format
from megakd.data.records import Item, Problem
from megakd.data.sources import FileSource, Position, file_sources, find_files


def items_of(path: Path, fields: Sequence[str] = ("text",), position: Position | None = None) -> list[Item]:
    (source,) = file_sources([str(path)])
    return list(source.read(fields, position or Position()))


def reasons_of(items: list[Item]) -> list[tuple[int, str]]:
    return [(line, value.reason) for line, value in items if isinstance(value, Problem)]


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "c.txt", "sub/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files([f"{tmp_path}/*.py"]) == [tmp_path / "a.py", tmp_path / "b.py"]
    found = find_files([f"{tmp_path}/c.txt", f"{tmp_path}/**/*.py"])
    assert found[0] == tmp_path / "c.txt" and sorted(found[1:]) == sorted(tmp_path.rglob("*.py"))
    with pytest.raises(UserError, match=r"--input .*nothing\*: no such file or folder"):
        find_files([f"{tmp_path}/nothing*"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no file is there"):
        find_files([f"{tmp_path}/bare"])


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_files_of_several_members_or_frames(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    lines = [json.dumps({"text": f"{i} größer", "other": 1}).encode() + b"\n" for i in range(30_000)]
    data = b"".join(lines)
    cuts = [0, 0, 7, 100_000, 100_001, len(data)]
    path = tmp_path / f"in.jsonl.{ending}"
    path.write_bytes(b"".join(pack(data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)))
    position = Position()
    (source,) = file_sources([str(path)])
    read = source.read(["text"], position)
    assert next(read) == (1, {"text": "0 größer"}) and 0 < position.tell() <= source.size
    assert list(read) == [(i + 1, {"text": f"{i} größer"}) for i in range(1, 30_000)]
    text = tmp_path / f"in.txt.{ending}"
    text.write_bytes(pack(b"\xef\xbb\xbfone\r\n") + pack(b"two"))
    assert items_of(text) == [(1, {"text": "one\r\ntwo"})]


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_damaged_file_ends_there_and_what_was_read_stays(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    data = b"".join(json.dumps({"text": str(i * i)}).encode() + b"\n" for i in range(200_000))
    packed = pack(data)
    path = tmp_path / f"in.jsonl.{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    items = items_of(path)
    count = len(items) - 1
    assert 1000 < count < 200_000
    assert items[:-1] == [(i + 1, {"text": str(i * i)}) for i in range(count)]
    assert reasons_of(items) == [(count + 1, "damaged file")]
    path.write_bytes(packed + b"garbage")
    items = items_of(path)
    assert reasons_of(items) == [(len(items), "damaged file")]
    path.write_bytes(b"garbage" * 10)
    assert reasons_of(items_of(path)) == [(1, "not JSON")]
    path.write_bytes(packed[:5])
    assert reasons_of(items_of(path)) == [(1, "damaged file")]
    text = tmp_path / f"in.txt.{ending}"
    text.write_bytes(pack(b"text " * 10_000)[:-10])
    assert reasons_of(items_of(text)) == [(1, "damaged file")]
    table = tmp_path / f"in.csv.{ending}"
    table.write_bytes(pack(b"text\n" + b"a\n" * 300_000)[:-10])
    items = items_of(table)
    assert len(items) > 1 and reasons_of(items) == [(items[-1][0], "damaged file")]


def test_a_file_that_cannot_be_opened_is_a_problem_of_it(tmp_path: Path) -> None:
    formats: tuple[Format, ...] = ("jsonl", "json", "csv", "text", "parquet", "arrow")
    for format in formats:
        source = FileSource(tmp_path / "gone", Contents(format), 1, 0)
        assert reasons_of(list(source.read(["text"], Position()))) == [(1, "damaged file")]


def test_what_was_found_in_a_file_is_part_of_what_it_is(tmp_path: Path) -> None:
    known = set()
    for data in (b'{"text":"a"}\n{}', b'[{"text":"ab"}]', b'{"text":"a"}{}\n', b"a text of fifteen"[:15]):
        (tmp_path / "in").write_bytes(data)
        os.utime(tmp_path / "in", ns=(1, 1))
        (source,) = file_sources([str(tmp_path / "in")])
        known.add((source.size, json.dumps(source.identity())))
    assert {size for size, _ in known} == {15} and len(known) == 3  # the first array and the objects are one format


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=20), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_rows_are_the_csv_module_s(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([("id", "text"), *rows])
    path.write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())
    items = items_of(path)
    assert [value for _, value in items] == [{"text": text} for _, text in rows]
    lines = buffer.getvalue().split("\n")
    for (line, _), (first, _) in zip(items, rows, strict=True):
        shown = lines[line - 1].removeprefix('"').replace('""', '"')
        assert shown.startswith(first.split("\n")[0])


def test_bad_csv_rows_are_told_with_the_line_where_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CSV_FIELD_LIMIT", 100)
    limit = csv.field_size_limit()
    path = tmp_path / "in.csv"
    rows = [
        b"id,text",
        b'1,"two\nlines"',
        b"2",
        b"",
        b"3,a,b",
        b"4,\xff",
        b'5,"a"b',
        b"6," + b"x" * 101,
        b"7,fine",
        b'8,"not closed',
        b"y" * 101,
        "9,größer".encode(),
    ]
    path.write_bytes(b"\n".join(rows))
    items = items_of(path)
    assert [(line, value) for line, value in items if isinstance(value, dict)] == [
        (2, {"text": "two\nlines"}),
        (10, {"text": "fine"}),
        (13, {"text": "größer"}),
    ]
    assert reasons_of(items) == [
        (4, "wrong number of columns"),
        (6, "wrong number of columns"),
        (7, "not UTF-8 text"),
        (8, "malformed CSV row"),
        (9, "CSV field over the limit"),
        (11, "CSV field over the limit"),
    ]
    problems = [str(value) for _, value in items if isinstance(value, Problem)]
    assert problems[0] == "wrong number of columns: 1, and the header has 2"
    assert problems[5].endswith("is a quote not closed? (lines 11 to 12)")
    assert csv.field_size_limit() == limit
    path.write_bytes(b'text\n"to the end')
    assert reasons_of(items_of(path)) == [(2, "malformed CSV row")]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (b"", []),
        (b"text\n", []),
        (b"id,body\n1,a\n", [(1, "missing key: no 'text' (there: id, body)")]),
        (b"text,text\n1,a\n", [(1, "malformed CSV row: the header has 'text' more than once")]),
    ],
)
def test_csv_headers(tmp_path: Path, contents: bytes, expected: list[tuple[int, str]]) -> None:
    (tmp_path / "in.csv").write_bytes(contents)
    assert [(line, str(problem)) for line, problem in items_of(tmp_path / "in.csv")] == expected


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 100) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, row_group_size=row_group_size, write_page_checksum=True, use_dictionary=False
    )


def test_parquet_rows_of_several_groups(tmp_path: Path) -> None:
    texts = [f"text {i}" if i % 7 else None for i in range(1000)]
    messages = [[{"role": "user", "content": str(i)}] * (i % 3) for i in range(1000)]
    write_parquet(tmp_path / "in.parquet", {"id": list(range(1000)), "text": texts, "messages": messages})
    position = Position()
    items = items_of(tmp_path / "in.parquet", position=position)
    assert items == [(i + 1, {"text": text}) for i, text in enumerate(texts)]
    assert position.tell() == (tmp_path / "in.parquet").stat().st_size
    items = items_of(tmp_path / "in.parquet", ("messages", "prompt"))
    assert items == [(i + 1, {"messages": message}) for i, message in enumerate(messages)]
    (problem,) = items_of(tmp_path / "in.parquet", ("prompt",))
    assert str(problem[1]) == "missing key: no 'prompt' (there: id, text, messages)"


def test_nulls_that_only_a_column_s_objects_have_are_left_out(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "red?"}],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "paint", "arguments": {"color": "blue"}}]}],
        [{"role": "assistant", "tool_calls": [{"name": "wash", "arguments": {"hot": True}}]}],
        None,
    ]
    columns = {"messages": messages, "weight": [1.0, None, 0.0, 2.0], "id": [1, 2, 3, 4]}
    write_parquet(tmp_path / "in.parquet", columns)
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_stream(str(tmp_path / "in.arrow"), table.schema) as writer:
        writer.write_table(table)
    expected = [(n + 1, {"messages": messages[n], "weight": columns["weight"][n]}) for n in range(4)]
    for name in ("in.parquet", "in.arrow"):
        (source,) = file_sources([str(tmp_path / name)])
        assert list(source.read(["messages"], Position(), True)) == expected
        assert list(source.read(["messages"], Position())) == [(n + 1, {"messages": messages[n]}) for n in range(4)]


FLAGGED = {"text": "a", "id": "1", "Loss_Mask": "0", "trainable": "1"}


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.csv"])
def test_keys_that_may_be_flags_are_read_where_they_are_asked_for(tmp_path: Path, name: str) -> None:
    rows = [",".join(FLAGGED), ",".join(FLAGGED.values())] if name == "in.csv" else [json.dumps(FLAGGED)]
    (tmp_path / name).write_text("\n".join(rows))
    (source,) = file_sources([str(tmp_path / name)])
    line = len(rows)
    assert list(source.read(["text"], Position())) == [(line, {"text": "a"})]
    flags = {"Loss_Mask": "0", "trainable": "1"}
    assert list(source.read(["text"], Position(), True)) == [(line, {"text": "a", **flags})]
    assert [str(value) for _, value in source.read(["body"], Position(), True)] == [
        "missing key: no 'body' (there: text, id, Loss_Mask, trainable)"
    ]  # flags alone are no record


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff", b"good"], type=pyarrow.binary())
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    write_parquet(tmp_path / "in.parquet", {"text": unchecked})
    items = items_of(tmp_path / "in.parquet")
    assert [value for _, value in items if isinstance(value, dict)] == [{"text": "fine"}, {"text": "good"}]
    assert reasons_of(items) == [(2, "not UTF-8 text")]


def test_a_damaged_parquet_file_ends_there(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    write_parquet(path, {"text": [f"text {i}" for i in range(1000)]})
    data = bytearray(path.read_bytes())
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(5).column(0).data_page_offset
    data[place + 60 : place + 80] = bytes(20)
    path.write_bytes(data)
    items = items_of(path)
    assert items[:-1] == [(i + 1, {"text": f"text {i}"}) for i in range(500)]
    assert reasons_of(items) == [(501, "damaged file")]
    path.write_bytes(data[:-100])
    assert reasons_of(items_of(path)) == [(1, "damaged file")]
    for name in ("in.parquet", "in.arrow"):
        for contents in (b"", b"no table"):
            (tmp_path / name).write_bytes(contents)
            assert reasons_of(items_of(tmp_path / name)) == [(1, "damaged file")]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.csv.zst", "in.json", "in.json.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    record = b'"' + b"x" * 1000 + b'"\n'
    if ".csv" in name:
        data = b"text\n" + record * 20_000
    elif ".jsonl" in name:
        data = (b'{"text": ' + record.strip() + b"}\n") * 20_000
    else:
        data = b"[" + b",".join([b'{\n"text": ' + record + b"}\n"] * 20_000) + b"]"
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else zstd(data) if name.endswith("zst") else data)
    size = len(data)
    del data
    (source,) = file_sources([str(path)])
    tracemalloc.start()
    assert sum(1 for _, value in source.read(["text"], Position()) if isinstance(value, dict)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 10

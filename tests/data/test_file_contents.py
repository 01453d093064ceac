"""A file is what its first bytes say, whatever its name; what is plainly another format becomes no document."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megakd.data import file_contents, json_records
from megakd.data.file_contents import Contents, contents_of
from megakd.data.records import Item, Problem
from megakd.data.sources import Position, file_sources

RECORD = '{"text": "one"}'


def items_of(path: Path) -> list[Item]:
    (source,) = file_sources([str(path)])
    return list(source.read(["text"], Position()))


def problem_of(path: Path) -> Problem:
    [(_, problem)] = items_of(path)
    assert isinstance(problem, Problem)
    return problem


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


@pytest.mark.parametrize("name", ["in.json", "in.txt", "in", "in.jsonl", "in.csv", "in.md", "in.py", "in.dat", "in.gz"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (RECORD + "\n" + RECORD + "\n", [1, 2]),
        (f"[{RECORD}, {RECORD}]", [1, 1]),
        (f"\n [\n{RECORD},\n\n{RECORD}]\n", [3, 5]),
        (json.dumps({"text": "one"}, indent=2) + "\n" + RECORD, [1, 4]),
        (RECORD + RECORD, [1, 1]),
        (RECORD, [1]),
    ],
)
def test_json_is_read_under_any_name(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    (tmp_path / name).write_text(text)
    assert items_of(tmp_path / name) == [(line, {"text": "one"}) for line in lines]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "[link](https://example.org) and more"),
        ("a.txt", "[1] Smith, 1998\n[2] Jones, 2001\n"),
        ("a.txt", "[sic] said he"),
        ("a.txt", "{ int a = 1; }"),
        ("a.c", '{"key", 1}'),
        ("a.js", '{\n  "use strict": 1, // really\n}\n'),
        ("a.js", '[{"a": 1}].map(console.log)\n'),
        ("a.js", "[1, 2, 3].forEach(f)\n"),
        ("a.py", '{\n    "name": "sale",\n    "installable": True,\n}\n'),
        ("a.json5", '{"key": 1, /* why */}\n'),
        ("a.yaml", '{"key": value}\n'),
        ("a.md", '{"key": 1}\n\nis what the server answers.\n'),
        ("a.html.jinja", "{% if x %}{{ x }}{% endif %}"),
        ("a.tex", "{\\bf bold}"),
        ("a", "#!/bin/sh\necho '{}'\n"),
        ("a.txt", "BZh, PK and %PDF are how such files begin; ORC, RIFF, GIF89a and FEA1 are others."),
        ("a.txt", "versions of git-lfs"),
        ("a.txt", "<p>a part of a page</p>"),
        ("a.txt", ""),
    ],
)
def test_text_that_begins_like_something_else_stays_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert items_of(tmp_path / name) == [(1, {"text": text})]


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.json", "text\n", 1, "not JSON: Expecting value: line 1 column 1"),
        ("a.json", '"text"\n', 1, "not a JSON object: a str"),
        ("a.json", '{"text": "a",\n "b": }', 2, "not JSON: Expecting value: line 2 column 7"),
        ("a.txt", '\n{"text": "a",\n"b" 1}\n', 3, "not JSON: Expecting ':' delimiter: line 3 column 5"),
        ("a.txt", "[{'text': 'a'}]", 1, "not JSON: Expecting property name enclosed in double quotes: line 1 column 3"),
        ("a", '[{"text": 1}', 1, "the array that begins in line 1 has no end; the file may be cut short"),
        ("a", "[\n {\n", 3, "Expecting property name enclosed in double quotes: line 3 column 1"),
        ("a.txt", '[\n {\n  "tex', 3, "Unterminated string starting at: line 3 column 3"),
        ("a.txt", '{"text" ', 1, "Expecting ':' delimiter: line 1 column 9"),
        ("a.jsonl", '{\n "text": "a\n', 2, "Invalid control character at: line 2 column 12"),
        ("a.jsonl", '["one"]\n["two"]', 1, "not a JSON object: a list"),
        ("a.txt", '["one"]\n["two"]', 1, "not a JSON object: a list"),
        ("a.log", "started\n" + f"{RECORD}\n" * 3, 1, "not JSON: Expecting value"),
        ("a.json", '["one", "two"]', 1, "not a JSON object: a str"),
        ("a.json", '[{"text": "a"}] more', 1, "there is more behind the end of the array: line 1 column 17"),
        ("a.json", "[" * 100_000, 1, "not JSON: "),
        ("a.json", '{"version": 1, "data": [{"text": "a"}]}', 1, "and its 'data' a list of 1 objects"),
        ("package.json", '{"name": "x"}', 1, "missing key: no 'text' (there: name)"),
    ],
)
def test_json_that_is_none_is_told_with_its_place(
    tmp_path: Path, name: str, text: str, line: int, message: str
) -> None:
    (tmp_path / name).write_text(text)
    problems = [(at, str(value)) for at, value in items_of(tmp_path / name) if isinstance(value, Problem)]
    assert problems[0][0] == line and message in problems[0][1]


def test_an_object_around_the_records_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"version": 1, "data": [{"text": "a"}]}')
    assert problem_of(tmp_path / "a.json").remedy.startswith("Write that list as a file of its own (jq '.[\"data\"]'")
    (tmp_path / "a.ipynb").write_text('{"cells": [], "nbformat": 4}')
    assert "--format text" in problem_of(tmp_path / "a.ipynb").remedy


def write_other_formats(folder: Path) -> dict[str, str]:
    """Files as the programs of their formats write them, with what each is called."""
    (folder / "text").write_text("text")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "text")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "text")
    (folder / "a.xz").write_bytes(lzma.compress(b"text"))
    (folder / "a.bz2").write_bytes(bz2.compress(b"text"))
    (folder / "a.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes()))
    (folder / "a.gz.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    (folder / "a.pkl").write_bytes(pickle.dumps({"text": "a"}))
    torch.save({"text": torch.zeros(1)}, folder / "a.pt")
    save_file({"text": torch.zeros(1)}, folder / "a.safetensors")
    np.save(folder / "a.npy", np.zeros(3))
    base = sqlite3.connect(folder / "a.sqlite")
    base.execute("create table t (x)")
    base.commit()
    base.close()
    table = pyarrow.table({"text": ["a"]})
    (folder / "a.feather").write_bytes(b"FEA1\0\0\0\0")
    pyarrow.parquet.write_table(table, folder / "in.parquet")
    (folder / "a.parquet.gz").write_bytes(gzip.compress((folder / "in.parquet").read_bytes()))
    (folder / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n")
    (folder / "a.html").write_text("\n<!DOCTYPE html>\n<html></html>")
    (folder / "a.htm").write_text("<html><head/></html>", "utf-8-sig")
    (folder / "b.xml").write_text('<?xml version="1.0" encoding="utf-16"?><a/>', "utf-16")
    (folder / "a.xml").write_text('<?xml version="1.0"?><a/>')
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "a.lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    (folder / "a.tsv").write_text("text\tid\na\t1\n")
    (folder / "a.bin").write_bytes(b"a\x00\x00\x00b")
    (folder / "a.utf16").write_bytes("größer".encode("utf-16-le"))
    (folder / "a.utf32").write_bytes("größer".encode("utf-32-be"))
    return {
        "a.zip": "zip archive", "a.tar": "tar archive", "a.xz": "an xz file", "a.bz2": "a bzip2 file",
        "a.tar.gz": "tar archive", "a.gz.gz": "gzip inside gzip", "a.pkl": "pickle", "a.pt": "zip archive",
        "a.safetensors": "safetensors", "a.npy": "numpy", "a.sqlite": "SQLite", "a.feather": "Feather",
        "a.parquet.gz": "parquet inside gzip", "a.pdf": "PDF", "a.html": "HTML", "a.htm": "HTML",
        "b.xml": "XML", "a.xml": "XML", "a.png": "image",
        "a.lfs": "git-lfs pointer", "a.tsv": "table with tabs", "a.bin": "zero bytes", "a.utf16": "UTF-16LE",
        "a.utf32": "UTF-32BE",
    }  # fmt: skip


def test_other_formats_are_named_and_refused(tmp_path: Path) -> None:
    for name, called in write_other_formats(tmp_path).items():
        for path in (tmp_path / name, tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl"):
            if name in ("a.tsv", "a.bin") and path.suffix != Path(name).suffix:
                continue  # of these the ending is a part, or lines tell by themselves
            path.write_bytes((tmp_path / name).read_bytes())
            problem = problem_of(path)
            assert called in problem.detail and problem.remedy, path


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("name", ["in.json", "in.txt.gz", "in.txt.zst", "in"])
def test_packed_files_are_unpacked_under_any_name(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / name).write_bytes(pack(f"[{RECORD}]".encode()))
    assert items_of(tmp_path / name) == [(1, {"text": "one"})]
    if name != "in.json":
        (tmp_path / name).write_bytes(pack(b"one"))
        assert items_of(tmp_path / name) == [(1, {"text": "one"})]


def test_tables_are_read_under_any_name(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.txt")
    for name, new in (("b.json", pyarrow.ipc.new_stream), ("c", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.txt", "b.json", "c"):
        assert items_of(tmp_path / name) == [(1, {"text": "one"})]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_encodings_that_a_byte_order_mark_names(
    tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"größer 🙂 {number}" for number in range(40)]
    mark = "\ufeff" if encoding.endswith("be") else ""
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    monkeypatch.setattr("megakd.data.compressed.BUFFER", 101)  # characters are cut
    for name, text in (("in.json", f"[{','.join(records)}]"), ("in.jsonl", "\n".join(records))):
        (tmp_path / name).write_bytes(pack((mark + text).encode(encoding)))
        assert [value for _, value in items_of(tmp_path / name)] == [{"text": text} for text in texts]
    (tmp_path / "in.txt").write_bytes(pack((mark + texts[0]).encode(encoding)))
    assert items_of(tmp_path / "in.txt") == [(1, {"text": texts[0]})]


def test_utf16_that_is_cut_or_wrong_costs_what_it_is_in(tmp_path: Path) -> None:
    lines = [f'{{"text": "{text}"}}\n' for text in ("one", "\ud800", "three")]
    data = "".join(["\ufeff", *lines]).encode("utf-16-le", "surrogatepass")
    (tmp_path / "in.jsonl").write_bytes(data + b"x")
    items = items_of(tmp_path / "in.jsonl")
    assert [(1, {"text": "one"}), (3, {"text": "three"})] == [item for item in items if isinstance(item[1], dict)]
    assert [line for line, value in items if isinstance(value, Problem)] == [2, 4]


def test_only_the_first_bytes_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    read_value = json_records.read_value

    def count(text: str, start: int, whole: bool) -> object:
        counted.append(len(text))
        return read_value(text, start, whole)

    monkeypatch.setattr(file_contents, "read_value", count)
    long = json.dumps({"text": "x" * 3 * file_contents.HEAD})
    for name, data, expected in [
        ("in.txt", f"[{long}]".encode(), Contents("json")),
        ("in.jsonl", f"{long}\n".encode(), Contents("jsonl")),
        ("in.gz", gzip.compress(f"[{long}]".encode()), Contents("json", "gzip")),
    ]:
        (tmp_path / name).write_bytes(data)
        assert contents_of(tmp_path / name) == expected
        assert items_of(tmp_path / name) == [(1, json.loads(long))]
    assert counted and max(counted) <= file_contents.HEAD


TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(
    texts=TEXTS,
    layout=st.sampled_from(["lines", "array", "pretty array", "pretty objects", "one after another"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    pack=st.sampled_from([bytes, gzip.compress, zstd]),
    name=st.sampled_from(["a.json", "a.jsonl", "a.txt", "a", "a.gz", "a.json.zst", "a.csv", "a.md", "a.dat"]),
    ascii_only=st.booleans(),
    cut=st.one_of(st.none(), st.floats(0.3, 1)),
)
def test_documents_are_the_values_or_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    layout: str,
    encoding: str,
    pack: Callable[[bytes], bytes],
    name: str,
    ascii_only: bool,
    cut: float | None,
) -> None:
    """Whatever JSON records are written as, and wherever a file is cut, no document has JSON in it."""
    records = [{"text": text} for text in texts]
    indent = 1 if "pretty" in layout else None
    values = [json.dumps(record, ensure_ascii=ascii_only, indent=indent) for record in records]
    if "array" in layout:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    else:
        text = ("" if layout == "one after another" else "\n").join(values)
    if cut is not None and name != "a.md":  # where JSON that is broken may be an example in prose
        text = text[: max(10, int(cut * len(text)))]
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(pack(text.encode(encoding)))
    items = items_of(path)
    found = [value["text"] for _, value in items if isinstance(value, dict)]
    assert found == texts[: len(found)]
    problems = [value for _, value in items if isinstance(value, Problem)]
    assert len(problems) <= 1 and (problems or len(found) == len(texts) or cut is not None)
    if cut is None:
        assert found == texts


ANY_JSON = st.recursive(
    st.dictionaries(st.sampled_from(["text", "b"]), st.none() | st.text(max_size=4), max_size=2) | st.just([]),
    lambda inner: st.lists(inner | st.integers() | st.text(max_size=3), max_size=3),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None)
@given(
    values=st.lists(ANY_JSON, min_size=1, max_size=4),
    between=st.sampled_from(["", "\n", " ", "\n\n", "\r\n"]),
    before=st.sampled_from(["", "\n", " \t", "\ufeff"]),
    indent=st.sampled_from([None, 1]),
    name=st.sampled_from(["a.json", "a.jsonl", "a.txt", "a", "a.md", "a.py", "a.csv", "a.parquet", "a.log"]),
)
def test_what_is_json_throughout_is_never_a_document_itself(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    between: str,
    before: str,
    indent: int | None,
    name: str,
) -> None:
    text = before + between.join(json.dumps(value, indent=indent) for value in values)
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_text(text)
    allowed = [
        one.get("text") for one in [*values, *(one for value in values for one in value)] if isinstance(one, dict)
    ]
    for _, value in items_of(path):
        assert isinstance(value, Problem) or value["text"] in allowed


RECORDS = '{"text": "line 0"}\n{"text": "line 1"}\n{"text": "line 2"}\n'


@pytest.mark.parametrize("ending", ["txt", "log", ""])
@pytest.mark.parametrize(
    "text",
    [
        '{text: "a"}\n' + RECORDS,
        "[INFO] begun\n" + RECORDS,
        "[2024-01-01] export\n" + RECORDS,
        "Data export\n" + json.dumps([{"text": "a"}, {"text": "b"}], indent=2),
        "// export\n" + json.dumps([{"text": "a"}]),
        "# a\n" + json.dumps({"text": "a"}, indent=2),
        " " * 70_000 + RECORDS,
        "\n" * 70_000 + RECORDS,
    ],
)
def test_json_behind_what_is_none_is_no_document(tmp_path: Path, ending: str, text: str) -> None:
    path = tmp_path / f"export.{ending}".rstrip(".")
    path.write_text(text)
    assert contents_of(path).format in ("json", "jsonl")


def test_prose_with_an_example_in_it_is_text(tmp_path: Path) -> None:
    for name, text in {
        "a.txt": 'Write\n{"a": 1}\nand so on.\n',
        "b.md": '# Title\n{"a": 1}\n',
        "c.py": '# x\n{"a": 1}\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert contents_of(tmp_path / name).format == "text", name

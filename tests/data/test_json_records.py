"""JSON values are found one by one in a window that moves, as `json` finds them in the whole text."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data import json_records
from megakd.data.json_records import read_json, read_jsonl
from megakd.data.records import Problem

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    array=st.booleans(),
    read=st.integers(3, 9),  # a byte order mark is read whole
    ascii_only=st.booleans(),
)
def test_any_window_finds_what_json_finds(
    values: list[Any], indent: int | None, array: bool, read: int, ascii_only: bool
) -> None:
    records = [{"text": value} for value in values]
    parts = [json.dumps(record, indent=indent, ensure_ascii=ascii_only) for record in records]
    text = "[" + " ,\n".join(parts) + "\n]" if array else " \n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "READ", read)
        items = list(read_json(io.BytesIO(b"\xef\xbb\xbf" + text.encode()), ["text"]))
    assert [value for _, value in items] == records
    for (line, _), part in zip(items, parts, strict=True):
        assert text.split("\n")[line - 1].removeprefix("[").startswith(part.split("\n")[0])


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"},\n{"text": tru}]',
        '[{"text": "a"}\n{"text": "b"}]',
        '[{"text": "a\\u12x4"}]',
        '[{"text": "a\nb"}]',
        '[{"text": "a"},\n]',
        '[{"text": -}]',
        '{"text": "a"}\n\n  x',
        '[{"text": 1} , {"text": "never ends',
    ],
)
def test_a_mistake_is_where_json_finds_it(text: str, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "READ", read)
    *good, (line, problem) = read_json(io.BytesIO(text.encode()), ["text"])
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(text)
    assert isinstance(problem, Problem) and all(isinstance(value, dict) for _, value in good)
    where = f"line {error.value.lineno} column {error.value.colno}"
    if error.value.msg != "Extra data":  # which is what json says of a second value, and here is the third's mistake
        assert problem.detail.endswith(where), (problem.detail, where)
        assert line == error.value.lineno
    else:
        assert problem.detail == "Expecting value: line 3 column 3"


def test_an_element_that_is_not_utf8_or_no_object_costs_no_other() -> None:
    data = b'[{"text": "one"},\n{"text": "\xff"}, 5,\n{"text": "\xc3\xb6"}]'
    assert [(line, str(value) if isinstance(value, Problem) else value) for line, value in _read(data)] == [
        (1, {"text": "one"}),
        (2, "not UTF-8 text"),
        (2, "not a JSON object: a int"),
        (3, {"text": "ö"}),
    ]


def _read(data: bytes) -> list[tuple[int, Any]]:
    return list(read_json(io.BytesIO(data), ["text"]))


def test_a_value_over_the_limit_ends_an_array_and_costs_only_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "READ", 10)
    monkeypatch.setattr(json_records, "VALUE_LIMIT", 100)
    long, short = json.dumps({"text": "x" * 200}), json.dumps({"text": "x"})
    items = _read(f"[{short},\n{long},{short}]".encode())
    assert items[0] == (1, {"text": "x"}) and [line for line, _ in items] == [1, 2]
    assert "a value of more than" in items[1][1].detail
    lines = list(read_jsonl(io.BytesIO(f"{short}\n{long}\n{short}\n{long}".encode()), ["text"]))
    assert [(line, isinstance(value, dict)) for line, value in lines] == [(1, True), (2, False), (3, True), (4, False)]


def test_the_window_does_not_grow_with_the_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Window(json_records._Window):
        def grow(self) -> None:
            super().grow()
            sizes.append(len(self.text))

    monkeypatch.setattr(json_records, "_Window", Window)
    monkeypatch.setattr(json_records, "READ", 1000)
    largest = []
    for count in (100, 10_000):
        data = "[" + ",\n".join(json.dumps({"text": "x" * 70}, indent=1) for _ in range(count)) + "]"
        assert sum(1 for _ in read_json(io.BytesIO(data.encode()), ["text"])) == count
        largest.append(max(sizes))
        sizes.clear()
    assert largest[0] == pytest.approx(largest[1], abs=100) and largest[1] < 1200

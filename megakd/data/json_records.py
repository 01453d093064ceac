"""Records from JSON: one on each line, or values one after another or in an array, over any number of lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

from megakd.data.compressed import DAMAGE
from megakd.data.records import MISSING_KEY, NOT_UTF8, Item, Problem, Record, chosen_keys, damage, missing_key

# Characters of one value, or bytes of a line; one that has no end would otherwise take the rest of the file.
VALUE_LIMIT = 1 << 27
READ = 1 << 18  # bytes
UTF8_BOM = b"\xef\xbb\xbf"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not a JSON object"

_SPACE = re.compile(r"[ \t\r\n]*")
# The longest of what is a mistake only because the text ends in it: "-Infinity", or a pair of \uXXXX.
_CUT = 16
_AS_TEXT = "Correct the file, or read it with --format text if it is a document itself"
_AS_RECORDS = 'Write objects, such as {"text": ...}'
_TOO_LONG = f"a value of more than {VALUE_LIMIT:,} characters"
_SPLIT = "Make it several records; where an object wraps all records in a list, write that list alone"
_ONLY_OBJECT = "Name the keys that are there (--text-key and others), or use --format text if it is a document itself"
_WRAPPED = "Write that list as a file of its own (jq '.[\"{key}\"]' FILE > NEW.json), or name the keys that are there"
_decoder = json.JSONDecoder()


class Cut(ValueError):
    """A value's text ends before the value does."""


def read_jsonl(stream: IO[bytes], fields: Sequence[str], flags: bool = False) -> Iterator[Item]:
    """Yield (line, record or problem) for each line that is not empty; a bad line costs no other."""
    number = 0
    try:
        # Bytes end lines at \n only; text mode has other ideas.
        for number, line in enumerate(iter(partial(stream.readline, VALUE_LIMIT + 1), b""), start=1):
            if len(line) > VALUE_LIMIT and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(READ)
                yield number, Problem(NOT_JSON, _TOO_LONG, _SPLIT)
            elif not line.isspace():
                yield number, _line_record(line, fields, flags)
    except DAMAGE as error:
        yield number + 1, damage(error)


def read_json(stream: IO[bytes], fields: Sequence[str], flags: bool = False) -> Iterator[Item]:
    """Yield (line where it begins, record or problem) for each element of the file's array, or each of its values.

    Memory is that of the largest value and does not grow with their number. The file ends at the first place that is
    no JSON: nobody can say where the next value begins.
    """
    window = _Window(stream)
    try:
        yield from _values(window, fields, flags)
    except _Malformed as error:
        yield window.line, error.problem
    except DAMAGE as error:
        yield window.line, damage(error)


def read_value(text: str, start: int, whole: bool) -> tuple[Any, int]:
    """Return the JSON value that begins at the character `start`, and where it ends.

    Raises Cut where the text ends first, which only a text that is not `whole` may be excused for; json's own
    ValueErrors, and RecursionError for one that is nested too deeply, where it is no JSON.
    """
    try:
        value, end = _decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if not whole and (error.msg.startswith("Unterminated string") or error.pos >= len(text) - _CUT):
            raise Cut from error
        raise
    if end == len(text) and not whole and not isinstance(value, dict | list | str):
        raise Cut  # a number may go on
    return value, end


class _Malformed(Exception):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


class _Window:
    """The part of the text that is looked at: what is before it is forgotten, what is behind it not read yet."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        # What is no UTF-8 becomes halves of surrogate pairs, so that a bad record costs no other one.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = ""
        self.at = 0
        self.whole = False  # nothing is left behind it
        self._begun = False
        self._line = 1  # of the character `_counted`
        self._counted = 0
        self._column = 0  # of the text's first character in its line, counted from 0

    @property
    def line(self) -> int:
        """The line of the character `at`."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def column(self, position: int) -> int:
        """The column, from 1, of a character of the text."""
        begin = self.text.rfind("\n", 0, position) + 1
        return position - begin + 1 + (0 if begin else self._column)

    def grow(self) -> None:
        """Forget what is before `at`, and read as much as is kept, at least a piece."""
        self._line, self._column = self.line, self.column(self.at) - 1
        kept = self.text[self.at :]
        data = self._stream.read(max(READ, len(kept)))
        self.whole = not data
        if not self._begun:
            data, self._begun = data.removeprefix(UTF8_BOM), True
        self.text, self.at, self._counted = kept + self._decoder.decode(data, final=self.whole), 0, 0

    def peek(self) -> str:
        """Pass over spaces and return the character there; "" at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None, "it matches nothing too"
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.whole:
                return ""
            self.grow()

    def take(self) -> Any:
        """Return the value that begins here, with NOT_UTF8 for one that has other bytes, and stand behind it."""
        while True:
            try:
                value, end = read_value(self.text, self.at, self.whole)
                break
            except Cut:
                if len(self.text) - self.at > VALUE_LIMIT:
                    raise self.malformed(_TOO_LONG, remedy=_SPLIT) from None
                self.grow()
            except json.JSONDecodeError as error:
                raise self.malformed(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.malformed(str(error)) from error
        raw = self.text[self.at : end]
        self.at = end
        return value if _is_utf8(raw) else NOT_UTF8

    def malformed(self, what: str, position: int | None = None, remedy: str = _AS_TEXT) -> _Malformed:
        """The error at a character of the text, or here; `line` becomes that of the place."""
        self.at = self.at if position is None else position
        return _Malformed(Problem(NOT_JSON, f"{what}: line {self.line} column {self.column(self.at)}", remedy))


def _values(window: _Window, fields: Sequence[str], flags: bool) -> Iterator[Item]:
    if window.peek() == "[":
        yield from _elements(window, fields, flags)
        return
    first = True
    while window.peek():
        line = window.line
        found = window.take()
        item = _record(found, fields, flags)
        if first and isinstance(item, Problem) and item.reason == MISSING_KEY and not window.peek():
            item = _not_a_record(item, found)
        first = False
        yield line, item


def _elements(window: _Window, fields: Sequence[str], flags: bool) -> Iterator[Item]:
    begin = window.line
    window.at += 1
    more = window.peek() != "]"
    while more:
        if not window.peek():
            break
        line = window.line
        yield line, _record(window.take(), fields, flags)
        mark = window.peek()
        if mark not in (",", "]", ""):
            raise window.malformed("Expecting ',' or ']' behind an element of the array")
        more = mark == ","
        window.at += more
    if not window.peek():
        raise window.malformed(f"the array that begins in line {begin} has no end; the file may be cut short")
    window.at += 1
    if window.peek():
        raise window.malformed("there is more behind the end of the array")


def _line_record(line: bytes, fields: Sequence[str], flags: bool) -> Record | Problem:
    try:
        text = line.removeprefix(UTF8_BOM).decode()
    except UnicodeDecodeError:
        return NOT_UTF8
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem(NOT_JSON, str(error))
    return _record(found, fields, flags)


def _record(found: Any, fields: Sequence[str], flags: bool) -> Record | Problem:
    if isinstance(found, Problem):
        return found
    if not isinstance(found, dict):
        return Problem(NOT_AN_OBJECT, f"a {type(found).__name__}", _AS_RECORDS)
    keys = chosen_keys(found, fields, flags)
    return {key: found[key] for key in keys} if keys else missing_key(fields, found)


def _not_a_record(item: Problem, found: dict[str, Any]) -> Problem:
    """The problem of a file whose only object has no field, with what it may be instead of a record."""
    for key, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            what = f"the file is one object, and its '{key}' a list of {len(value):,} objects"
            return Problem(item.reason, f"{item.detail}; {what}", _WRAPPED.format(key=key))
    return Problem(item.reason, item.detail, _ONLY_OBJECT)


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

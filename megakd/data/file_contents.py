"""What a file holds, told by its first bytes, and by its ending only where these leave it open."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from megakd.data.compressed import BYTE_ORDER_MARKS, DAMAGE, UTF8, Packing, inner_suffix, open_bytes, packing_of
from megakd.data.json_records import UTF8_BOM, Cut, read_value
from megakd.data.records import Problem

Format = Literal["auto", "jsonl", "json", "csv", "parquet", "arrow", "text"]
HEAD = 1 << 16  # bytes that are looked at, of what is unpacked
ANOTHER_FORMAT = "file of another format"

_ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Sources and prose that may begin as JSON does and be none: what is no JSON from beginning to end is text there.
_MAY_BEGIN_SO = frozenset(
    ".py .js .mjs .cjs .ts .jsx .tsx .json5 .jsonc .rb .php .lua .jl .yaml .yml .j2 .jinja .tmpl .hbs .tex .md "
    ".rst".split()
)
# Where the lines behind a first one that is no JSON say nothing: the ending does, or they may be cells and examples.
_DECIDED = _MAY_BEGIN_SO | set(_ENDINGS) | {".tsv"}
_UNPACK = "Unpack it, and name what was in it"
_CONVERT = "Convert it to JSON lines, CSV, parquet or plain text"
_MARKUP = "Convert it to plain text, or read it as it is with --format text"
# Text can begin with none of these. What texts do begin with, such as "%!PS" or "II*", is left to its other bytes.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive, as Office, .npz and torch files are too", _UNPACK),
    (rb"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "a bzip2 file", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 file", _UNPACK),
    (rb"\xff\x06\x00\x00sNaPpY", "a snappy file", _UNPACK),
    (rb".{257}ustar(?:\x00|  \x00)", "a tar archive", _UNPACK),
    (rb"%PDF-\d", "a PDF document", _CONVERT),
    (rb"\{\\rtf", "an RTF document", _CONVERT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _CONVERT),
    (rb"\x80[\x02-\x05]", "a Python pickle", _CONVERT),
    (rb".{5}\x00\x00\x00\{\"", "a safetensors file", "Name text, not weights"),
    (rb"GGUF\x02|GGUF\x03", "a GGUF file", "Name text, not weights"),
    (rb"MMIDIDX\x00\x00", "an index of token files, which are made already", "Name the text they were made from"),
    (rb"SQLite format 3\x00", "an SQLite data base", _CONVERT),
    (rb"\x93NUMPY", "a numpy array", _CONVERT),
    (rb"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (rb"FEA1\x00", "a Feather file of version 1", _CONVERT),
    (rb"Obj\x01", "an Avro file", _CONVERT),
    (rb"\x7fELF", "a program", "Name text"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a.{0,4}[\x00-\x08]|RIFF....WEBP", "an image", "Name text"),
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a git-lfs pointer in the place of the file",
        "Fetch the file with git lfs pull",
    ),
    (rb"\s*(?i:<!doctype\s|<html[\s>])", "an HTML page", _MARKUP),
    (rb"\s*<\?xml\s", "an XML document", _MARKUP),
)
_PATTERNS = [(re.compile(pattern, re.DOTALL), name, remedy) for pattern, name, remedy in _OTHERS]
# An object, or an array of such, up to the colon behind its first key, or to where the file was cut before that.
_RECORDS = re.compile(r"""\s*(?:\[\s*)?\{\s*(?:\Z|(["'])[^"'\n]{0,200}(?:\Z|\1\s*(?::|\Z)))""")
_SOMETHING = re.compile(r"\S")
_ARROW_STREAM, _ARROW_FILE = b"\xff\xff\xff\xff", b"ARROW1\x00\x00"


@dataclass(frozen=True)
class Contents:
    """How a file is read: its format, never "auto", how it is packed and encoded; or the problem that it cannot be."""

    format: Format
    packing: Packing = "plain"
    encoding: str = UTF8
    problem: Problem | None = None


def contents_of(path: Path, format: Format = "auto") -> Contents:
    """Return what a file holds, looking at no more than its first `HEAD` bytes; `format` is right unless it is "auto".

    A file that cannot be opened, or is damaged, is what its ending says: whoever reads it will meet that.
    """
    suffix = inner_suffix(path)
    by_ending = _ENDINGS.get(suffix, "text")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return Contents(by_ending if format == "auto" else format)
    packing = packing_of(head)
    whole = len(head) < HEAD
    if packing != "plain":
        head, whole = _unpacked_head(path, packing)
    encoding, problem = _encoding_of(head)
    if format != "auto":
        return Contents(format, packing, encoding, None if format in ("parquet", "arrow") else problem)
    table = _table(head)
    if table is not None:
        return Contents(table, packing, problem=_packed_again(table, packing))
    text = head.decode(encoding, "replace" if encoding != UTF8 else "surrogateescape").removeprefix("\ufeff")
    problem = _other_format(head if encoding == UTF8 else text.encode(), packing) or problem
    if problem is not None:
        return Contents("text", packing, encoding, problem)
    found = _json_format(text, whole, suffix) or by_ending
    return Contents(found, packing, encoding, _refusal(found, suffix, text))


def _refusal(format: Format, suffix: str, text: str) -> Problem | None:
    if format != "text":
        return None
    if suffix == ".tsv":
        remedy = "Write it as CSV, or read it with --format text if it is a document itself"
        return Problem(ANOTHER_FORMAT, "it looks like a table with tabs", remedy)
    if "\0" in text:
        remedy = "Name text, or read it with --format text if that is what it is"
        return Problem(ANOTHER_FORMAT, "it has zero bytes, which text has not", remedy)
    return None


def _table(head: bytes) -> Literal["parquet", "arrow"] | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    # A stream's first message is its schema, which is not empty and far below 16 MiB.
    is_stream = head.startswith(_ARROW_STREAM) and head[4:7] != b"\0\0\0" and head[7:8] == b"\0"
    return "arrow" if is_stream or head.startswith(_ARROW_FILE) else None


def _other_format(head: bytes, packing: Packing) -> Problem | None:
    inner = packing_of(head)
    if inner != "plain":
        return _packed_again(inner, packing)
    head = head.removeprefix(UTF8_BOM)
    for pattern, name, remedy in _PATTERNS:
        if pattern.match(head):
            return Problem(ANOTHER_FORMAT, f"it looks like {name}", remedy)
    return None


def _packed_again(inner: str, packing: Packing) -> Problem | None:
    if packing == "plain":
        return None
    return Problem(ANOTHER_FORMAT, f"it looks like {inner} inside {packing}", _UNPACK)


def _encoding_of(head: bytes) -> tuple[str, Problem | None]:
    """The encoding that the byte order mark names, or the problem that there is none and it is UTF-16 or UTF-32."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding, None
    for name, zero, other in (("UTF-16LE", 1, 0), ("UTF-16BE", 0, 1)):
        # Every second byte of mostly Latin letters and signs is zero, and no other one.
        zeros = head[zero::2].count(0)
        if zeros and zeros * 10 > 7 * len(head[zero::2]) and 0 not in head[other::2]:
            return UTF8, _no_mark(name)
    for name, place in (("UTF-32LE", 0), ("UTF-32BE", 3)):
        others = b"".join(head[p::4] for p in range(4) if p != place)
        if len(head) >= 8 and 0 not in head[place::4] and others.count(0) * 10 > 9 * len(others):
            return UTF8, _no_mark(name)
    return UTF8, None


def _no_mark(name: str) -> Problem:
    remedy = f"Write it as UTF-8 (iconv -f {name} -t UTF-8 FILE > NEW)"
    return Problem("not UTF-8 text", f"it looks like {name} without a byte order mark", remedy)


def _unpacked_head(path: Path, packing: Packing) -> tuple[bytes, bool]:
    """The first bytes of what is packed, those before any damage, and whether there are no more."""
    parts: list[bytes] = []
    size = 0
    try:
        with open_bytes(path, packing) as (stream, _):
            read1: Callable[[int], bytes] = _read1(stream)
            while size < HEAD and (part := read1(HEAD - size)):
                parts.append(part)
                size += len(part)
    except DAMAGE:
        return b"".join(parts), False
    return b"".join(parts), size < HEAD


def _read1(stream: IO[bytes]) -> Callable[[int], bytes]:
    read1: Callable[[int], bytes] = stream.read1  # type: ignore[attr-defined]  # of a BufferedReader
    return read1


def _json_format(text: str, whole: bool, suffix: str) -> Format | None:
    """Which of the JSON formats the text is, "json" too where it should be one and is broken; None where it is none."""
    by_lines, first = _ENDINGS.get(suffix) == "jsonl", text.lstrip()[:1]
    start = len(text) - len(text.lstrip())
    if not first and not whole and suffix not in _DECIDED:
        return "json"  # nothing but spaces so far: prose is refused by its reader, with a remedy
    if first not in ("{", "["):
        return _behind_a_heading(text, start, whole, suffix)
    if suffix in _MAY_BEGIN_SO and not _is_json(text, start, whole):
        return None
    try:
        value, end = read_value(text, start, whole)
    except Cut:
        return "jsonl" if by_lines and first == "{" and "\n" not in text[start:] else "json"
    except (ValueError, RecursionError):
        # Of broken lines each is told by itself, which an object over several lines is not.
        is_line = by_lines and first == "{" and text[start:].partition("\n")[0].strip() != "{"
        if _RECORDS.match(text):
            return None if is_line else "json"
        return _behind_a_heading(text, start, whole, suffix)
    rest = text[end:].lstrip()
    if not rest:
        return "json"
    begins_as_records = bool(value) and (first == "{" or isinstance(value[0], dict))
    if not (begins_as_records or suffix == ".json" or by_lines or _is_json(text, end, whole)):
        return None
    if first == "[":
        return "jsonl" if by_lines or not begins_as_records else "json"
    if "\n" in text[start:end]:
        return "json"
    ends_line = "\n" in text[end : len(text) - len(rest)]
    return "jsonl" if ends_line or (by_lines and rest[0] != "{") else "json"


def _behind_a_heading(text: str, start: int, whole: bool, suffix: str) -> Format | None:
    """Which JSON format follows a first line that is none: records by lines, or JSON to the end; None for neither."""
    if suffix in _DECIDED:
        return None
    if _mostly_records(text):
        return "jsonl"
    line_end = text.find("\n", start)
    rest = text[line_end:] if line_end >= 0 else ""
    if suffix not in _MAY_BEGIN_SO and _RECORDS.match(rest) and _is_json(text, line_end, whole):
        return "json"
    return None


def _is_json(text: str, start: int, whole: bool) -> bool:
    """Whether the text is JSON values from the character `start` to its end, objects and arrays all of them."""
    try:
        while found := _SOMETHING.search(text, start):
            if found.group() not in ("{", "["):
                return False
            start = read_value(text, found.start(), whole)[1]
    except Cut:
        return True
    except (ValueError, RecursionError):
        return False
    return True


def _mostly_records(text: str) -> bool:
    """Whether most lines begin as JSON objects do, so that the first is a heading, or a broken record."""
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    return len(lines) > 2 and 2 * sum(_RECORDS.match(line) is not None for line in lines) > len(lines)

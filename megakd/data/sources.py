"""Input files: which there are, what format each has, and the records in them, read piece by piece."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from megakd.common.errors import UserError
from megakd.data.compressed import DAMAGE, inner_suffix, open_bytes
from megakd.data.records import NOT_UTF8, Item, Problem, Record, damage, missing_key
from megakd.data.tables import read_csv, read_parquet

Format = Literal["auto", "jsonl", "csv", "parquet", "text"]
ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
UTF8_BOM = b"\xef\xbb\xbf"


class Position:
    """How many bytes of its file a source that is being read has taken so far; for a progress bar."""

    def __init__(self) -> None:
        self.tell: Callable[[], int] = lambda: 0


class Source(Protocol):
    """A part of the input that is finished or not when a run is interrupted: a file, or documents held in memory.

    `size` is in bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def identity(self) -> dict[str, Any] | None:
        """JSON values that change when the contents do; None where nothing tells, and no run can go on after it."""
        ...

    def read(self, fields: Sequence[str], position: Position) -> Iterator[Item]:
        """Yield what is there in order; what cannot be read is a problem in its place, never an exception."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file as it was when the run began."""

    path: Path
    format: Format
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        return {"file": self.name, "format": self.format, "size": self.size, "mtime_ns": self.mtime_ns}

    def read(self, fields: Sequence[str], position: Position) -> Iterator[Item]:
        if self.format == "parquet":
            taken = [0]
            position.tell = lambda: taken[0]
            yield from read_parquet(self.path, fields, taken)
            return
        try:
            with open_bytes(self.path) as (stream, position.tell):
                if self.format == "jsonl":
                    yield from _read_jsonl(stream, fields)
                elif self.format == "csv":
                    yield from read_csv(stream, fields)
                else:
                    yield 1, _read_text(stream, fields)
        except OSError as error:
            yield 1, damage(error)


@dataclass(frozen=True)
class DocumentsSource:
    """Documents that the program itself makes, under the first field."""

    documents: Iterable[str]
    name: str = "document"
    size: int = field(default=0, init=False)

    def identity(self) -> None:
        return None

    def read(self, fields: Sequence[str], position: Position) -> Iterator[Item]:
        for number, document in enumerate(self.documents, start=1):
            yield number, {fields[0]: document}


def file_sources(inputs: Sequence[str], format: Format = "auto") -> list[FileSource]:
    """The files that the inputs name, each with its format; raises UserError where one cannot be looked at."""
    sources = []
    for path in find_files(inputs):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). Correct its permissions.") from error
        sources.append(FileSource(path, file_format(path, format), status.st_size, status.st_mtime_ns))
    return sources


def file_format(path: Path, format: Format = "auto") -> Format:
    """`format`, or where it is "auto" what the ending says; a file of any other ending is one document of text."""
    return ENDINGS.get(inner_suffix(path), "text") if format == "auto" else format


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that the inputs name: files, folders (walked, sorted, without dot files) and glob patterns."""
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise UserError(f"--input {text}: no such file or folder, and no file matches it as a pattern.")
        for found in paths:
            # A pattern such as ** names a folder and, besides, every file in it.
            if found.is_file():
                files.append(found)
            elif path.exists():
                files.extend(_walk(found))
    if not files:
        raise UserError(
            f"--input {' '.join(inputs)}: no file is there. Name files, folders or patterns that hold text."
        )
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _read_text(stream: IO[bytes], fields: Sequence[str]) -> Record | Problem:
    try:
        return {fields[0]: stream.read().removeprefix(UTF8_BOM).decode()}
    except UnicodeDecodeError:
        return NOT_UTF8
    except DAMAGE as error:
        return damage(error)


def _read_jsonl(stream: IO[bytes], fields: Sequence[str]) -> Iterator[Item]:
    number = 0
    try:
        for number, line in enumerate(stream, start=1):  # bytes end lines at \n only; text mode has other ideas
            if not line.isspace():
                yield number, _json_record(line, fields)
    except DAMAGE as error:
        yield number + 1, damage(error)


def _json_record(line: bytes, fields: Sequence[str]) -> Record | Problem:
    try:
        text = line.removeprefix(UTF8_BOM).decode()
    except UnicodeDecodeError:
        return NOT_UTF8
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem("not JSON", str(error))
    if not isinstance(found, dict):
        return Problem("not a JSON object", f"a {type(found).__name__}")
    record = {name: found[name] for name in fields if name in found}
    return record or missing_key(fields, found)

"""Input files: which there are, what format each has, and the records in them, read piece by piece."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from megakd.common.errors import UserError
from megakd.data.arrow_folders import INFO, SPLITS, STATE, check_members, shards_of
from megakd.data.compressed import DAMAGE, open_bytes
from megakd.data.file_contents import Contents, Format, contents_of
from megakd.data.json_records import UTF8_BOM, read_json, read_jsonl
from megakd.data.records import NOT_UTF8, Item, Problem, Record, damage
from megakd.data.tables import read_arrow, read_csv, read_parquet


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

    def read(self, fields: Sequence[str], position: Position, flags: bool = False) -> Iterator[Item]:
        """Yield what is there in order; what cannot be read is a problem in its place, never an exception.

        Records hold those of the fields that are there, and with `flags` every key that may flag what is to be learnt.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """A file as it was when the run began."""

    path: Path
    contents: Contents
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def problem(self) -> Problem | None:
        """The problem of the whole file that is known before it is read, or None."""
        return self.contents.problem

    def identity(self) -> dict[str, Any]:
        how = {"format": self.contents.format, "packing": self.contents.packing, "encoding": self.contents.encoding}
        return {"file": self.name, **how, "size": self.size, "mtime_ns": self.mtime_ns}

    def read(self, fields: Sequence[str], position: Position, flags: bool = False) -> Iterator[Item]:
        contents, taken = self.contents, [0]
        if contents.problem is not None:
            yield 1, contents.problem
            return
        if contents.format in ("parquet", "arrow"):
            position.tell = lambda: taken[0]
            read_table = read_parquet if contents.format == "parquet" else read_arrow
            yield from read_table(self.path, fields, taken, flags)
            return
        try:
            with open_bytes(self.path, contents.packing, contents.encoding) as (stream, position.tell):
                if contents.format == "text":
                    yield 1, _read_text(stream, fields)
                else:
                    readers = {"jsonl": read_jsonl, "json": read_json, "csv": read_csv}
                    yield from readers[contents.format](stream, fields, flags)
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

    def read(self, fields: Sequence[str], position: Position, flags: bool = False) -> Iterator[Item]:
        for number, document in enumerate(self.documents, start=1):
            yield number, {fields[0]: document}


def file_sources(inputs: Sequence[str], format: Format = "auto") -> list[FileSource]:
    """The files that the inputs name, each with what it holds; raises UserError where one cannot be looked at."""
    sources: list[FileSource] = []
    members: list[Path] = []
    for path in find_files(inputs):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). Correct its permissions.") from error
        contents = contents_of(path, format)
        if contents.format == "arrow" or path.name in (STATE, INFO, SPLITS):
            members.append(path)
        sources.append(FileSource(path, contents, status.st_size, status.st_mtime_ns))
    check_members(members)
    return sources


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
        shards = shards_of(Path(root))
        if shards is not None:
            folders.clear()
            yield from shards
            continue
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

"""Records from CSV, parquet and Arrow files: a row is a record, its columns are the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megakd.data.compressed import DAMAGE
from megakd.data.records import NOT_UTF8, Item, Problem, Record, chosen_keys, damage, missing_key

CSV_FIELD_LIMIT = 1 << 27  # characters; a quote that is never closed would otherwise take the rest of the file
BATCH_ROWS = 256

MALFORMED_ROW = "malformed CSV row"
FIELD_OVER_LIMIT = "CSV field over the limit"
WRONG_COLUMNS = "wrong number of columns"
ARROW_FILE, END_OF_STREAM = b"ARROW1\0\0", b"\xff\xff\xff\xff\0\0\0\0"


def read_csv(lines: IO[bytes], fields: Sequence[str], flags: bool = False) -> Iterator[Item]:
    """Yield (line where the row begins, record or problem) for each row after the header; empty lines are no rows."""
    # What does not decode becomes halves of surrogate pairs, so that a bad row costs no other row.
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    rows = csv.reader(text, strict=True)
    header: list[str] | None = None
    columns: dict[str, int] = {}
    while True:
        begin = rows.line_num + 1
        try:
            with _field_limit():
                row = next(rows, None)
        except csv.Error as error:
            yield begin, _csv_problem(error, begin, rows.line_num)
            if header is None:
                return
            continue
        except DAMAGE as error:
            yield rows.line_num + 1, damage(error)
            return
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = [name.removeprefix("\ufeff") for name in row]
            problem, columns = _csv_columns(header, fields, flags)
            if problem is not None:
                yield begin, problem
                return
        elif len(row) != len(header):
            yield begin, Problem(WRONG_COLUMNS, f"{len(row)}, and the header has {len(header)}")
        else:
            record = {name: row[column] for name, column in columns.items()}
            yield begin, record if _is_utf8(record.values()) else NOT_UTF8


def read_parquet(path: Path, fields: Sequence[str], tell: list[int], flags: bool = False) -> Iterator[Item]:
    """Yield (row, record or problem) for each row, reading only the columns named; `tell[0]` becomes the rows' share
    of the file in bytes.
    """
    import pyarrow.parquet

    row = 1
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = chosen_keys(file.schema_arrow.names, fields, flags)
            if not columns:
                yield row, missing_key(fields, file.schema_arrow.names)
                return
            total = max(file.metadata.num_rows, 1)
            for group in range(file.metadata.num_row_groups):
                batches = file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False)
                for batch in batches:
                    for record in _batch_records(batch):
                        yield row, record
                        row += 1
                    tell[0] = size * (row - 1) // total
    except (OSError, pyarrow.ArrowException) as error:
        yield row, damage(error)


def read_arrow(path: Path, fields: Sequence[str], tell: list[int], flags: bool = False) -> Iterator[Item]:
    """Yield (row, record or problem) for each row of an Arrow stream or file; `tell[0]` becomes its bytes read so far.

    The file is mapped, and only a few rows at a time become Python's objects.
    """
    import pyarrow

    row = 1
    try:
        with pyarrow.memory_map(str(path)) as file:
            for batch in _arrow_batches(file):
                columns = chosen_keys(batch.schema.names, fields, flags)
                if not columns:
                    yield row, missing_key(fields, batch.schema.names)
                    return
                for begin in range(0, batch.num_rows, BATCH_ROWS):
                    for record in _batch_records(batch.select(columns).slice(begin, BATCH_ROWS)):
                        yield row, record
                        row += 1
                tell[0] = file.tell()
    except (OSError, pyarrow.ArrowException) as error:
        yield row, damage(error)


def _arrow_batches(file: Any) -> Iterator[Any]:
    import pyarrow

    if file.read(len(ARROW_FILE)) == ARROW_FILE:
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        return
    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)
    # A stream that was cut between two batches looks complete to its reader.
    file.seek(max(file.size() - len(END_OF_STREAM), 0))
    if file.read() != END_OF_STREAM:
        raise pyarrow.ArrowInvalid("the mark at the end of an Arrow stream is not there; the file may be cut short")


def _csv_columns(header: list[str], fields: Sequence[str], flags: bool) -> tuple[Problem | None, dict[str, int]]:
    columns = {name: header.index(name) for name in chosen_keys(header, fields, flags)}
    if not columns:
        return missing_key(fields, header), {}
    for name in columns:
        if header.count(name) > 1:
            return Problem(MALFORMED_ROW, f"the header has '{name}' more than once"), {}
    return None, columns


def _csv_problem(error: csv.Error, begin: int, end: int) -> Problem:
    lines = f" (lines {begin} to {end})" if end > begin else ""
    if "field limit" in str(error):
        return Problem(FIELD_OVER_LIMIT, f"more than {CSV_FIELD_LIMIT} characters; is a quote not closed?{lines}")
    return Problem(MALFORMED_ROW, f"{error}{lines}")


@contextmanager
def _field_limit() -> Iterator[None]:
    # The csv module knows one limit for the whole process, which is the program's, not ours.
    before = csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _is_utf8(values: Iterable[str]) -> bool:
    try:
        for value in values:
            if not value.isascii():
                value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batch_records(batch: Any) -> list[Record | Problem]:
    try:
        rows: list[Record] = batch.to_pylist()
    except UnicodeDecodeError:
        return [_row_record(batch, index) for index in range(batch.num_rows)]
    import pyarrow

    # Columns of plain values, such as texts, have no objects.
    nested = any(pyarrow.types.is_nested(column.type) for column in batch.schema)
    return [_without_nulls(row) for row in rows] if nested else [*rows]


def _row_record(batch: Any, index: int) -> Record | Problem:
    try:
        return _without_nulls(batch.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return NOT_UTF8


def _without_nulls(record: Record) -> Record:
    """The record without the keys of null in its objects: a column's objects have all keys of all rows."""
    return {key: _present(value) for key, value in record.items()}


def _present(value: Any) -> Any:
    if isinstance(value, list):
        return [_present(one) for one in value]
    if isinstance(value, dict):
        return {key: _present(one) for key, one in value.items() if one is not None}
    return value

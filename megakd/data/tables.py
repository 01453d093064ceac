"""Records from CSV and parquet files: a row is a record, its columns are the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megakd.data.compressed import DAMAGE
from megakd.data.records import NOT_UTF8, Item, Problem, Record, damage, missing_key

CSV_FIELD_LIMIT = 1 << 27  # characters; a quote that is never closed would otherwise take the rest of the file
PARQUET_BATCH_ROWS = 256

MALFORMED_ROW = "malformed CSV row"
FIELD_OVER_LIMIT = "CSV field over the limit"
WRONG_COLUMNS = "wrong number of columns"


def read_csv(lines: IO[bytes], fields: Sequence[str]) -> Iterator[Item]:
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
            problem, columns = _csv_columns(header, fields)
            if problem is not None:
                yield begin, problem
                return
        elif len(row) != len(header):
            yield begin, Problem(WRONG_COLUMNS, f"{len(row)}, and the header has {len(header)}")
        else:
            record = {name: row[column] for name, column in columns.items()}
            yield begin, record if _is_utf8(record.values()) else NOT_UTF8


def read_parquet(path: Path, fields: Sequence[str], tell: list[int]) -> Iterator[Item]:
    """Yield (row, record or problem) for each row, reading only the columns named; `tell[0]` becomes the rows' share
    of the file in bytes.
    """
    import pyarrow.parquet

    row = 1
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in fields if name in names]
            if not columns:
                yield row, missing_key(fields, names)
                return
            total = max(file.metadata.num_rows, 1)
            for group in range(file.metadata.num_row_groups):
                batches = file.iter_batches(PARQUET_BATCH_ROWS, [group], columns, use_threads=False)
                for batch in batches:
                    for record in _batch_records(batch):
                        yield row, record
                        row += 1
                    tell[0] = size * (row - 1) // total
    except (OSError, pyarrow.ArrowException) as error:
        yield row, damage(error)


def _csv_columns(header: list[str], fields: Sequence[str]) -> tuple[Problem | None, dict[str, int]]:
    columns = {name: header.index(name) for name in fields if name in header}
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
        rows: list[Record | Problem] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        return [_row_record(batch, index) for index in range(batch.num_rows)]


def _row_record(batch: Any, index: int) -> Record | Problem:
    try:
        record: Record = batch.slice(index, 1).to_pylist()[0]
        return record
    except UnicodeDecodeError:
        return NOT_UTF8

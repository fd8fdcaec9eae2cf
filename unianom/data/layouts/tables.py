"""CSV files and other tables that name the images of a data set."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from unianom.data.layouts.source import Source
from unianom.errors import DataError


def read_table(source: Source, path: str, columns: Sequence[str], key: str) -> list[tuple[str, dict[str, str]]]:
    """Return rows of a CSV file, each with what to call its place in an error message.

    Args:
        source: where it lies.
        path: of the file.
        columns: names of the columns that must be there, in any order and among others.
        key: column that names a row.

    Raises:
        DataError: there is no such file, it is not text, lacks a column or has no rows, or two rows have one name.
    """
    where = source.uri(path)
    try:
        text = source.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; fetch the file again") from error
    reader = csv.DictReader(io.StringIO(text), restval="")
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{where} lacks the column {', '.join(missing)}; its header should be {','.join(columns)}")
    rows: list[tuple[str, dict[str, str]]] = []
    names: set[str] = set()
    for row in reader:
        if row[key] in names:
            raise DataError(f"line {reader.line_num} of {where} names {row[key]} a second time")
        names.add(row[key])
        rows.append((f"line {reader.line_num} of {where}", row))
    if not rows:
        raise DataError(f"{where} has a header but no rows")
    return rows


TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of files that `Table` reads."""


class Table:
    """A table whose rows are read as they are asked for, any number of times; its file is held in memory as it is.

    Args:
        source: where it lies.
        path: of a CSV file with commas, semicolons or tabs, a file of JSON lines or one JSON list of objects, or a
            Parquet file, as its ending says.

    Raises:
        DataError: there is no such file, or its ending is another.
    """

    def __init__(self, source: Source, path: str) -> None:
        self._where = source.uri(path)
        name = (path or source.name).lower()
        if name.endswith(".parquet"):
            self._rows = _parquet_rows
        elif name.endswith((".jsonl", ".ndjson", ".json")):
            self._rows = _json_rows
        elif name.endswith((".csv", ".tsv", ".txt")):
            self._rows = _csv_rows
        else:
            endings = ", ".join(TABLE_ENDINGS)
            raise DataError(f"{self._where} is no table that can be read; its name should end in {endings}")
        self._data = source.read(path)

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield rows, each with what to call its place in an error message; every value as text, "" for none.

        Raises:
            DataError: it is not what its ending says, or has no rows.
        """
        empty = True
        for row in self._rows(self._data, self._where):
            empty = False
            yield row
        if empty:
            raise DataError(f"{self._where} has no rows")


@contextmanager
def _text(data: bytes, where: str) -> Iterator[io.TextIOWrapper]:
    """Give the lines of a text, ended by a line feed alone."""
    try:
        yield io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; save it as UTF-8") from error


def _csv_rows(data: bytes, where: str) -> Iterator[tuple[str, dict[str, str]]]:
    with _text(data, where) as text:
        header = text.readline()
        delimiter = max(",;\t", key=header.count)  # spreadsheets write semicolons where commas are decimal points
        lines = chain([header], text)
        reader = csv.DictReader(lines, restval="", delimiter=delimiter, skipinitialspace=True)
        try:
            for row in reader:
                values = {str(key).strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
                yield f"line {reader.line_num} of {where}", values
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {where} is not CSV: {error}") from error


def _json_rows(data: bytes, where: str) -> Iterator[tuple[str, dict[str, str]]]:
    with _text(data, where) as text:
        try:
            whole = data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            for number, line in enumerate(json.load(text) if whole else text, 1):
                if isinstance(line, str) and not line.strip():
                    continue
                row = json.loads(line) if isinstance(line, str) else line
                if not isinstance(row, dict):
                    raise DataError(f"line {number} of {where} is not a JSON object")
                yield f"line {number} of {where}", {key: _plain(value) for key, value in row.items()}
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} holds no JSON lines: {error}") from error


def _parquet_rows(data: bytes, where: str) -> Iterator[tuple[str, dict[str, str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        plain = [field.name for field in file.schema_arrow if not _is_bulky(field.type)]
        for batch in file.iter_batches(batch_size=1024, columns=plain):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number} of {where}", {key: _plain(value) for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is no Parquet file: {error}") from error


def _is_bulky(kind: Any) -> bool:
    """Return whether a column of Parquet holds no single values, but images or lists."""
    import pyarrow as pa

    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _plain(value: Any) -> str:
    """Return a value as text, as it stands in a CSV file: true, 1, 0.5."""
    if value is None or value != value:  # NaN, what pandas writes for none
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value)

"""CSV files and other tables that name the images of a data set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
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
"""Endings of files that `read_rows` reads."""


def read_rows(source: Source, path: str) -> list[tuple[str, dict[str, str]]]:
    """Return rows of a table, each with what to call its place in an error message; every value as text, "" for none.

    Args:
        source: where it lies.
        path: of a CSV file with commas, semicolons or tabs, a file of JSON lines or one JSON list of objects, or a
            Parquet file, as its ending says.

    Raises:
        DataError: there is no such file, its ending is another, it is not what its ending says, or has no rows.
    """
    where = source.uri(path)
    name = (path or source.name).lower()
    data = source.read(path)
    if name.endswith(".parquet"):
        rows = _parquet_rows(data, where)
    elif name.endswith((".jsonl", ".ndjson", ".json")):
        rows = _json_rows(_text(data, where), where)
    elif name.endswith((".csv", ".tsv", ".txt")):
        rows = _csv_rows(_text(data, where), where)
    else:
        raise DataError(f"{where} is no table that can be read; its name should end in {', '.join(TABLE_ENDINGS)}")
    if not rows:
        raise DataError(f"{where} has no rows")
    return rows


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; save it as UTF-8") from error


def _csv_rows(text: str, where: str) -> list[tuple[str, dict[str, str]]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets write semicolons where commas are decimal points
    reader = csv.DictReader(io.StringIO(text), restval="", delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        for row in reader:
            values = {str(key).strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
            rows.append((f"line {reader.line_num} of {where}", values))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {where} is not CSV: {error}") from error
    return rows


def _json_rows(text: str, where: str) -> list[tuple[str, dict[str, str]]]:
    rows = []
    try:
        whole = text.lstrip()
        lines = enumerate(json.loads(whole), 1) if whole.startswith("[") else enumerate(text.split("\n"), 1)
        for number, line in lines:
            if isinstance(line, str) and not line.strip():
                continue
            row = json.loads(line) if isinstance(line, str) else line
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {where} is not a JSON object")
            rows.append((f"line {number} of {where}", {key: _plain(value) for key, value in row.items()}))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} holds no JSON lines: {error}") from error
    return rows


def _parquet_rows(data: bytes, where: str) -> list[tuple[str, dict[str, str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        plain = [field.name for field in pq.read_schema(pa.BufferReader(data)) if not _is_bulky(field.type)]
        table = pq.read_table(pa.BufferReader(data), columns=plain)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is no Parquet file: {error}") from error
    rows = table.to_pylist()
    return [
        (f"row {number} of {where}", {key: _plain(value) for key, value in row.items()})
        for number, row in enumerate(rows, 1)
    ]


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

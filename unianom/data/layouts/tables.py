"""CSV files that name the images of a data set."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

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

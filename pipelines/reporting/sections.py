"""Sections that other jobs leave for a report."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.reporting.samples import data_uri
from unianom import files
from unianom.errors import DataError


@dataclass(frozen=True)
class Section:
    """Section of a report that another job wrote.

    Attributes:
        title: its heading.
        text: paragraphs.
        tables: title, columns and rows of each.
        figures: title and data URI of each.
    """

    title: str
    text: list[str]
    tables: list[tuple[str, list[str], list[list[str]]]]
    figures: list[tuple[str, str]]


def read_section(folder: str) -> Section:
    """Read `section.json` of a folder, and the PNG files it names.

    Raises:
        DataError: there is none, it has another form, or a picture is missing or no PNG.
    """
    path = files.join(folder, "section.json")
    try:
        content = files.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give as a section a folder whose job wrote one") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; run the job that wrote it again") from error
    try:
        tables = [
            (str(t["title"]), list(map(str, t["columns"])), [list(map(str, row)) for row in t["rows"]])
            for t in content["tables"]
        ]
        names = [(str(figure["title"]), str(figure["file"])) for figure in content["figures"]]
        title, text = str(content["title"]), list(map(str, content["text"]))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no section of a report ({type(error).__name__}: {error}); it needs title, text, tables and "
            f"figures"
        ) from error
    for name, columns, rows in tables:
        if any(len(row) != len(columns) for row in rows):
            raise DataError(f"table '{name}' of {path} has a row of other length than its {len(columns)} columns")
    return Section(title, text, tables, [(words, _section_picture(folder, file)) for words, file in names])


def _section_picture(folder: str, name: str) -> str:
    """Return a picture of a section as a data URI."""
    if not files.is_plain_name(name):
        raise DataError(f"section {folder} names the picture {name}; pictures must lie beside section.json")
    path = files.join(folder, name)
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}, which section.json beside it names; run the job that wrote it again") from error
    if not content.startswith(b"\x89PNG"):
        raise DataError(f"{path} is no PNG; a section's pictures must be")
    return data_uri("png", content)

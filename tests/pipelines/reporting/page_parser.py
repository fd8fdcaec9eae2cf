"""Parses reports strictly, for tests of what stands on them."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass
class Figure:
    """A card: its sample, the block it stands in, whether it is large, its pictures by alternative text, its words."""

    sample: str
    block: str
    large: bool
    plain: str
    images: list[tuple[str, str]] = field(default_factory=list)
    words: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    @property
    def verdict(self) -> str:
        found = re.search(r"\b(missed|found|false alarm|passed|flagged|review)\b", self.text)
        return found[1] if found else ""

    @property
    def scores(self) -> list[float]:
        return [float(value) for value in re.findall(r"score ([\d.]+)", self.text)]

    def pixels(self, alt: str) -> np.ndarray:
        """Return the picture whose alternative text starts so; "plain" is the one below the heat map."""
        uri = self.plain if alt == "plain" else next(src for name, src in self.images if name.startswith(alt))
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


class Page(HTMLParser):
    """Parses a page strictly: every element that is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.figures: list[Figure] = []
        self.pictures: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.notices: list[str] = []
        self._table = ""
        self._cell: list[str] | None = None
        self._best: dict[str, list[list[bool]]] = {}
        self._words: list[str] = []
        self._first: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        self._add(" ")
        if tag not in VOID:
            self.open.append((tag, given))
        classes = given.get("class", "").split()
        if tag == "table":
            self._table = given.get("id") or f"table {len(self.tables)}"
            assert self._table not in self.tables, "an id is used twice"
            self.tables[self._table], self._best[self._table] = [], []
        elif tag == "tr":
            self.tables[self._table].append([])
            self._best[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = []
            self._best[self._table][-1].append("best" in classes)
        elif tag == "figure":
            blocks = [of.get("data-category") or of.get("data-group") for _, of in self.open]
            plain = re.search(r"--plain: url\((.*?)\)", given.get("style", ""))
            block = next(filter(None, reversed(blocks)), "")
            self.figures.append(Figure(given["data-sample"], block, "large" in classes, plain[1] if plain else ""))
        elif tag == "img":
            inside = any(name == "figure" for name, _ in self.open)
            (self.figures[-1].images if inside else self.pictures).append((given["alt"], given["src"]))
        elif "notice" in classes:
            self.notices.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag
        self._add(" ")
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._table][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] in ("style", "script"):
            return
        if self._cell is not None:
            self._cell.append(data)
        if any("notice" in of.get("class", "").split() for _, of in self.open):
            self.notices[-1] += data
        self._add(data)

    def _add(self, data: str) -> None:
        self._words.append(data)
        if any(of.get("id") == "answer" for _, of in self.open):
            self._first.append(data)
        if any(tag == "figure" for tag, _ in self.open):
            self.figures[-1].words += data

    @property
    def text(self) -> str:
        """All words."""
        return " ".join("".join(self._words).split())

    @property
    def first_screen(self) -> str:
        """The words of the first section."""
        return " ".join("".join(self._first).split())

    def row(self, table: str, name: str) -> list[str]:
        """Return the cells of a row after its name."""
        (found,) = [row[1:] for row in self.tables[table] if row[0] == name]
        return found

    def best(self, table: str) -> list[tuple[str, tuple[list[str], list[bool]]]]:
        """Return the rows of a table: name, cells, and which of them are marked as the best."""
        rows = zip(self.tables[table], self._best[table], strict=True)
        return [(cells[0], (cells[1:], marks[1:])) for cells, marks in rows]

    def block(self, name: str, large: bool | None = None) -> list[Figure]:
        """Return the figures of a category or group."""
        return [one for one in self.figures if one.block == name and large in (None, one.large)]

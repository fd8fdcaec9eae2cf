"""Ranges of neighbouring rows of a part: what is worked on, and committed, at once.

A range is small enough that losing a worker costs seconds, and cut where row groups begin as far as that allows, so
that nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

MOST_ROWS = 512
"""Rows of a range, at most."""

FEW, FEW_ROWS = 1000, 64
"""Of so few images a range has no more rows than this, so that all cores of one machine have some."""

MOST_BYTES = 16 << 20
"""Bytes of the row groups of which a range takes several, at most."""


class RowGroup(NamedTuple):
    """A row group of a part.

    Attributes:
        rows: how many it has.
        bytes: what it takes in the file.
        wanted: whether it can hold a row that is asked for.
    """

    rows: int
    bytes: int
    wanted: bool


@dataclass(frozen=True)
class RowRange:
    """Neighbouring rows of a part.

    Attributes:
        part: name of the part.
        first: number of the first row in the part.
        rows: how many.
        opens: whether no other range of the part comes before it; whoever reads this one compares the part's checksum.
    """

    part: str
    first: int
    rows: int
    opens: bool

    @property
    def end(self) -> int:
        """Number of the row after the last."""
        return self.first + self.rows


def range_rows(images: int) -> int:
    """Return how many rows a range of so many images has, at most."""
    return FEW_ROWS if images <= FEW else MOST_ROWS


def cut_ranges(part: str, groups: Iterable[RowGroup], most_rows: int = MOST_ROWS) -> list[RowRange]:
    """Cut the wanted row groups of a part into ranges, in order.

    Neighbouring groups make one range while it stays within `most_rows` and `MOST_BYTES`; a group of more rows is cut
    into even pieces.
    """
    places = list(_places(groups, most_rows))
    return [RowRange(part, first, rows, number == 0) for number, (first, rows) in enumerate(places)]


def _places(groups: Iterable[RowGroup], most_rows: int) -> Iterator[tuple[int, int]]:
    """Yield first row and rows of each range."""
    first = rows = size = 0
    for group in groups:
        if rows and (not group.wanted or rows + group.rows > most_rows or size + group.bytes > MOST_BYTES):
            yield from _pieces(first, rows, most_rows)
            first, rows, size = first + rows, 0, 0
        if group.wanted:
            rows, size = rows + group.rows, size + group.bytes
        else:
            first += group.rows
    if rows:
        yield from _pieces(first, rows, most_rows)


def _pieces(first: int, rows: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Yield even pieces of at most `most_rows`."""
    count = -(-rows // most_rows)
    edges = [first + rows * number // count for number in range(count + 1)]
    for start, end in pairwise(edges):
        yield start, end - start

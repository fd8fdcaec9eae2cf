"""What listings give: entries of folders, in memory or in a temporary database."""

from __future__ import annotations

import posixpath
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo"),
    *(".bmp", ".dib", ".tif", ".tiff", ".webp"),
)
"""Endings of an image's name, in any case."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of one file or folder.

    Attributes:
        path: path relative to the source's root.
        size: bytes of a file, None where the file system does not tell.
        is_folder: whether it is a folder.
    """

    path: str
    size: int | None
    is_folder: bool

    @property
    def name(self) -> str:
        """Last part of the path."""
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        """Name without its last ending."""
        return posixpath.splitext(self.name)[0]

    @property
    def ending(self) -> str:
        """Last ending of the name in small letters, with its dot; "" if it has none."""
        return posixpath.splitext(self.name)[1].lower()

    @property
    def is_image(self) -> bool:
        """Whether the name ends like an image's. A folder may: it is listed as a sample, for ingest to reject."""
        return self.ending in IMAGE_SUFFIXES


class StoredEntries:
    """Entries in the order in which they are added.

    Args:
        database: see `unianom.temporary_database`; holds nothing else of these names.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("create table entries (path, size, is_folder)")

    def add(self, entries: Iterable[Entry]) -> range:
        """Add entries; return the places at which they are kept."""
        before = self._count()
        rows = ((entry.path, entry.size, entry.is_folder) for entry in entries)
        self._database.executemany("insert into entries values (?, ?, ?)", rows)
        return range(before, self._count())

    def at(self, places: range) -> Iterator[Entry]:
        """Yield the entries at these places in their order."""
        return self._select("where rowid > ? and rowid <= ? order by rowid", places.start, places.stop)

    def by_path(self) -> Iterator[Entry]:
        """Yield all entries sorted by path."""
        return self._select("order by path")

    def _count(self) -> int:
        return int(self._database.execute("select coalesce(max(rowid), 0) from entries").fetchone()[0])

    def _select(self, which: str, *values: int) -> Iterator[Entry]:
        found = self._database.execute(f"select path, size, is_folder from entries {which}", values)
        return (Entry(path, size, bool(is_folder)) for path, size, is_folder in found)

"""A source folder that is listed but never opened."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from unianom.data.layouts.entries import Entry, StoredEntries
from unianom.data.layouts.left_out import CountedFiles, LeftOut
from unianom.data.layouts.names import listed
from unianom.data.schema import Crop, SampleRef
from unianom.errors import DataError, storage_error
from unianom.files import check_regular, composed_otherwise, is_chained, iter_infos, resolve
from unianom.temporary_database import temporary_database

_LITTER = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "found.000"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@sharebin", "@tmp"),
        *("network trash folder", "temporary items", "thevolumesettingsfolder", "__pycache__"),
    }
)
"""What systems and network drives lay beside people's files, such as thumbnails and waste bins; in small letters."""

MOST_LISTED = 20
"""Folders that are listed to count the images in one that is left out; beside a data set may lie a whole archive."""

MOST_IN_MEMORY = 50_000
"""Entries of one folder up to which they are sorted in memory."""


@dataclass(frozen=True)
class Source:
    """A root folder on any file system. All paths in and out are relative to the root, "" being the root itself.

    Attributes:
        fs: file system.
        root: path of the root on it.
        dataset: data set name that sample_ids begin with.
        left_out: what was seen and not taken, so far.
        listings: what each folder holds, by its path on the file system; every folder is then listed once. None lists
            anew each time.
    """

    fs: fsspec.AbstractFileSystem
    root: str
    dataset: str
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    listings: dict[str, list[Entry]] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, uri: str | os.PathLike[str], dataset: str = "", left_out: LeftOut | None = None) -> Source:
        """Return the source at a local path or URI; `dataset` is the root's name if empty.

        Raises:
            DataError: unknown URI scheme, or a chained URI ("zip://…::file.zip").
        """
        text = os.fspath(uri)
        if is_chained(text):
            raise DataError(
                f"cannot list {text}: chained URIs are not supported; unpack the archive and name its folder"
            )
        fs, path = resolve(text)
        fs.invalidate_cache()
        root = posixpath.normpath(path) if isinstance(fs, LocalFileSystem) else path.rstrip("/")
        return cls(fs, root, dataset or posixpath.basename(root) or "data", left_out or LeftOut())

    def at(self, folder: str) -> Source:
        """Return a folder below the root as the root; ".." is the folder above."""
        return replace(self, root=posixpath.dirname(self.root) if folder == ".." else self._inside(folder))

    @property
    def name(self) -> str:
        """Name of the root."""
        return posixpath.basename(self.root)

    def _inside(self, path: str) -> str:
        return posixpath.join(self.root, path) if path else self.root

    def uri(self, path: str = "") -> str:
        """Return the absolute path or URI of something below the root."""
        inside = self._inside(path)
        return inside if isinstance(self.fs, LocalFileSystem) else self.fs.unstrip_protocol(inside)

    def locate(self, path: str) -> str:
        """Return the path or URI of what an option or manifest names: relative to the root, unless absolute or a
        URI."""
        if "://" in path or path.startswith("/"):
            return path
        return replace(self, root=posixpath.normpath(self._inside(path))).uri()

    def sample_id(self, path: str) -> str:
        """Return the name of the sample whose image lies at `path`."""
        return f"{self.dataset}/{path}"

    def sample(
        self,
        image: Entry,
        *,
        category: str,
        split: str,
        label: int | None,
        defect: str | None,
        mask: str | Sequence[str] | None = None,
        mask_threshold: int | None = None,
        crop: Crop | None = None,
    ) -> SampleRef:
        """Return the sample of a listed image; `mask` is the path of its mask, if it has one, or of several to be
        united."""
        masks = [mask] if isinstance(mask, str) else list(mask or ())
        return SampleRef(
            sample_id=self.sample_id(image.path),
            dataset=self.dataset,
            category=category,
            split=split,
            label=label,
            defect=defect,
            uri=self.uri(image.path),
            mask_uri=self.uri(masks[0]) if masks else None,
            mask_threshold=mask_threshold,
            size=image.size,
            crop=crop,
            more_masks=tuple(self.uri(path) for path in masks[1:]),
        )

    def entries(self, folder: str = "") -> list[Entry]:
        """Return files and folders directly in `folder`, sorted by name, without dot files and other litter.

        Raises:
            DataError: the folder is not there, is a file or cannot be listed, or a name is not valid UTF-8.
        """
        inside = self._inside(folder)
        if self.listings is not None:
            if inside not in self.listings:
                self.listings[inside] = replace(self, listings=None).entries(folder)
            return [replace(entry, path=posixpath.join(folder, entry.name)) for entry in self.listings[inside]]
        return sorted(self._entries(folder), key=lambda entry: entry.path)

    def iter_entries(self, folder: str = "") -> Iterator[Entry]:
        """Yield what `entries` returns; those of a large folder are not held in memory."""
        if self.listings is not None:
            yield from self.entries(folder)
            return
        found = self._entries(folder)
        few = list(islice(found, MOST_IN_MEMORY + 1))
        if len(few) <= MOST_IN_MEMORY:
            yield from sorted(few, key=lambda entry: entry.path)
            return
        with temporary_database() as database:
            stored = StoredEntries(database)
            stored.add(chain(few, found))
            del few
            yield from stored.by_path()

    def _entries(self, folder: str) -> Iterator[Entry]:
        inside = self._inside(folder)
        for info in self._infos(folder):
            if info["name"] == inside and info["type"] == "file":
                raise DataError(f"{self.uri(folder)} is a file; a folder is expected")
            path = info["name"].rstrip("/")
            name = posixpath.basename(path)
            if path == inside or name.startswith(".") or name.lower() in _LITTER:
                continue  # object stores list a folder's own placeholder in it
            if not name.isascii():
                _check_name(name, self.uri(folder))
            is_folder = info["type"] == "directory" or (info.get("islink", False) and self.fs.isdir(path))
            if is_folder and info.get("islink", False) and self._leads_back(folder, path):
                self.left_out.links.add(self.uri(posixpath.join(folder, name)))
                continue
            size = None if is_folder else info.get("size")
            yield Entry(posixpath.join(folder, name), size, is_folder)

    def _infos(self, folder: str) -> Iterator[dict[str, Any]]:
        """Yield what the file system says of what lies in a folder."""
        try:
            yield from iter_infos(self.fs, self._inside(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"no folder {self.uri(folder)}; check the path of the source") from error
        except Exception as error:  # a remote file system raises whatever its client library does
            raise storage_error(error) or DataError(f"cannot list {self.uri(folder)}: {error}") from error

    def _leads_back(self, folder: str, link: str) -> bool:
        """Return whether a link in `folder` leads to a folder that it lies in, by whatever links one came there."""
        target = os.path.realpath(link)
        parts = folder.split("/") if folder else []
        places = [os.path.realpath(self._inside("/".join(parts[:depth]))) for depth in range(len(parts) + 1)]
        return any(os.path.commonpath([place, target]) == target for place in places)

    def folders(self, folder: str = "") -> list[str]:
        """Return sorted names of the folders in `folder`, without those named like images."""
        return [entry.name for entry in self.entries(folder) if entry.is_folder and not entry.is_image]

    def has_folder(self, path: str) -> bool:
        """Return whether there is such a folder."""
        above, _, name = self._inside(path).rpartition("/")
        if path and self.listings is not None and above in self.listings:
            return any(entry.is_folder and entry.name == name for entry in self.listings[above])
        return bool(self.fs.isdir(self._inside(path)))

    def has_file(self, path: str) -> bool:
        """Return whether there is such a file."""
        return bool(self.fs.isfile(self._inside(path)))

    def read(self, path: str = "") -> bytes:
        """Return the content of a file that belongs to the layout itself: a split file, a mask that tells the label.

        Raises:
            DataError: the file is not there.
        """
        try:
            check_regular(self.fs, self._inside(path))
            return bytes(self.fs.cat_file(self._inside(path)))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DataError(f"no file {self.uri(path)}; check the path of the source") from error
        except OSError as error:
            raise storage_error(error) or DataError(f"cannot read {self.uri(path)}: {error}") from error

    def images(self, folder: str) -> list[Entry]:
        """Return images directly in `folder`, sorted; what else lies there is left out.

        Raises:
            DataError: there are none.
        """
        entries = self.entries(folder)
        images = [entry for entry in entries if entry.is_image]
        self.leave_out(folder, [entry for entry in entries if not entry.is_image])
        if not images:
            raise DataError(f"no images in {self.uri(folder)}; found: {self.found(folder)}")
        return images

    def walk(self, folder: str = "", skip: Collection[str] = ()) -> Iterator[Entry]:
        """Yield all images in and below `folder`, lazily, each folder sorted; other files are left out. Folders of the
        paths `skip` are not entered."""
        others = CountedFiles()
        for entry in self.iter_entries(folder):
            if entry.is_image:
                yield entry
            elif not entry.is_folder:
                others.add(entry.ending, self.uri(entry.path))
            elif entry.path not in skip:
                yield from self.walk(entry.path, skip)
        self.left_out.set_files(self.uri(folder), others)
        self.fs.dircache.pop(self._inside(folder), None)  # where a remote file system keeps every listing

    def leave_out(self, folder: str, entries: Iterable[Entry]) -> None:
        """Record that some entries of a folder are not taken, so that a summary can say so."""
        others = CountedFiles()
        for entry in entries:
            where = self.uri(entry.path)
            if not entry.is_folder:
                others.add(entry.ending, where)
            elif where not in self.left_out.folders:
                self.left_out.folders[where] = self._count_images(entry.path)
        self.left_out.set_files(self.uri(folder), others)

    def _count_images(self, folder: str) -> int:
        count, pending = 0, [folder]
        for _ in range(MOST_LISTED):
            if not pending:
                break
            try:
                entries = self.entries(pending.pop(0))
            except DataError:  # what is not taken need not be readable
                continue
            count += sum(entry.is_image for entry in entries)
            pending += [entry.path for entry in entries if entry.is_folder and not entry.is_image]
        return count

    def spelt(self, path: str) -> str:
        """Return a path as the file system spells it, where its accents are composed otherwise; else the path
        itself."""
        found = None if path.isascii() else composed_otherwise(self.uri(path))
        if found is None or self.has_folder(path):
            return path
        return posixpath.relpath(found, self.uri())

    def images_below(self, folder: str, skip: Collection[str] = ()) -> Iterator[Entry]:
        """Walk as `walk` does.

        Raises:
            DataError: there are none.
        """
        empty = True
        for entry in self.walk(folder, skip):
            empty = False
            yield entry
        if empty:
            raise DataError(f"no images in or below {self.uri(folder)}; found: {self.found(folder)}")

    def require(self, folder: str, below: str, expected: str) -> str:
        """Return the path of the folder `below` in `folder`.

        Raises:
            DataError: it is not there; says what is, and the layout that was `expected`.
        """
        reached = folder
        for part in below.split("/"):
            if part not in self.folders(reached):
                inside = "" if reached == folder else f" in {posixpath.relpath(reached, folder or '.')}"
                raise DataError(
                    f"no {below} under {self.uri(folder)}; found{inside}: {self.found(reached)}; expected {expected}"
                )
            reached = posixpath.join(reached, part)
        return reached

    def found(self, folder: str = "") -> str:
        """Return what lies in a folder, for error messages."""
        return listed(entry.name + "/" * entry.is_folder for entry in self.entries(folder))


def _check_name(name: str, where: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {name!r} in {where} is not valid UTF-8; rename the file") from error

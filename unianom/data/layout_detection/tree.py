"""The folders of a source as one tree, listed once, and what file names say of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from unianom.data.layout_detection.words import Meaning, meaning
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.errors import DataError

MOST_FOLDERS = 20_000
"""A source of more folders is no single data set but a whole archive."""

SAMPLED = 300
"""Names that are looked at to tell how masks are named."""


@dataclass(frozen=True)
class Node:
    """A folder.

    Attributes:
        path: from the root of the source; "" is the root.
        name: its name.
        images: files with the ending of an image directly in it.
        folders: those in it, sorted by name.
        total: images in and below it.
    """

    path: str
    name: str
    images: tuple[Entry, ...]
    folders: tuple[Node, ...]
    total: int

    @property
    def meaning(self) -> Meaning:
        """What its name says."""
        return meaning(self.name)

    @property
    def is_masks(self) -> bool:
        """Whether it is named like a folder of masks."""
        return self.meaning.role == "mask"

    def holders(self) -> list[Node]:
        """Return the folders in it that hold images which may be data: no masks, no results."""
        return [node for node in self.folders if node.total and node.meaning.role not in ("mask", "other")]

    def walk(self) -> Iterator[Node]:
        """Yield it and all folders below."""
        yield self
        for node in self.folders:
            yield from node.walk()

    def all_images(self) -> Iterator[Entry]:
        """Yield images in and below it, but none of folders of masks."""
        yield from self.images
        for node in self.folders:
            if not node.is_masks:
                yield from node.all_images()

    def masks(self) -> Iterator[Node]:
        """Yield the topmost folders of masks below it that hold images."""
        for node in self.folders:
            if node.is_masks:
                if node.total:
                    yield node
            else:
                yield from node.masks()


def read_tree(source: Source) -> Node:
    """List all folders of a source.

    Raises:
        DataError: there are too many of them, or one cannot be listed.
    """
    count = 0

    def read(path: str, name: str) -> Node:
        nonlocal count
        count += 1
        if count > MOST_FOLDERS:
            raise DataError(
                f"{source.uri()} holds more than {MOST_FOLDERS:,} folders; name that of one data set, or its layout"
            )
        entries = source.entries(path)
        folders = tuple(read(entry.path, entry.name) for entry in entries if entry.is_folder and not entry.is_image)
        images = tuple(entry for entry in entries if entry.is_image)
        return Node(path, name, images, folders, len(images) + sum(node.total for node in folders))

    return read("", source.name)


@dataclass(frozen=True)
class Affixes:
    """How masks are named: before and after the stem of their image, and how many of those looked at are."""

    prefix: str
    suffix: str
    share: float


def find_affixes(masks: Iterable[Entry], images: Iterable[Entry]) -> Affixes | None:
    """Return how masks in folders of their own are named after images; None if hardly any is."""
    stems = {same_name(name) for image in images for name in (image.stem, image.name)}
    sampled = [same_name(mask.stem) for mask in list(masks)[:SAMPLED]]
    exact = sum(stem in stems for stem in sampled)
    if exact >= 0.5 * len(sampled):
        return Affixes("", "", exact / len(sampled)) if exact else None
    counts: Counter[tuple[str, str]] = Counter()
    for stem in sampled:
        end = next((end for end in range(len(stem) - 1, 0, -1) if stem[:end] in stems), 0)
        if end:
            counts["", stem[end:]] += 1
        start = next((start for start in range(1, len(stem)) if stem[start:] in stems), 0)
        if start:
            counts[stem[:start], ""] += 1
    found = [*counts.most_common(1), (("", ""), exact)]
    (prefix, suffix), count = max(found, key=lambda pair: pair[1])
    return Affixes(prefix, suffix, count / len(sampled)) if count else None


def find_beside(images: list[Entry]) -> Affixes | None:
    """Return how masks are named that lie beside their images; None if there are none.

    Names tell them: "_mask", "_label", "_gt" and the like after or before the stem of another image of that folder; or
    each PNG lies beside an image of the same stem and another ending.
    """
    folders: dict[str, set[str]] = {}
    for image in images:
        folders.setdefault(image.path.rpartition("/")[0], set()).add(image.stem)
    counts: Counter[tuple[str, str]] = Counter()
    for image in images:
        stem, stems = image.stem, folders[image.path.rpartition("/")[0]]
        for mark in "_-. ":
            before, found, after = stem.rpartition(mark)
            if found and meaning(after).role == "mask" and before in stems:
                counts["", mark + after] += 1
            before, found, after = stem.partition(mark)
            if found and meaning(before).role == "mask" and after in stems:
                counts[before + mark, ""] += 1
    if counts:
        (prefix, suffix), count = counts.most_common(1)[0]
        return Affixes(prefix, suffix, 2 * count / len(images))
    stems_of: dict[tuple[str, str], set[str]] = {}
    for image in images:
        stems_of.setdefault((image.path.rpartition("/")[0], image.stem), set()).add(image.ending)
    pngs = [endings for endings in stems_of.values() if ".png" in endings]
    pairs = sum(len(endings) == 2 for endings in pngs)
    if pairs and pairs >= 0.9 * len(pngs):
        return Affixes("", "", 2 * pairs / len(images))
    return None

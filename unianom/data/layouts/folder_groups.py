"""Which folders of the `folder` layout hold which images."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from unianom.data.layouts.entries import Entry
from unianom.data.layouts.folder_options import EVERY, FolderOptions, Split
from unianom.data.layouts.names import choose
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.errors import DataError, OptionError


@dataclass(frozen=True, eq=False)
class Place:
    """Where the images of one category lie.

    Attributes:
        category: its name.
        root: folder that paths are taken from; None where a path could be of any category.
        levels: folders of train, val and test that are there, by split and in that order.
    """

    category: str
    root: str | None
    levels: dict[Split, str]


@dataclass(frozen=True, eq=False)
class Group:
    """A folder of images alike.

    Attributes:
        place: of which category.
        folder: path from the root of the source.
        split: of its images, unless a draw or an option says otherwise.
        label: 0 normal, 1 anomalous; None where nobody knows or only masks tell.
        defect: of anomalous images.
        drawn_from: whether images to test are drawn from its normal ones.
    """

    place: Place = field(repr=False)
    folder: str
    split: Split
    label: int | None
    defect: str = "anomaly"
    drawn_from: bool = False


def find_places(source: Source, options: FolderOptions) -> list[Place]:
    """Return the places of all categories.

    Raises:
        DataError: the folder `images` is not there.
        OptionError: one of `categories` is not there.
    """
    base = _clean(source, options.images)
    levels = _levels(source, options, base)
    if not options.categories:
        return [Place(options.category or source.dataset, base, levels)]
    folders = sorted({name for level in levels.values() for name in source.folders(level)})
    if not levels:
        masks = {name.strip("/").partition("/")[0] for name in options.mask_folders}
        folders = [name for name in source.folders(base) if name not in masks or name in options.categories]
    wanted = () if options.categories == (EVERY,) else options.categories
    places = []
    for name in choose(wanted, folders, source.uri(base)):
        inside = {split: f"{level}/{name}" for split, level in levels.items() if source.has_folder(f"{level}/{name}")}
        root = posixpath.join(base, name)
        places.append(Place(name, None, inside) if levels else Place(name, root, _levels(source, options, root)))
    if not places:
        raise DataError(f"no folders of categories in {source.uri(base)}; found: {source.found(base)}")
    return places


def _clean(source: Source, path: str) -> str:
    path = posixpath.normpath(path) if path else ""
    return "" if path == "." else source.spelt(path)


def _levels(source: Source, options: FolderOptions, root: str) -> dict[Split, str]:
    folders = {split: posixpath.join(root, name) for split, name in options.split_folders.items() if name}
    return {split: folder for split, folder in folders.items() if source.has_folder(folder)}


def find_groups(source: Source, options: FolderOptions, places: list[Place]) -> list[Group]:
    """Return the groups of all places: normal ones first, then the others, as the options name them.

    Raises:
        DataError: a named folder is in none of the places, or one of them has no normal images to train on.
        OptionError: two names mean one folder.
    """
    groups: list[Group] = []
    unseen = [name for name in (*options.abnormal, *options.unknown) if name != EVERY]
    for place in places:
        finder = _Finder(source, options, place)
        groups += finder.by_mask() if options.label_by_mask else finder.by_name()
        unseen = [name for name in unseen if name in finder.missing]
    if unseen:
        raise _no_folder(source, options, places[0], unseen[0])
    twice = [group.folder for group in groups]
    for group in groups:
        if twice.count(group.folder) > 1:
            raise OptionError(f"two names mean one folder, {source.uri(group.folder)}; keep one of them")
    return groups


class _Finder:
    """Finds the groups of one place; `missing` are names that it has no folder of."""

    def __init__(self, source: Source, options: FolderOptions, place: Place) -> None:
        self.source = source
        self.options = options
        self.place = place
        self.missing: set[str] = set()

    def by_mask(self) -> list[Group]:
        """Return the folders of splits, or the whole place as one group that is divided."""
        if not self.place.levels:
            return [Group(self.place, self.place.root or "", "train", None, drawn_from=True)]
        return [Group(self.place, folder, split, None) for split, folder in self.place.levels.items()]

    def by_name(self) -> list[Group]:
        options, levels = self.options, self.place.levels
        normal: list[Group] = []
        drawn_from = True
        for name in options.normals:
            found = list(self._folders(name))
            if not found:
                raise self._no_training(name)
            drawn_from = drawn_from and not any(below for _, _, below in found)
            normal += [Group(self.place, folder, split or "train", NORMAL) for split, folder, _ in found]
        if all(group.split != "train" for group in normal):
            raise self._no_training(options.normals[0])
        splits: dict[Split, tuple[str, ...]] = {"val": options.val_normal, "test": options.test_normal}
        for split, names in splits.items():
            for name in names:
                found = list(self._folders(name))
                if not found:
                    raise _no_folder(self.source, options, self.place, name)
                normal += [Group(self.place, folder, split, NORMAL) for _, folder, _ in found]
        if drawn_from and all(group.split != "test" for group in normal):
            normal = [Group(self.place, g.folder, g.split, NORMAL, drawn_from=g.split == "train") for g in normal]
        unknown = [
            Group(self.place, folder, "test", None) for name in options.unknown for _, folder, _ in self._named(name)
        ]
        named = [name for name in options.abnormal if name != EVERY]
        abnormal = [self._abnormal(*found) for name in named for found in self._named(name)]
        if EVERY in options.abnormal:
            abnormal += self._others([group.folder for group in (*normal, *unknown, *abnormal)])
        if not levels and options.abnormal and not abnormal and not options.categories:
            raise _no_folder(self.source, options, self.place, options.abnormal[0])
        return [*normal, *abnormal, *unknown]

    def _folders(self, name: str) -> Iterator[tuple[Split | None, str, bool]]:
        """Yield the folders that a name means: the split that it tells, if any, the path, and whether it is a name
        inside train, val and test."""
        below = False
        for split, level in self.place.levels.items():
            path = self.source.spelt(posixpath.join(level, name))
            if name != "." and self.source.has_folder(path):
                below = True
                yield split, path, True
        if below or self.place.root is None:
            return
        path = _clean(self.source, posixpath.join(self.place.root, name))
        if path == self.place.root or self.source.has_folder(path):
            within = (split for split, level in self.place.levels.items() if f"{path}/".startswith(f"{level}/"))
            yield next(within, None), path, False

    def _named(self, name: str) -> list[tuple[Split | None, str, bool]]:
        found = list(self._folders(name))
        if not found:
            self.missing.add(name)
            if not self.options.categories:
                raise _no_folder(self.source, self.options, self.place, name)
        return found

    def _abnormal(self, split: Split | None, folder: str, below: bool) -> Group:
        above = self.place.levels[split] if split else self.place.root or ""
        defect = posixpath.relpath(folder, above) if folder != above else "anomaly"
        return Group(self.place, folder, split or "test", ANOMALOUS, defect)

    def _others(self, taken: list[str]) -> Iterator[Group]:
        """Yield a group for every folder that neither is nor holds one of those taken or one of masks."""
        masks = {
            posixpath.normpath(posixpath.join(root, name))
            for name in self.options.mask_folders
            for root in ("", self.place.root or "")
        }
        known = [*taken, *masks]
        parents: list[tuple[Split | None, str]] = [*self.place.levels.items()]
        parents = parents or [(None, self.place.root or "")]
        for name in sorted({name for _, parent in parents for name in self.source.folders(parent)}):
            for split, parent in parents:
                path = posixpath.join(parent, name)
                if self.source.has_folder(path) and not any(f"{each}/".startswith(f"{path}/") for each in known):
                    yield self._abnormal(split, path, True)

    def _no_training(self, name: str) -> DataError:
        """Return the error of a place without normal images to train on."""
        options, root = self.options, self.place.root or ""
        names = ",".join((*options.normals, *options.abnormal))
        levels = f"{{{options.train_folder},{options.test_folder}}}"
        expected = f"{levels}/{{{names}}} or the same without {options.train_folder} and {options.test_folder}"
        within = name
        if self.place.levels:
            level = self.place.levels.get("train", posixpath.join(root, options.train_folder))
            within = posixpath.relpath(posixpath.join(level, name), root or ".")
        else:
            expected = f"{{{names}}} or the same in {options.train_folder} and {options.test_folder}"
        try:
            self.source.require(root, within, expected)
        except DataError as error:
            return error
        return DataError(f"no folder of normal images to train on in {self.source.uri(root)}; name one with normal")


def _no_folder(source: Source, options: FolderOptions, place: Place, name: str) -> DataError:
    if place.levels:
        found = "; ".join(f"{posixpath.basename(level)}: {source.found(level)}" for level in place.levels.values())
        levels = ", ".join(options.split_folders[split] for split in place.levels)
        return DataError(f"no folder {name} in {levels} of {source.uri(place.root or '')}; found in {found}")
    names = ",".join((*options.normals, *options.abnormal))
    expected = f"{{{names}}} or the same in {options.train_folder} and {options.test_folder}"
    try:
        source.require(place.root or "", name, expected)
    except DataError as error:
        return error
    return DataError(f"no folder {name} under {source.uri(place.root or '')}; expected {expected}")


def leave_out_others(source: Source, taken: Collection[str]) -> None:
    """Record the images and folders that no option names: those beside the folders taken, and beside what these lie
    in."""
    above = {path[:end] for path in taken for end in range(len(path)) if path[end] == "/"} | {""}
    pending = [""] if "" not in taken else []
    while pending:
        folder = pending.pop()
        others: list[Entry] = []
        for entry in source.entries(folder):
            if entry.path in taken:
                continue
            if entry.path in above:
                pending.append(entry.path)
            elif entry.is_image or entry.is_folder:
                others.append(entry)
        source.leave_out(folder, others)

"""Which image of the `folder` layout has which mask, in folders of masks or beside the images."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unianom.data.image import marks_anything
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.folder_groups import Group, Place
from unianom.data.layouts.folder_options import FolderOptions
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.errors import DataError, ImageError


class Masks:
    """The masks of a source.

    Args:
        source: where they lie.
        options: where and under which names.
        places: of all categories.

    Attributes:
        folders: paths of the folders of masks.

    Raises:
        DataError: no category has one of the folders of masks.
    """

    def __init__(self, source: Source, options: FolderOptions, places: Sequence[Place]) -> None:
        self._source = source
        self._options = options
        self._folders = [each for name in options.mask_folders for each in _find(source, options, places, name)]
        self._paired: dict[str, str] = {}
        self.folders = {posixpath.normpath(each.path) for each in self._folders}

    def of(self, image: Entry) -> str | None:
        """Return the path of the mask of an image, if it has one."""
        return self._paired.get(image.path)

    def label(self, image: Entry) -> int:
        """Return what the mask of an image says: anomalous unless it is empty or there is none.

        Raises:
            DataError: the mask cannot be read.
        """
        mask = self._paired.get(image.path)
        if mask is None:
            return NORMAL
        try:
            marked = marks_anything(self._source.read(mask), self._options.mask_threshold)
        except ImageError as error:
            raise DataError(
                f"mask {self._source.uri(mask)} cannot be read, so the label is unknown: {error}"
            ) from error
        return ANOMALOUS if marked else NORMAL

    def without_masks(self, images: Iterable[Entry], folder: str) -> Iterable[Entry]:
        """Return those files of a folder that are images; the masks beside them are kept for their images.

        Raises:
            DataError: all are masks, or two files could be the mask of one image.
        """
        if not self._options.mask_beside:
            return images
        images = list(images)
        pairs, masks = masks_beside(images, self._options.mask_prefix, self._options.mask_suffix)
        self._paired |= pairs
        others = [image for image in images if image.path not in masks]
        if not others:
            raise DataError(f"only masks and no images in {self._source.uri(folder)}; set mask_prefix and mask_suffix")
        return others

    def pair(self, images: Sequence[tuple[Group, Entry]], normal: Iterable[tuple[Group, Entry]] = ()) -> None:
        """Find the masks of images that may have one in the folders of masks.

        A mask belongs to the image of its stem at the same place: below the mask folder it lies as the image does
        below the root, below train or test, below its defect folder or below the folder that the mask folder lies in.
        A mask in any other folder belongs to the one image of its stem.

        Args:
            images: that may have one.
            normal: other images, whose masks are passed over.

        Raises:
            DataError: a mask fits two images or an image two masks, no mask fits at all, or there is no mask folder.
        """
        normal_places = {
            same_name(place)
            for directory, group in {posixpath.dirname(image.path): group for group, image in normal}.items()
            for place in _directories(directory, group)
            if place
        }
        for folder in self._folders:
            within = [pair for pair in images if pair[0].place in folder.places]
            if len(self._folders) > 1:
                beside = [pair for pair in within if f"{pair[1].path}".startswith(folder.above and f"{folder.above}/")]
                within = beside or within
            if within:
                self._pair(folder, within, normal_places)

    def _pair(self, folder: _MaskFolder, images: list[tuple[Group, Entry]], normal_places: set[str]) -> None:
        source, options = self._source, self._options
        masks = _masks_by_place(source, options, folder.path)
        places = {image.path: _image_places(image, group, folder.above) for group, image in images}
        known = normal_places | {place for found in places.values() for place, _ in found}
        strays: dict[str, list[str]] = {}
        for (place, stem), path in masks.items():
            if place not in known:
                strays.setdefault(stem, []).append(path)
        paired: dict[str, str] = {}
        owner: dict[str, str] = {}
        for _, image in images:
            at_place = [masks[key] for key in places[image.path] if key in masks]
            candidates = at_place[:1] or strays.get(same_name(image.name), []) or strays.get(same_name(image.stem), [])
            candidates = [*([self._paired[image.path]] if image.path in self._paired else []), *candidates]
            if len(candidates) > 1:
                raise DataError(
                    f"{source.uri(image.path)} has more than one mask: {', '.join(sorted(candidates))}; keep one"
                )
            for mask in candidates:
                if mask in owner:
                    way_out = _way_out(owner[mask], image)
                    raise DataError(f"mask {source.uri(mask)} fits both {owner[mask]} and {image.path}; {way_out}")
                owner[mask] = image.path
                paired[image.path] = mask
        if not paired:
            raise DataError(
                f"no mask in {source.uri(folder.path)} fits an image by name: '{next(iter(masks.values()))}' against "
                f"'{images[0][1].path}'; set mask_prefix and mask_suffix"
            )
        self._paired |= paired


@dataclass(frozen=True)
class _MaskFolder:
    """A folder of masks: its path, and the places whose masks lie there."""

    path: str
    places: tuple[Place, ...]

    @property
    def above(self) -> str:
        return posixpath.dirname(posixpath.normpath(self.path))


def _find(source: Source, options: FolderOptions, places: Sequence[Place], name: str) -> list[_MaskFolder]:
    """Return the folders that a name of masks means: one of each category, or one for all."""
    if not options.categories:
        return [_MaskFolder(source.spelt(name), tuple(places))]
    own: list[_MaskFolder] = []
    others: list[Place] = []
    for place in places:
        paths = [posixpath.join(place.root, name)] if place.root else []
        paths = [source.spelt(path) for path in (*paths, posixpath.join(name, place.category))]
        there = next((path for path in paths if source.has_folder(path)), None)
        if there is None:
            others.append(place)
        else:
            own.append(_MaskFolder(there, (place,)))
    shared = source.spelt(name)
    if others and not own and source.has_folder(shared):
        own.append(_MaskFolder(shared, tuple(others)))
    if not own:
        raise DataError(f"no folder of masks {name} in {source.uri()} or in a category of it; found: {source.found()}")
    return own


def masks_beside(images: Sequence[Entry], prefix: str, suffix: str) -> tuple[dict[str, str], set[str]]:
    """Tell masks from images that lie in the same folders.

    Args:
        images: all files with the ending of an image.
        prefix: what a mask's name has before the stem of its image.
        suffix: what it has after it. Without both, of files of one stem the PNG is the mask.

    Returns:
        Paths of masks by the path of their image, and of all masks, also those whose image is not there.

    Raises:
        DataError: two masks or two images have one name.
    """
    by_stem: dict[tuple[str, str], list[Entry]] = {}
    masks: dict[tuple[str, str], list[Entry]] = {}
    for entry in images:
        folder, stem = posixpath.dirname(entry.path), same_name(entry.stem)
        affixed = len(stem) > len(prefix) + len(suffix) and stem.startswith(prefix) and stem.endswith(suffix)
        if (prefix or suffix) and affixed:
            masks.setdefault((folder, stem.removeprefix(prefix).removesuffix(suffix)), []).append(entry)
        else:
            by_stem.setdefault((folder, stem), []).append(entry)
    if not (prefix or suffix):
        for key, entries in by_stem.items():
            found = [entry for entry in entries if entry.ending == ".png"]
            if len(entries) > 1 and found:
                masks[key] = found
                by_stem[key] = [entry for entry in entries if entry.ending != ".png"]
    pairs: dict[str, str] = {}
    for key, found in masks.items():
        owners = by_stem.get(key, [])
        if owners and len(owners) + len(found) > 2:
            names = ", ".join(entry.path for entry in (*owners, *found))
            raise DataError(f"it is not clear which is the mask of which: {names}; keep one image and one mask")
        if owners:
            pairs[owners[0].path] = found[0].path
    return pairs, {entry.path for found in masks.values() for entry in found}


def _way_out(one: str, other: Entry) -> str:
    """Return what tells the masks of two images of one stem apart."""
    if posixpath.dirname(one) != posixpath.dirname(other.path):
        return "lay the masks out in the same folders as the images"
    names = f"{posixpath.basename(one)}.png and {other.name}.png"
    return f"name each mask by the whole name of its image, {names}, or remove one of the images"


def _masks_by_place(source: Source, options: FolderOptions, folder: str) -> dict[tuple[str, str], str]:
    """Return paths of the masks by their folder below the mask folder and the stem of their image."""
    masks: dict[tuple[str, str], str] = {}
    for entry in source.images_below(folder):
        if not (entry.stem.startswith(options.mask_prefix) and entry.stem.endswith(options.mask_suffix)):
            continue
        stem = same_name(entry.stem.removeprefix(options.mask_prefix).removesuffix(options.mask_suffix))
        key = (same_name(posixpath.dirname(posixpath.relpath(entry.path, folder))), stem)
        if key in masks:
            raise DataError(f"two masks for '{stem}' in {source.uri(folder)}: {masks[key]} and {entry.path}")
        masks[key] = entry.path
    if not masks:
        raise DataError(
            f"no mask in {source.uri(folder)} is named {options.mask_prefix}<stem>{options.mask_suffix}; set "
            f"mask_prefix and mask_suffix"
        )
    return masks


def _image_places(image: Entry, group: Group, above: str) -> list[tuple[str, str]]:
    """Return where the mask of an image may lie below a mask folder in `above`, and its name: from the most to the
    least specific."""
    directory = posixpath.dirname(image.path)
    places = [*_directories(directory, group), posixpath.relpath(directory, group.folder or ".")]
    if above and f"{directory}/".startswith(f"{above}/"):
        inside = posixpath.relpath(directory, above)
        places += [inside, inside.partition("/")[2]]
    unique = dict.fromkeys("" if place == "." else same_name(place) for place in places)
    return [(place, same_name(name)) for name in (image.name, image.stem) for place in unique]


def _directories(directory: str, group: Group) -> list[str]:
    """Return a directory as it lies in the root, in the folder of its split and in its category."""
    places = [directory]
    inside = [level for level in group.place.levels.values() if f"{directory}/".startswith(f"{level}/")]
    for above in (*inside, group.place.root or ""):
        if above:
            places.append(posixpath.relpath(directory, above) if f"{directory}/".startswith(f"{above}/") else directory)
    return ["" if place == "." else place for place in places]

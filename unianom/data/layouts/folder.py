"""Folders of any naming: normal and defective images by folder name, or images without labels."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Literal

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Entry, Source
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError, OptionError
from unianom.options import PositiveShare


@dataclass(frozen=True)
class FolderOptions(LayoutOptions):
    """Options of the `folder` layout.

    Args:
        dataset: name of the data set; empty takes the root's name.
        category: category of all samples; empty takes the data set's name or, unlabelled, the first folder level.
        normal: name of the folder of normal images, e.g. "good". It lies in train, test and val, or in the root.
        abnormal: names of the folders of defective images, which become the defect types.
        masks: folder of mask files, relative to the root.
        mask_prefix: what a mask's name has before the stem of its image.
        mask_suffix: what a mask's name has after the stem of its image, e.g. "_mask". Instead of the stem it may hold
            the image's whole name ("a.jpg.png" of "a.jpg"), which tells two images of one stem apart.
        mask_threshold: mask values above this are anomalous; null takes what each mask shows to be right.
        abnormal_train: what becomes of defective images in train: "keep" them there, for supervised training, or
            move them to "test".
        train_fraction: without train and test folders, the share of normal images to train on; the others and all
            defective ones are tested.
        seed: of that draw.
        unlabelled: take every image below the root, without labels.
        split: split of unlabelled images.
    """

    category: str = ""
    normal: str = ""
    abnormal: tuple[str, ...] = ()
    masks: str = ""
    mask_prefix: str = ""
    mask_suffix: str = ""
    mask_threshold: MaskThreshold | None = None
    abnormal_train: Literal["keep", "test"] = "keep"
    train_fraction: PositiveShare = 0.8
    seed: int = 0
    unlabelled: bool = False
    split: Literal["train", "val", "test"] = "test"

    def check(self) -> None:
        super().check()
        if self.unlabelled and (self.normal or self.abnormal or self.masks):
            raise OptionError("unlabelled=true takes every image; it excludes normal, abnormal and masks")
        if self.masks and not self.abnormal:
            raise OptionError(
                f"masks='{self.masks}' needs abnormal, the folders of the images that the masks belong to"
            )
        names = (self.normal, *self.abnormal)
        if len(set(names)) < len(names):
            raise OptionError(f"normal and abnormal name a folder twice: {', '.join(names)}")


def samples(source: Source, options: FolderOptions) -> Iterator[SampleRef]:
    """Yield samples of labelled or unlabelled folders. Of labelled ones only the named folders are read, at any
    depth."""
    if options.unlabelled:
        yield from _unlabelled(source, options)
        return
    if not options.normal:
        raise OptionError(
            f"name the folder of normal images in {source.uri()} with normal and those of defects with abnormal, or "
            f"take every image with unlabelled=true; found: {source.found()}"
        )
    options = replace(
        options,
        normal=source.spelt(options.normal),
        abnormal=tuple(source.spelt(name) for name in options.abnormal),
        masks=source.spelt(options.masks),
    )
    levels = [name for name in SPLITS if source.has_folder(name)]
    groups = _level_groups(source, options, levels) if levels else _root_groups(source, options)
    masks = _pair_masks(source, options, [group.folder for group in groups if group.defect])
    _leave_out(source, options, levels)
    category = options.category or source.dataset
    for group in groups:
        for image in source.images_below(group.folder):
            mask = masks.get(image.path)
            yield source.sample(
                image,
                category=category,
                split="test" if image.path in group.held_out else group.split,
                label=ANOMALOUS if group.defect else NORMAL,
                defect=group.defect or "good",
                mask=mask,
                mask_threshold=options.mask_threshold if mask else None,
            )


@dataclass(frozen=True)
class _Group:
    """A folder of images alike: its split, its defect ("" is normal), and the paths that are tested instead."""

    folder: str
    split: str
    defect: str
    held_out: Set[str] = frozenset()


def _level_groups(source: Source, options: FolderOptions, levels: list[str]) -> list[_Group]:
    """Return the groups of {train,val,test}/{normal,abnormal…}."""
    expected = f"{{train,test}}/{{{','.join((options.normal, *options.abnormal))}}} or the same without train and test"
    source.require("", f"train/{options.normal}", expected)
    groups = []
    for name in (options.normal, *options.abnormal):
        there = [level for level in levels if source.has_folder(f"{level}/{name}")]
        if not there:
            found = "; ".join(f"{level}: {source.found(level)}" for level in levels)
            raise DataError(f"no folder {name} in {', '.join(levels)} of {source.uri()}; found in {found}")
        defect = "" if name == options.normal else name
        for level in there:
            moved = level == "train" and defect and options.abnormal_train == "test"
            groups.append(_Group(f"{level}/{name}", "test" if moved else level, defect))
    return groups


def _root_groups(source: Source, options: FolderOptions) -> list[_Group]:
    """Return the groups of {normal,abnormal…} in the root, a seeded share of the normal images for training."""
    expected = f"{{{','.join((options.normal, *options.abnormal))}}} or the same in train and test"
    normal = source.require("", options.normal, expected)
    paths = [image.path for image in source.images_below(normal)]
    test = hold_out(paths, [""] * len(paths), 1 - options.train_fraction, options.seed)
    groups = [_Group(normal, "train", "", test)]
    groups += [_Group(source.require("", name, expected), "test", name) for name in options.abnormal]
    return groups


def _leave_out(source: Source, options: FolderOptions, levels: list[str]) -> None:
    """Record the images and folders that no option names."""
    named = {name.partition("/")[0] for name in (options.normal, *options.abnormal)}
    masks = posixpath.normpath(options.masks) if options.masks else ""
    for place in levels or [""]:
        for entry in source.entries(place):
            holds_masks = masks == entry.path or masks.startswith(f"{entry.path}/")
            if entry.is_image or (entry.is_folder and entry.name not in named and not holds_masks):
                source.leave_out(place, [entry])


def _unlabelled(source: Source, options: FolderOptions) -> Iterator[SampleRef]:
    for image in source.walk():
        top, below, _ = image.path.partition("/")
        category = options.category or (top if below else source.dataset)
        yield source.sample(image, category=category, split=options.split, label=None, defect=None)


def _pair_masks(source: Source, options: FolderOptions, folders: list[str]) -> dict[str, str]:
    """Return the mask paths by image path, for the images below the defect folders.

    A mask belongs to the image of its stem at the same place: below the mask folder it lies as the image does below
    the root, below train or test, or below its defect folder. A mask in any other folder belongs to the one image
    of its stem.

    Raises:
        DataError: a mask fits two images or an image two masks, no mask fits at all, or there is no mask folder.
    """
    if not options.masks:
        return {}
    masks = _masks_by_place(source, options)
    images = [(image, _places(folder, image)) for folder in folders for image in source.images_below(folder)]
    known = {place for _, places in images for place, _ in places}
    strays: dict[str, list[str]] = {}
    for (place, stem), path in masks.items():
        if place not in known:
            strays.setdefault(stem, []).append(path)
    paired: dict[str, str] = {}
    owner: dict[str, str] = {}
    for image, places in images:
        at_place = [masks[key] for key in places if key in masks]
        candidates = at_place[:1] or strays.get(same_name(image.name), []) or strays.get(same_name(image.stem), [])
        if len(candidates) > 1:
            raise DataError(
                f"{source.uri(image.path)} has more than one mask: {', '.join(sorted(candidates))}; keep one"
            )
        for mask in candidates:
            if mask in owner:
                raise DataError(
                    f"mask {source.uri(mask)} fits both {owner[mask]} and {image.path}; {_way_out(owner[mask], image)}"
                )
            owner[mask] = image.path
            paired[image.path] = mask
    if not paired:
        raise DataError(
            f"no mask in {source.uri(options.masks)} fits an image by name: '{next(iter(masks.values()))}' against "
            f"'{images[0][0].path}'; set mask_prefix and mask_suffix"
        )
    return paired


def _way_out(one: str, other: Entry) -> str:
    """Return what tells the masks of two images of one stem apart."""
    if posixpath.dirname(one) != posixpath.dirname(other.path):
        return "lay the masks out in the same folders as the images"
    names = f"{posixpath.basename(one)}.png and {other.name}.png"
    return f"name each mask by the whole name of its image, {names}, or remove one of the images"


def _masks_by_place(source: Source, options: FolderOptions) -> dict[tuple[str, str], str]:
    """Return paths of the masks by their folder below the mask folder and the stem of their image."""
    masks: dict[tuple[str, str], str] = {}
    for entry in source.images_below(options.masks):
        if not (entry.stem.startswith(options.mask_prefix) and entry.stem.endswith(options.mask_suffix)):
            continue
        stem = same_name(entry.stem.removeprefix(options.mask_prefix).removesuffix(options.mask_suffix))
        key = (same_name(posixpath.dirname(posixpath.relpath(entry.path, options.masks))), stem)
        if key in masks:
            raise DataError(f"two masks for '{stem}' in {source.uri(options.masks)}: {masks[key]} and {entry.path}")
        masks[key] = entry.path
    if not masks:
        raise DataError(
            f"no mask in {source.uri(options.masks)} is named {options.mask_prefix}<stem>{options.mask_suffix}; set "
            f"mask_prefix and mask_suffix"
        )
    return masks


def _places(folder: str, image: Entry) -> list[tuple[str, str]]:
    """Return where the mask of an image may lie below the mask folder, and its name: from the most to the least
    specific."""
    directory = posixpath.dirname(image.path)
    level, _, rest = directory.partition("/")
    places = [directory, rest if level in SPLITS else directory, posixpath.relpath(directory, folder)]
    unique = ["" if place == "." else same_name(place) for place in dict.fromkeys(places)]
    return [(place, same_name(name)) for name in (image.name, image.stem) for place in unique]


LAYOUT = Layout("folder", FolderOptions, samples, "folders named by you, or any images without labels")

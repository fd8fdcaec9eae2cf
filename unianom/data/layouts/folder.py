"""Folders of any naming: normal and defective images by folder name, or images without labels."""

from __future__ import annotations

from collections.abc import Iterator

from unianom.data.layouts.base import Layout
from unianom.data.layouts.folder_groups import Group, find_groups, find_places, leave_out_others
from unianom.data.layouts.folder_masks import Masks
from unianom.data.layouts.folder_options import FolderOptions
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import OptionError

__all__ = ["LAYOUT", "FolderOptions", "samples"]


def samples(source: Source, options: FolderOptions) -> Iterator[SampleRef]:
    """Yield samples of labelled or unlabelled folders. Of labelled ones only the named folders are read, at any
    depth."""
    if options.unlabelled:
        yield from _unlabelled(source, options)
        return
    if not (options.normals or options.label_by_mask):
        raise OptionError(
            f"name the folder of normal images in {source.uri()} with normal and those of defects with abnormal, or "
            f"take every image with unlabelled=true; found: {source.found()}"
        )
    places = find_places(source, options)
    groups = find_groups(source, options, places)
    masks = Masks(source, options, places)
    taken = {group.folder for group in groups} | masks.folders
    images = {group: masks.without_masks(source.images_below(group.folder, taken), group.folder) for group in groups}
    pairs = [(group, image) for group in groups for image in images[group]]
    masks.pair(
        [pair for pair in pairs if pair[0].label == ANOMALOUS or options.label_by_mask],
        [pair for pair in pairs if pair[0].label == NORMAL],
    )
    leave_out_others(source, taken)
    for place in places:
        found = [(group, image) for group in groups if group.place is place for image in images[group]]
        labels = [masks.label(image) if options.label_by_mask else group.label for group, image in found]
        drawn = [
            image.path
            for (group, image), label in zip(found, labels, strict=True)
            if group.drawn_from and label == NORMAL
        ]
        test = hold_out(drawn, [""] * len(drawn), 1 - options.train_fraction, options.seed)
        for (group, image), label in zip(found, labels, strict=True):
            mask = masks.of(image) if label == ANOMALOUS else None
            yield source.sample(
                image,
                category=place.category,
                split="test" if image.path in test else _split(group, label, options),
                label=label,
                defect=None if label is None else "good" if label == NORMAL else group.defect,
                mask=mask,
                mask_threshold=options.mask_threshold if mask else None,
            )


def _split(group: Group, label: int | None, options: FolderOptions) -> str:
    """Return the split of an image that no draw moves."""
    if label == ANOMALOUS and (group.drawn_from or (group.split == "train" and options.abnormal_train == "test")):
        return "test"
    return group.split


def _unlabelled(source: Source, options: FolderOptions) -> Iterator[SampleRef]:
    for image in source.walk():
        top, below, _ = image.path.partition("/")
        category = options.category or (top if below else source.dataset)
        yield source.sample(image, category=category, split=options.split, label=None, defect=None)


LAYOUT = Layout("folder", FolderOptions, samples, "folders named by you, or any images without labels")

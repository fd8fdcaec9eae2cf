"""Folders of any naming: normal and defective images by folder name, or images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from unianom.data.layouts.base import Layout
from unianom.data.layouts.entries import Entry, StoredEntries
from unianom.data.layouts.folder_groups import Group, find_groups, find_places, leave_out_others
from unianom.data.layouts.folder_masks import Masks
from unianom.data.layouts.folder_options import FolderOptions
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import draw_order, held_out_limits
from unianom.errors import OptionError
from unianom.temporary_database import temporary_database

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
    with temporary_database() as database:
        stored = StoredEntries(database)
        images = {
            group: stored.add(masks.without_masks(source.images_below(group.folder, taken), group.folder))
            for group in groups
        }
        if masks.folders:
            masks.pair(
                list(_pairs(stored, images, lambda group: group.label == ANOMALOUS or options.label_by_mask)),
                _pairs(stored, images, lambda group: group.label == NORMAL),
            )
        leave_out_others(source, taken)
        labels: dict[str, int] = {}
        if options.label_by_mask:
            labels = {image.path: masks.label(image) for _, image in _pairs(stored, images)}

        def label_of(group: Group, image: Entry) -> int | None:
            return labels[image.path] if options.label_by_mask else group.label

        for place in places:
            own = {group: images[group] for group in groups if group.place is place}
            limits = held_out_limits(
                (
                    (image.path, "")
                    for group, image in _pairs(stored, own)
                    if group.drawn_from and label_of(group, image) == NORMAL
                ),
                1 - options.train_fraction,
                options.seed,
            )
            for group, image in _pairs(stored, own):
                label = label_of(group, image)
                to_test = (
                    group.drawn_from and label == NORMAL and draw_order(image.path, options.seed) <= limits.get("", b"")
                )
                mask = masks.of(image) if label == ANOMALOUS else None
                yield source.sample(
                    image,
                    category=place.category,
                    split="test" if to_test else _split(group, label, options),
                    label=label,
                    defect=None if label is None else "good" if label == NORMAL else group.defect,
                    mask=mask,
                    mask_threshold=options.mask_threshold if mask else None,
                )


def _pairs(
    stored: StoredEntries, images: Mapping[Group, range], wanted: Callable[[Group], bool] = lambda _: True
) -> Iterator[tuple[Group, Entry]]:
    """Yield the images of all groups that are wanted, each with its group."""
    return ((group, image) for group, places in images.items() if wanted(group) for image in stored.at(places))


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

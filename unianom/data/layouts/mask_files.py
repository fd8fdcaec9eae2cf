"""Mask files that are named after their images."""

from __future__ import annotations

from collections.abc import Mapping

from unianom.data.layouts.entries import Entry
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.errors import DataError


def masks_by_stem(source: Source, folder: str) -> dict[str, str]:
    """Return the mask paths of a folder by the stem of the image they belong to ("000_mask.png" and "000.png" → "000"),
    as `same_name` has it.

    Raises:
        DataError: two masks belong to one stem.
    """
    masks: dict[str, str] = {}
    entries = source.entries(folder)
    source.leave_out(folder, [entry for entry in entries if not (entry.is_image or entry.is_folder)])
    for entry in entries:
        if not entry.is_image:
            continue
        stem = same_name(entry.stem.removesuffix("_mask"))
        if stem in masks:
            raise DataError(f"two masks for '{stem}' in {source.uri(folder)}: {masks[stem]} and {entry.path}")
        masks[stem] = entry.path
    return masks


def mask_of(source: Source, image: Entry, masks: Mapping[str, str], folder: str) -> str:
    """Return the path of the mask of an image among the `masks` of `folder`, as `masks_by_stem` gives them.

    Raises:
        DataError: there is none.
    """
    stem = same_name(image.stem)
    if stem not in masks:
        raise DataError(
            f"no mask of {source.uri(image.path)} in {source.uri(folder)}, which should be named {image.stem} or "
            f"{image.stem}_mask; found: {source.found(folder)}"
        )
    return masks[stem]

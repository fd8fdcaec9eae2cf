"""What may be wrong with a data set, in words, from the numbers of its images and from what was not taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from unianom.data.layout_detection.categories import in_words
from unianom.data.layouts import LeftOut, Source
from unianom.data.layouts.entries import IMAGE_SUFFIXES
from unianom.data.layouts.names import listed

FEW_NORMALS = 10
"""Fewer normal images of a category to train on are worth a warning."""


def warnings_of_counts(counts: Mapping[str, int], masks: int, learnt: Mapping[str, int]) -> Iterator[str]:
    """Yield what numbers of images give to think.

    Args:
        counts: images by role.
        masks: anomalous images with a mask.
        learnt: normal images to train on by category.
    """
    anomalous = sum(count for role, count in counts.items() if role.endswith("_anomalous"))
    if not counts.get("train_normal"):
        yield "no normal image to train on: there is nothing to learn what is normal from"
    few = {category: count for category, count in learnt.items() if 0 < count < FEW_NORMALS}
    if few:
        shown = listed(f"{category} ({count})" for category, count in few.items())
        yield f"fewer than {FEW_NORMALS} normal images to train on: {shown}"
    none = [category for category, count in learnt.items() if not count]
    if none and counts.get("train_normal"):
        yield f"no normal image to train on in {listed(none)}"
    if not anomalous:
        yield "no anomalous images: how well they are found cannot be measured"
    elif not (counts.get("test_normal") or counts.get("val_normal")):
        yield "no normal images to test: how often they are mistaken for anomalous cannot be measured"
    if anomalous and not masks:
        yield "no masks: where anomalies lie cannot be measured, only which images have one"
    elif masks < anomalous:
        yield f"{anomalous - masks} of {anomalous} anomalous images have no mask; pixel metrics leave them out"


def warnings_of_left_out(root: Source, left_out: LeftOut) -> Iterator[str]:
    """Yield in words what the layout saw and did not take."""
    prefix = root.uri().rstrip("/") + "/"
    folders = {folder.removeprefix(prefix): count for folder, count in sorted(left_out.folders.items()) if count}
    if folders:
        shown = listed((f"{folder}/ ({in_words(count)})" for folder, count in folders.items()), 8)
        yield f"not taken for anything: {shown}"
    endings: Counter[str] = Counter()
    for found in left_out.files.values():
        for ending, (count, _) in found.items():
            endings[ending] += count
    loose = {ending: count for ending, count in endings.items() if ending in IMAGE_SUFFIXES}
    others = {ending: count for ending, count in endings.items() if ending not in IMAGE_SUFFIXES}
    if loose:
        folders_of = [folder for folder, found in left_out.files.items() if set(found) & set(loose)]
        where = listed(
            (folder.removeprefix(prefix) if folder != root.uri() else "the root" for folder in folders_of), 4
        )
        yield f"{in_words(sum(loose.values()))} beside the folders in {where}: not taken"
    if others:
        shown = listed(f"{count} {ending or 'without ending'}" for ending, count in sorted(others.items()))
        yield f"files that are no images that can be read: {shown}"
    if left_out.links:
        shown = listed(link.removeprefix(prefix) for link in sorted(left_out.links))
        yield f"links that lead back to a folder they lie in, not followed: {shown}"

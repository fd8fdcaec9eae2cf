"""KolektorSDD, cracks on electrical commutators (Tabernik et al., Journal of Intelligent Manufacturing 2020)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.image import marks_anything
from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError, ImageError, OptionError
from unianom.options import PositiveShare

EXPECTED = "the kolektor layout: kos01…kos50/PartK.jpg with the mask PartK_label.bmp (or .png) beside"


@dataclass(frozen=True)
class KolektorOptions(LayoutOptions):
    """Options of the `kolektor` layout.

    Args:
        dataset: name of the data set.
        train_fraction: share of the commutators whose flawless surfaces form the training split. The publication
            cross-validates a supervised method and names no split for one-class training.
        seed: of the draw of commutators.
    """

    dataset: str = "kolektor"
    train_fraction: PositiveShare = 0.5
    seed: int = 0


def samples(source: Source, options: KolektorOptions) -> Iterator[SampleRef]:
    """Yield samples of KolektorSDD, split by commutator: flawless surfaces of one item are all on the same side.

    Cracked surfaces are all tested. Nearly every commutator has one, so those of the training items are tested
    too; leaving them out would halve the 52 cracks there are.

    Only the mask tells whether a surface is cracked, so listing opens the masks, one small file per image.
    """
    items = [name for name in source.folders() if re.fullmatch(r"kos\d+", name)]
    if not items:
        raise DataError(f"no commutator folders in {source.uri()}; found: {source.found()}; expected {EXPECTED}")
    test_items = hold_out(items, [""] * len(items), 1 - options.train_fraction, options.seed)
    trained = False
    for item in items:
        for image, mask in _surfaces(source, item):
            cracked = _is_cracked(source, mask)
            split = "test" if cracked or item in test_items else "train"
            trained = trained or split == "train"
            yield source.sample(
                image,
                category="commutator",
                split=split,
                label=ANOMALOUS if cracked else NORMAL,
                defect="crack" if cracked else "good",
                mask=mask.path if cracked else None,
            )
    if not trained:
        raise OptionError(
            f"no flawless surface of {source.uri()} falls to training with train_fraction={options.train_fraction} "
            f"and seed={options.seed}; raise train_fraction"
        )


def _surfaces(source: Source, item: str) -> list[tuple[Entry, Entry]]:
    """Return the image and mask of each surface of one commutator."""
    images = source.images(item)
    masks = {same_name(entry.stem.removesuffix("_label")): entry for entry in images if entry.stem.endswith("_label")}
    surfaces = [entry for entry in images if not entry.stem.endswith("_label")]
    for image in surfaces:
        if same_name(image.stem) not in masks:
            raise DataError(
                f"no mask {image.stem}_label beside {source.uri(image.path)}, so its label is unknown; "
                f"expected {EXPECTED}"
            )
    if not surfaces:
        raise DataError(f"only masks and no images in {source.uri(item)}; expected {EXPECTED}")
    return [(image, masks[same_name(image.stem)]) for image in surfaces]


def _is_cracked(source: Source, mask: Entry) -> bool:
    try:
        return marks_anything(source.read(mask.path))
    except ImageError as error:
        raise DataError(f"mask {source.uri(mask.path)} cannot be read, so the label is unknown: {error}") from error


def recognise(source: Source) -> Recognised | None:
    """Take folders kos01 … alone, the first of which holds masks <stem>_label, for this layout."""
    folders = source.folders()
    if not folders or not all(re.fullmatch(r"kos\d+", name) for name in folders):
        return None
    if not any(entry.is_image and entry.stem.endswith("_label") for entry in source.entries(folders[0])):
        return None
    return Recognised(
        {"train_fraction": KolektorOptions.train_fraction},
        (
            "<stem>_label beside an image → its mask; where that is empty the image is normal, else it has a crack",
            f"normal images of {KolektorOptions.train_fraction:.0%} of the {len(folders)} folders → to train on, drawn "
            f"by seed and name; all others → to test",
        ),
    )


LAYOUT = Layout("kolektor", KolektorOptions, samples, "KolektorSDD: seeded split by commutator", recognise)

"""VAD, piezoelectric elements with many defects to learn from (Baitieva et al., CVPR Workshops 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef

EXPECTED = "the vad layout: train/{good,bad} and test/{good,bad,bad_unseen_defects}, directly or in vad"
FOLDERS = {"train": ("good", "bad"), "test": ("good", "bad", "bad_unseen_defects")}


@dataclass(frozen=True)
class VadOptions(LayoutOptions):
    """Options of the `vad` layout.

    Args:
        dataset: name of the data set and of its one category.
    """

    dataset: str = "vad"


def samples(source: Source, options: VadOptions) -> Iterator[SampleRef]:
    """Yield samples of VAD, for supervised methods: the training split holds defects too. There are no masks.

    Unseen defects, of kinds that training does not show, are a defect type of their own: "bad_unseen_defects".
    """
    if source.has_folder("vad"):
        source = source.at("vad")
    for split, names in FOLDERS.items():
        for name in names:
            source.require("", f"{split}/{name}", EXPECTED)
    for split, names in FOLDERS.items():
        for name in names:
            for image in source.images(f"{split}/{name}"):
                yield source.sample(
                    image,
                    category=source.dataset,
                    split=split,
                    label=NORMAL if name == "good" else ANOMALOUS,
                    defect=name,
                )


def recognise(source: Source) -> Recognised | None:
    """Take train/{good,bad} and test/{good,bad,bad_unseen_defects} for this layout."""
    for root in ("vad/", ""):
        if all(source.has_folder(f"{root}{split}/{name}") for split, names in FOLDERS.items() for name in names):
            return Recognised(
                {},
                (
                    "good → normal; bad and bad_unseen_defects → defects; train and test as they lie",
                    "train/bad stays in train, for supervised methods; others pass it over",
                ),
            )
    return None


LAYOUT = Layout("vad", VadOptions, samples, "VAD: labelled images, defects in the training split too", recognise)

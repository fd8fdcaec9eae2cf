"""OCT2017, optical coherence tomography of the retina in four classes (Kermany et al., Cell 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS, SampleRef
from unianom.errors import DataError

EXPECTED = "the oct2017 layout: train/NORMAL and test/{CNV,DME,DRUSEN,NORMAL}"


@dataclass(frozen=True)
class Oct2017Options(LayoutOptions):
    """Options of the `oct2017` layout.

    Args:
        dataset: name of the data set and of its one category.
        abnormal_train: what becomes of the diseased images in train: "drop" them, as published for one-class
            training, or "keep" them there for supervised training.
    """

    dataset: str = "oct2017"
    abnormal_train: Literal["drop", "keep"] = "drop"


def samples(source: Source, options: Oct2017Options) -> Iterator[SampleRef]:
    """Yield samples of OCT2017: NORMAL is normal, the other classes are defects by their names.

    `val`, which some editions have, becomes the validation split.
    """
    for split in ("train", "test"):
        source.require("", f"{split}/NORMAL", EXPECTED)
    if source.folders("test") == ["NORMAL"]:
        raise DataError(f"only NORMAL in {source.uri('test')}; expected {EXPECTED}")
    for split in (split for split in SPLITS if source.has_folder(split)):
        for name in source.folders(split):
            normal = name == "NORMAL"
            if not normal and split == "train" and options.abnormal_train == "drop":
                continue
            for image in source.images(f"{split}/{name}"):
                yield source.sample(
                    image,
                    category=source.dataset,
                    split=split,
                    label=NORMAL if normal else ANOMALOUS,
                    defect="good" if normal else name,
                )


def recognise(source: Source) -> Recognised | None:
    """Take test/{CNV,DME,DRUSEN,NORMAL} with train/NORMAL for this layout."""
    if not (source.has_folder("train/NORMAL") and source.has_folder("test")):
        return None
    if set(source.folders("test")) != {"CNV", "DME", "DRUSEN", "NORMAL"}:
        return None
    return Recognised(
        {}, ("NORMAL → normal; CNV, DME, DRUSEN → defects", "diseased images in train are left out, as published")
    )


LAYOUT = Layout("oct2017", Oct2017Options, samples, "OCT2017: retinal tomography in four classes", recognise)

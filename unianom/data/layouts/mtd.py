"""MTD, the magnetic tile defects (Huang et al., The Visual Computer 2020), as its repository holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold, Recognised
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError
from unianom.options import PositiveShare

DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
EXPECTED = "the mtd layout: MT_{Blowhole,Break,Crack,Fray,Free,Uneven}/Imgs/<stem>.jpg with the mask <stem>.png beside"


@dataclass(frozen=True)
class MtdOptions(LayoutOptions):
    """Options of the `mtd` layout.

    Args:
        dataset: name of the data set.
        train_fraction: share of the images without defect (MT_Free) that form the training split. The literature
            trains on 80 % of them; which ones was never published.
        seed: of that draw.
        mask_threshold: mask values above this are anomalous; the masks are anti-aliased.
    """

    dataset: str = "mtd"
    train_fraction: PositiveShare = 0.8
    seed: int = 0
    mask_threshold: MaskThreshold = 127


def samples(source: Source, options: MtdOptions) -> Iterator[SampleRef]:
    """Yield samples of MTD: a seeded share of MT_Free for training, the rest and all defects for testing.

    A few Uneven tiles come with an empty mask; they stay anomalous.
    """
    for name in ("Free", *DEFECTS):
        folder = source.require("", f"MT_{name}/Imgs", EXPECTED)
        entries = source.entries(folder)
        images = [entry for entry in entries if entry.is_image and not entry.name.lower().endswith(".png")]
        if not images:
            raise DataError(
                f"no JPEG images in {source.uri(folder)}; found: {source.found(folder)}; expected {EXPECTED}"
            )
        if name == "Free":
            paths = [image.path for image in images]
            test = hold_out(paths, [folder] * len(paths), 1 - options.train_fraction, options.seed)
            for image in images:
                split = "test" if image.path in test else "train"
                yield source.sample(image, category="magnetic_tile", split=split, label=NORMAL, defect="good")
            continue
        masks = {same_name(entry.stem): entry.path for entry in entries if entry.name.lower().endswith(".png")}
        for image in images:
            yield source.sample(
                image,
                category="magnetic_tile",
                split="test",
                label=ANOMALOUS,
                defect=name.lower(),
                mask=masks.get(same_name(image.stem)),
                mask_threshold=options.mask_threshold,
            )


def recognise(source: Source) -> Recognised | None:
    """Take the six folders MT_Free, MT_Blowhole … with Imgs inside for this layout."""
    if not {f"MT_{name}" for name in ("Free", *DEFECTS)} <= set(source.folders()):
        return None
    if not all(source.has_folder(f"MT_{name}/Imgs") for name in ("Free", *DEFECTS)):
        return None
    return Recognised(
        {"train_fraction": MtdOptions.train_fraction},
        (
            f"MT_Free → normal, {MtdOptions.train_fraction:.0%} to train on, the rest to test, drawn by seed and name",
            f"{', '.join(f'MT_{name}' for name in DEFECTS)} → defects; the PNG beside an image → its mask",
        ),
    )


LAYOUT = Layout("mtd", MtdOptions, samples, "MTD, magnetic tiles: seeded split of the images without defect", recognise)

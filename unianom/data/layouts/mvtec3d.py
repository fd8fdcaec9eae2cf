"""MVTec 3D-AD (Bergmann et al., VISAPP 2022): its colour images, without the depth scans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold, Recognised
from unianom.data.layouts.mask_files import mask_of, masks_by_stem
from unianom.data.layouts.mvtec import find_categories
from unianom.data.layouts.names import choose
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, Crop, SampleRef
from unianom.errors import DataError

EXPECTED = (
    "the mvtec3d layout: <category>/{train,validation}/good/rgb/*.png, <category>/test/{good,<defect>}/rgb/*.png and "
    "<category>/test/<defect>/gt/*.png"
)

SPLIT_FOLDERS = {"train": "train", "val": "validation", "test": "test"}

CROPS = {"cable_gland": 256, "dowel": 256, "foam": 700, "potato": 384, "rope": 900}
OTHER_CROP = 512
"""Sides of UniNet's centre crops, in pixels (CVPR 2025, released code)."""

PADDED = ("cookie", "rope")
"""Categories whose published images are smaller than their crop along one side or both; the crop pads them."""


@dataclass(frozen=True)
class Mvtec3dOptions(LayoutOptions):
    """Options of the `mvtec3d` layout.

    Args:
        dataset: name of the data set.
        categories: categories to read; empty reads all.
        crop: store the centre crop that UniNet takes of each category, which leaves out most of the background:
            256 pixels of cable_gland and dowel, 384 of potato, 700 of foam, 900 of rope, 512 of the others. Those of
            cookie and rope are larger than the images and pad them with black.
        mask_threshold: mask values above this are anomalous.
    """

    dataset: str = "mvtec3d"
    categories: tuple[str, ...] = ()
    crop: bool = True
    mask_threshold: MaskThreshold = 127


def samples(source: Source, options: Mvtec3dOptions) -> Iterator[SampleRef]:
    """Yield samples of MVTec 3D-AD or of one of its categories: `rgb` alone, masks paired by stem.

    `validation`, all normal, becomes the split "val".
    """
    source, categories = find_categories(source, "good", EXPECTED)
    for category in choose(options.categories, categories, source.uri()):
        crop = None
        if options.crop:
            crop = Crop("centre", CROPS.get(category, OTHER_CROP), pad=category in PADDED)
        for split, folder in SPLIT_FOLDERS.items():
            source.require(category, f"{folder}/good/rgb", EXPECTED)
            defects = [name for name in source.folders(f"{category}/{folder}") if name != "good"]
            if split != "test" and defects:
                raise DataError(
                    f"{source.uri(category)}/{folder} holds {', '.join(defects)} beside good; expected {EXPECTED}"
                )
            for image in source.images(f"{category}/{folder}/good/rgb"):
                yield source.sample(image, category=category, split=split, label=NORMAL, defect="good", crop=crop)
            for defect in defects:
                place = f"{category}/{folder}/{defect}"
                images = source.images(source.require(place, "rgb", EXPECTED))
                mask_folder = source.require(place, "gt", EXPECTED)
                masks = masks_by_stem(source, mask_folder)
                for image in images:
                    yield source.sample(
                        image,
                        category=category,
                        split=split,
                        label=ANOMALOUS,
                        defect=defect,
                        mask=mask_of(source, image, masks, mask_folder),
                        mask_threshold=options.mask_threshold,
                        crop=crop,
                    )


def recognise(source: Source) -> Recognised | None:
    """Take folders with train/good/rgb, or a root that is one, for this layout."""
    alone = source.has_folder("train/good/rgb")
    names = [] if alone else [name for name in source.folders() if source.has_folder(f"{name}/train/good/rgb")]
    if not alone and not names:
        return None
    options = {"categories": names} if len(names) < len(source.folders()) and names else {}
    below = "" if alone else "<category>/"
    return Recognised(
        options,
        (
            f"{below}{{train,validation,test}}/good/rgb → normal; every other folder in {below}test → a defect, gt its "
            f"masks",
            "every image is cut to the published centre crop (crop: false keeps it whole)",
        ),
    )


LAYOUT = Layout("mvtec3d", Mvtec3dOptions, samples, "MVTec 3D-AD: its colour images, centre-cropped", recognise)

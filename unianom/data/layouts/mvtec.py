"""MVTec AD and data sets shaped like it (Bergmann et al., CVPR 2019)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.mask_files import masks_by_stem
from unianom.data.layouts.names import choose, listed, same_name
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError

EXPECTED = (
    "the mvtec layout: <category>/train/good, <category>/test/{good,<defect>}, <category>/ground_truth/<defect>, "
    "or merged: train/<category>_good, test/<category>_<defect>, ground_truth/<category>_<defect>"
)


VALIDATION = ("validation", "val")
"""Names of a folder of further normal images beside train and test."""


@dataclass(frozen=True)
class MvtecOptions(LayoutOptions):
    """Options of the `mvtec` layout.

    Args:
        dataset: name of the data set.
        categories: categories to read; empty reads all.
    """

    dataset: str = "mvtec"
    categories: tuple[str, ...] = ()


def samples(source: Source, options: MvtecOptions) -> Iterator[SampleRef]:
    """Yield samples of MVTec AD, of one of its categories, or of its merged form with all categories side by side.

    A root that is itself one category gives the same sample_ids as the whole set would.
    """
    if source.has_folder("train") and any(name.endswith("_good") for name in source.folders("train")):
        yield from _merged_samples(source, options)
        return
    source, categories = find_categories(source, "good", EXPECTED)
    for category in choose(options.categories, categories, source.uri()):
        yield from category_samples(source, category, "good", EXPECTED)


def find_categories(source: Source, normal: str, expected: str) -> tuple[Source, list[str]]:
    """Return the source whose folders are categories, and those; of a root that is one category, the folder above
    it."""
    folders = source.folders()
    if "train" in folders:
        source.require("", f"train/{normal}", expected)
        return source.at(".."), [source.name]
    if not folders:
        raise DataError(f"no category folders under {source.uri()}; found: {source.found()}; expected {expected}")
    return source, folders


def category_samples(source: Source, category: str, normal: str, expected: str) -> Iterator[SampleRef]:
    """Yield samples of one category: train/<normal>, test/<normal>, test/<defect> and ground_truth/<defect>, masks
    paired by stem, and as in MVTec LOCO AD validation/<normal>, the split "val".

    A defective image without a mask file gets none; masks of which none fits by name are an error. A folder of the
    image's stem in place of a mask file holds several, which are united (MVTec LOCO AD).
    """
    train = source.require(category, f"train/{normal}", expected)
    test = source.require(category, "test", expected)
    others = [name for name in source.folders(f"{category}/train") if name != normal]
    if others:
        raise DataError(
            f"{source.uri(category)}/train holds {', '.join(others)} beside {normal}, which this layout does not "
            f"know; read it with the folder layout or remove it"
        )
    yield from folder_samples(source, train, category, "train", None)
    validation = next((name for name in VALIDATION if source.has_folder(f"{category}/{name}/{normal}")), None)
    if validation is not None:
        yield from folder_samples(source, f"{category}/{validation}/{normal}", category, "val", None)
    for place, known in {
        category: ("train", "test", "ground_truth", validation),
        f"{category}/train": (normal,),
        **({} if validation is None else {f"{category}/{validation}": (normal,)}),
    }.items():
        source.leave_out(
            place, [e for e in source.entries(place) if e.is_image or (e.is_folder and e.name not in known)]
        )
    source.leave_out(test, [entry for entry in source.entries(test) if entry.is_image])
    defects = source.folders(test)
    if not defects:
        raise DataError(f"no test images under {source.uri(test)}; found: {source.found(test)}; expected {expected}")
    for name in defects:
        folder = posixpath.join(test, name)
        yield from folder_samples(
            source, folder, category, "test", None if name == normal else name, f"{category}/ground_truth/{name}"
        )


def folder_samples(
    source: Source, folder: str, category: str, split: str, defect: str | None, mask_folder: str = ""
) -> Iterator[SampleRef]:
    """Yield the images of one folder, all normal (`defect` None) or all of one defect with their masks."""
    images = source.images(folder)
    if defect is None:
        for image in images:
            yield source.sample(image, category=category, split=split, label=NORMAL, defect="good")
        return
    masks = _masks(source, images, mask_folder)
    for image in images:
        yield source.sample(
            image,
            category=category,
            split=split,
            label=ANOMALOUS,
            defect=defect,
            mask=masks.get(same_name(image.name)) or masks.get(same_name(image.stem)),
        )


def _masks(source: Source, images: list[Entry], folder: str) -> dict[str, list[str]]:
    """Return paths of the masks of each stem or whole name of an image."""
    folder = source.spelt(folder)
    if not source.has_folder(folder):
        return {}
    masks = {stem: [path] for stem, path in masks_by_stem(source, folder).items()}
    names = {same_name(name) for image in images for name in (image.stem, image.name)}
    for entry in source.entries(folder):
        if entry.is_folder and not entry.is_image:
            name = same_name(entry.name)
            pieces = [piece.path for piece in source.entries(entry.path) if piece.is_image]
            if name not in names or name in masks or not pieces:
                source.leave_out(folder, [entry])
            else:
                masks[name] = pieces
    if masks and names.isdisjoint(masks):
        raise DataError(
            f"no mask in {source.uri(folder)} fits an image by name: '{next(iter(masks.values()))[0]}' against "
            f"'{images[0].path}'; masks are named <stem>.png or <stem>_mask.png"
        )
    return masks


def _merged_samples(source: Source, options: MvtecOptions) -> Iterator[SampleRef]:
    """Yield samples of `train/<category>_good`, `test/<category>_<defect>`, `ground_truth/<category>_<defect>`."""
    source.require("", "test", EXPECTED)
    strangers = [name for name in source.folders("train") if not name.endswith("_good")]
    if strangers:
        raise DataError(
            f"{source.uri('train')} holds {', '.join(strangers)} beside <category>_good; expected {EXPECTED}"
        )
    found = [name.removesuffix("_good") for name in source.folders("train")]
    defects: dict[str, list[str]] = {category: [] for category in found}
    for name in source.folders("test"):
        # The longest fit, for categories like "pipe" and "pipe_fryum".
        category = max((category for category in found if name.startswith(f"{category}_")), key=len, default=None)
        if category is None:
            raise DataError(
                f"{source.uri('test/' + name)} belongs to no category of train; found there: {source.found('train')}"
            )
        defects[category].append(name.removeprefix(f"{category}_"))
    for category in choose(options.categories, found, source.uri()):
        if not defects[category]:
            raise DataError(f"no test/{category}_<defect> under {source.uri()}; found in test: {source.found('test')}")
        yield from folder_samples(source, f"train/{category}_good", category, "train", None)
        for defect in defects[category]:
            name = f"{category}_{defect}"
            yield from folder_samples(
                source, f"test/{name}", category, "test", None if defect == "good" else defect, f"ground_truth/{name}"
            )


CATEGORIES = frozenset(
    (
        *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
        *("toothbrush", "transistor", "wood", "zipper"),
    )
)
"""Of MVTec AD itself."""


def recognise(source: Source) -> Recognised | None:
    """Take categories with train/good and test for this layout, or a root that is one, or the merged form. Data sets of
    other categories go by the name of their folder."""
    folders = source.folders()
    if {"train", "test"} <= set(folders):
        train = source.folders("train")
        if len(train) > 1 and all(name.endswith("_good") for name in train):
            return Recognised({}, ("train/<category>_good → normal; test/<category>_<defect> → defects",))
        found = [""] if is_category(source, "", "good") else []
    else:
        found = [name for name in folders if is_category(source, name, "good")]
    if not any(source.has_folder(posixpath.join(name, "test/good")) for name in found):
        return None  # nothing to test on that is normal: the folder layout can hold some out
    names = found if found != [""] else [source.name]
    options: dict[str, Any] = {} if CATEGORIES.issuperset(names) else {"dataset": source.dataset}
    if len(found) < len(folders) and found != [""]:
        options["categories"] = found
    decisions = [*decided("good", names, found == [""])]
    if "categories" in options:
        others = listed(f"{name}/" for name in folders if name not in found)
        decisions.append(f"{others} → not read, since there is no train/good with nothing beside it")
    return Recognised(options, tuple(decisions))


def is_category(source: Source, folder: str, normal: str) -> bool:
    """Return whether a folder holds train/<normal>, and nothing else in train, with images in it, and folders in
    test."""
    train, test = (posixpath.join(folder, name) for name in ("train", "test"))
    return (
        source.has_folder(train)
        and source.has_folder(test)
        and source.folders(train) == [normal]
        and bool(source.folders(test))
        and any(entry.is_image for entry in source.entries(posixpath.join(train, normal)))
    )


def decided(normal: str, categories: list[str], alone: bool) -> Iterator[str]:
    """Yield in words how categories of this kind are read."""
    below = "" if alone else "<category>/"
    yield f"{below}train/{normal} → normal, to train on; {below}test/{normal} → normal, to test"
    yield f"every other folder in {below}test → a defect of its name, with the masks in {below}ground_truth"
    yield f"the folder itself is one category, {categories[0]}" if alone else f"categories: {listed(categories)}"


LAYOUT = Layout("mvtec", MvtecOptions, samples, "MVTec AD, one category of it, or its merged form", recognise)

"""UCSD Ped2, surveillance of a walkway where all but walking is anomalous (Mahadevan et al., CVPR 2010)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unianom.data.image import marks_anything
from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.mask_files import mask_of, masks_by_stem
from unianom.data.layouts.names import same_name
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError, ImageError, OptionError
from unianom.files import read_bytes

EXPECTED = (
    "the ped2 layout: training/frames/<clip>/*.jpg and testing/frames/<clip>/*.jpg with a file of labels, or as "
    "published Train/<clip>/*.tif, Test/<clip>/*.tif and Test/<clip>_gt/*.bmp, directly or in UCSDped2"
)
LABEL_FILES = ("labels.csv", "labels.npy", "frame_labels_ped2.npy")
MASKS = "_gt"


@dataclass(frozen=True)
class Ped2Options(LayoutOptions):
    """Options of the `ped2` layout.

    Args:
        dataset: name of the data set and of its one category.
        labels: file of the labels of the test frames, relative to the root, absolute or a URI: one 0 or 1 a line
            (.csv), below a heading or not, or a NumPy array (.npy), in the order of clips and frames. Empty takes
            labels.csv, labels.npy or frame_labels_ped2.npy in the root; without any, the masks of the published form
            tell the labels.
    """

    dataset: str = "ped2"
    labels: str = ""

    def check(self) -> None:
        super().check()
        if self.labels and not self.labels.lower().endswith((".csv", ".npy")):
            raise OptionError(f"labels='{self.labels}' must name a .csv or .npy file")


def samples(source: Source, options: Ped2Options) -> Iterator[SampleRef]:
    """Yield samples of Ped2, each frame one: training frames are normal, a test frame as its label or mask tells.

    Where only the masks tell which frames are anomalous, listing opens them, one small file per test frame.
    """
    labels_file = options.labels or next((name for name in LABEL_FILES if source.has_file(name)), "")
    labels_uri = source.locate(labels_file) if labels_file else ""
    if source.has_folder("UCSDped2"):
        source = source.at("UCSDped2")
    published = source.has_folder("Train")
    train, test = ("Train", "Test") if published else ("training/frames", "testing/frames")
    for folder in (train, test):
        source.require("", folder, EXPECTED)
    for clip in _clips(source, train):
        for image in _frames(source, clip):
            yield source.sample(image, category=source.dataset, split="train", label=NORMAL, defect="good")
    clips = _clips(source, test)
    if labels_uri:
        frames = [image for clip in clips for image in _frames(source, clip)]
        labels = _read_labels(labels_uri, len(frames))
        masks = _all_masks(source, clips)
        for image, label in zip(frames, labels, strict=True):
            yield _test_sample(source, image, label, masks.get(image.path))
        return
    for clip in clips:
        if not source.has_folder(clip + MASKS):
            raise DataError(
                f"no labels of {source.uri(clip)}: neither one of {', '.join(LABEL_FILES)} in the root nor a folder of "
                f"masks {clip}{MASKS}; name a file of labels with the layout's option labels"
            )
        by_stem = masks_by_stem(source, clip + MASKS)
        for image in _frames(source, clip):
            mask = mask_of(source, image, by_stem, clip + MASKS)
            yield _test_sample(source, image, _mask_label(source, mask), mask)


def _test_sample(source: Source, image: Entry, label: int, mask: str | None) -> SampleRef:
    return source.sample(
        image,
        category=source.dataset,
        split="test",
        label=label,
        defect="anomaly" if label == ANOMALOUS else "good",
        mask=mask if label == ANOMALOUS else None,
    )


def _clips(source: Source, folder: str) -> list[str]:
    """Return paths of the folders of frames, in the order of their numbers."""
    names = [name for name in source.folders(folder) if not name.endswith(MASKS)]
    if not names:
        raise DataError(f"no clips in {source.uri(folder)}; found: {source.found(folder)}; expected {EXPECTED}")
    return [f"{folder}/{name}" for name in sorted(names, key=lambda name: (len(name), name))]


def _frames(source: Source, clip: str) -> list[Entry]:
    """Return frames of a clip in the order of their numbers, with leading zeros or without."""
    return sorted(source.images(clip), key=lambda image: (len(image.stem), image.stem))


def _all_masks(source: Source, clips: list[str]) -> dict[str, str]:
    """Return masks by the path of their frame, where there are any."""
    masks: dict[str, str] = {}
    for clip in clips:
        if source.has_folder(clip + MASKS):
            by_stem = masks_by_stem(source, clip + MASKS)
            stems = {image.path: same_name(image.stem) for image in _frames(source, clip)}
            masks |= {path: by_stem[stem] for path, stem in stems.items() if stem in by_stem}
    return masks


def _mask_label(source: Source, mask: str) -> int:
    try:
        return ANOMALOUS if marks_anything(source.read(mask)) else NORMAL
    except ImageError as error:
        raise DataError(f"mask {source.uri(mask)} cannot be read, so the label is unknown: {error}") from error


def _read_labels(uri: str, frames: int) -> list[int]:
    """Return labels of the test frames.

    Raises:
        DataError: the file is missing, holds anything but 0 and 1, or labels for another number of frames.
    """
    try:
        data = read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"no file of labels {uri}; relative paths are taken from the root") from error
    values = _parse_array(data, uri) if uri.lower().endswith(".npy") else _parse_lines(data, uri)
    if not set(values) <= {0.0, 1.0}:
        raise DataError(f"{uri} holds labels other than 0 (normal) and 1 (anomalous)")
    if len(values) != frames:
        raise DataError(
            f"{uri} holds {len(values)} labels, but there are {frames} test frames; it should hold one for each frame"
        )
    return [int(value) for value in values]


def _parse_array(data: bytes, uri: str) -> list[float]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return [float(value) for value in array.ravel()]
    except Exception as error:  # a damaged file, a pickle or an archive fails in many ways
        raise DataError(f"{uri} is not a NumPy array of numbers: {error}") from error


def _parse_lines(data: bytes, uri: str) -> list[float]:
    lines = [line.strip() for line in data.decode("utf-8-sig", "replace").splitlines()]
    if lines and lines[0] and not lines[0][0].isdigit():
        lines = lines[1:]  # a heading
    try:
        return [float(line) for line in lines if line]
    except ValueError as error:
        raise DataError(f"{uri} should hold one 0 or 1 a line: {error}") from error


def recognise(source: Source) -> Recognised | None:
    """Take training/frames and testing/frames, or Train and Test with folders of masks <clip>_gt, for this layout."""
    root = "UCSDped2/" if source.has_folder("UCSDped2") else ""
    divided = source.has_folder(f"{root}training/frames") and source.has_folder(f"{root}testing/frames")
    published = source.has_folder(f"{root}Train") and source.has_folder(f"{root}Test")
    if not divided and not (published and any(name.endswith(MASKS) for name in source.folders(f"{root}Test"))):
        return None
    return Recognised({}, ("training frames → normal; testing frames → as the file of labels or their masks say",))


LAYOUT = Layout("ped2", Ped2Options, samples, "UCSD Ped2: frames of surveillance video with labels or masks", recognise)

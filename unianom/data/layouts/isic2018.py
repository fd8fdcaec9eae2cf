"""ISIC 2018 task 3, dermatoscopic images of skin lesions in seven classes (Codella et al., arXiv 1902.03368)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import read_table
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError

PREFIX = "ISIC2018_Task3_"
EXPECTED = (
    f"the isic2018 layout: {PREFIX}{{Training,Validation}}_Input/*.jpg and "
    f"{PREFIX}{{Training,Validation}}_GroundTruth/*.csv"
)
PARTS = {"train": "Training", "test": "Validation"}
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


@dataclass(frozen=True)
class Isic2018Options(LayoutOptions):
    """Options of the `isic2018` layout.

    Args:
        dataset: name of the data set and of its one category.
    """

    dataset: str = "isic2018"


def samples(source: Source, options: Isic2018Options) -> Iterator[SampleRef]:
    """Yield samples of ISIC 2018 task 3: naevi (NV) are normal, the other classes are defects by their names.

    Training takes the normal images of the official training part, 6,705; the official validation part, 193 images,
    is the test split.
    """
    for part in PARTS.values():
        for kind in ("Input", "GroundTruth"):
            source.require("", f"{PREFIX}{part}_{kind}", EXPECTED)
    for split, part in PARTS.items():
        classes = _read_classes(source, f"{PREFIX}{part}_GroundTruth")
        if "NV" not in classes.values():
            raise DataError(f"no row of class NV in {source.uri(f'{PREFIX}{part}_GroundTruth')}; fetch it again")
        folder = f"{PREFIX}{part}_Input"
        # A file that is not there is left for ingest to reject.
        images = {image.stem: image for image in source.images(folder)}
        for name, lesion in classes.items():
            if split == "train" and lesion != "NV":
                continue
            yield source.sample(
                images.get(name, Entry(f"{folder}/{name}.jpg", None, is_folder=False)),
                category=source.dataset,
                split=split,
                label=NORMAL if lesion == "NV" else ANOMALOUS,
                defect="good" if lesion == "NV" else lesion,
            )


def _read_classes(source: Source, folder: str) -> dict[str, str]:
    """Return the class of each image of one part.

    Raises:
        DataError: there is no CSV file or more than one, or a row does not name exactly one class.
    """
    tables = [entry.path for entry in source.entries(folder) if entry.name.lower().endswith(".csv")]
    if len(tables) != 1:
        raise DataError(
            f"{source.uri(folder)} should hold one CSV file, {folder}.csv, but holds {len(tables)}; found: "
            f"{source.found(folder)}"
        )
    classes: dict[str, str] = {}
    for where, row in read_table(source, tables[0], ("image", *CLASSES), key="image"):
        named = [name for name in CLASSES if row[name] in ("1", "1.0")]
        others = [name for name in CLASSES if row[name] in ("0", "0.0")]
        if not row["image"] or len(named) != 1 or len(others) != len(CLASSES) - 1:
            raise DataError(
                f"{where} is not an image with a 1 in one of the columns {','.join(CLASSES)} and 0 in all others"
            )
        classes[row["image"]] = named[0]
    return classes


def recognise(source: Source) -> Recognised | None:
    """Take the official folders of images and tables for this layout."""
    kinds = ("Input", "GroundTruth")
    if not all(source.has_folder(f"{PREFIX}{part}_{kind}") for part in PARTS.values() for kind in kinds):
        return None
    return Recognised({}, ("NV → normal, the other classes → defects", "Training → to train on, Validation → to test"))


LAYOUT = Layout("isic2018", Isic2018Options, samples, "ISIC 2018 task 3: skin lesions, naevi normal", recognise)

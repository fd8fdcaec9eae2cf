"""APTOS 2019, photographs of the retina graded for diabetic retinopathy (Kaggle, 2019)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import read_table
from unianom.data.schema import ANOMALOUS, NORMAL, Crop, SampleRef
from unianom.errors import DataError, OptionError
from unianom.options import AtLeastOne

EXPECTED = "the aptos layout: train.csv with the columns id_code,diagnosis and train_images/<id_code>.png"
GRADES = ("0", "1", "2", "3", "4")
CROP = Crop("fundus", side=512)


@dataclass(frozen=True)
class AptosOptions(LayoutOptions):
    """Options of the `aptos` layout.

    Args:
        dataset: name of the data set and of its one category.
        train_normals: normal images in the training split; the others and all abnormal ones are tested.
        seed: of the draw of those. 1,000 of seed 1 are the published split (ReContrast, NeurIPS 2023).
        crop: store the square around the retina, 512 pixels wide, instead of the photograph with its black border.
    """

    dataset: str = "aptos"
    train_normals: AtLeastOne = 1000
    seed: int = 1
    crop: bool = True


def samples(source: Source, options: AptosOptions) -> Iterator[SampleRef]:
    """Yield samples of APTOS 2019: grade 0 is normal, the other grades are the defects "grade_1" … "grade_4".

    Only Kaggle's training part has grades; its test part is not read. The normal images are drawn by shuffling them
    in the order of train.csv with Python's generator, as the published split is, so this draw alone depends on the
    order of a file and not on names.
    """
    if not source.has_file("train.csv"):
        raise DataError(f"no train.csv in {source.uri()}; found: {source.found()}; expected {EXPECTED}")
    source.require("", "train_images", EXPECTED)
    grades: dict[str, str] = {}
    for where, row in read_table(source, "train.csv", ("id_code", "diagnosis"), key="id_code"):
        if not row["id_code"] or row["diagnosis"] not in GRADES:
            raise DataError(f"{where} is not a row of id_code and diagnosis (0…4)")
        grades[row["id_code"]] = row["diagnosis"]
    shuffled = [name for name, grade in grades.items() if grade == "0"]
    if len(shuffled) <= options.train_normals:
        raise OptionError(
            f"train_normals={options.train_normals} leaves none of the {len(shuffled)} normal images of "
            f"{source.uri('train.csv')} to test; lower it"
        )
    random.Random(options.seed).shuffle(shuffled)
    train = set(shuffled[: options.train_normals])
    # A file that is not there is left for ingest to reject, which keeps the split whole.
    images = {image.stem: image for image in source.images("train_images")}
    for name, grade in grades.items():
        yield source.sample(
            images.get(name, Entry(f"train_images/{name}.png", None, is_folder=False)),
            category=source.dataset,
            split="train" if name in train else "test",
            label=NORMAL if grade == "0" else ANOMALOUS,
            defect="good" if grade == "0" else f"grade_{grade}",
            crop=CROP if options.crop else None,
        )


def recognise(source: Source) -> Recognised | None:
    """Take train.csv of id_code and diagnosis beside train_images for this layout."""
    if not (source.has_folder("train_images") and source.has_file("train.csv")):
        return None
    header = source.read("train.csv").decode("utf-8-sig", "replace").partition("\n")[0].strip().split(",")
    if not {"id_code", "diagnosis"} <= set(header):
        return None
    return Recognised(
        {},
        (
            "train.csv: diagnosis 0 → normal, 1 to 4 → defects of these grades",
            f"{AptosOptions.train_normals} normal images → to train on, drawn as published; all others → to test",
            "the square around the retina is cut out (crop: false keeps the photograph)",
        ),
    )


LAYOUT = Layout("aptos", AptosOptions, samples, "APTOS 2019: graded retinas, published draw, cropped", recognise)

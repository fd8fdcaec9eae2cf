"""VisA (Zou et al., ECCV 2022), raw with its split file or prepared into the folders of MVTec AD."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.mvtec import category_samples
from unianom.data.layouts.names import choose, listed
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import read_table
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError, OptionError

PREPARED = ("", "1cls", "VisA_pytorch/1cls")
EXPECTED = "the prepared visa layout: <category>/train/good, <category>/test/{good,bad}, <category>/ground_truth/bad"
COLUMNS = ("object", "split", "label", "image", "mask")


@dataclass(frozen=True)
class VisaOptions(LayoutOptions):
    """Options of the `visa` layout.

    Args:
        dataset: name of the data set.
        categories: categories to read; empty reads all.
        split_csv: split file of the raw form, relative to the root: 1cls.csv, or for the supervised protocols
            2cls_highshot.csv and 2cls_fewshot.csv, whose training splits hold anomalies.
    """

    dataset: str = "visa"
    categories: tuple[str, ...] = ()
    split_csv: str = "split_csv/1cls.csv"

    def check(self) -> None:
        super().check()
        if not self.split_csv.lower().endswith(".csv"):
            raise OptionError(f"split_csv='{self.split_csv}' must name a CSV file relative to the root")


def samples(source: Source, options: VisaOptions) -> Iterator[SampleRef]:
    """Yield samples of VisA: raw if the split file is there, else prepared. Any mask value above 0 is anomalous."""
    if source.has_file(options.split_csv):
        yield from _raw_samples(source, options)
        return
    for folder in PREPARED:
        if source.has_folder(folder):
            prepared = source.at(folder)
            categories = prepared.folders()
            if any(prepared.has_folder(f"{category}/train") for category in categories):
                for category in choose(options.categories, categories, prepared.uri()):
                    yield from category_samples(prepared, category, "good", EXPECTED)
                return
    raise DataError(
        f"no visa data set in {source.uri()}: neither the raw form with its split file {options.split_csv} nor the "
        f"prepared form with <category>/train/good, directly or in 1cls or VisA_pytorch/1cls; found: {source.found()}"
    )


def _raw_samples(source: Source, options: VisaOptions) -> Iterator[SampleRef]:
    rows = _read_split(source, options.split_csv)
    for category in choose(options.categories, sorted(rows), source.uri(options.split_csv)):
        chosen = rows[category]
        for split, labels in (("train", ("normal",)), ("test", ("normal", "anomaly"))):
            if not any(row["split"] == split and row["label"] in labels for row in chosen):
                raise DataError(
                    f"{source.uri(options.split_csv)} has no row of '{category}' with split {split} and label "
                    f"{' or '.join(labels)}"
                )
        # Sizes come from listing each folder once; a file that is not there is left for ingest to reject.
        folders = sorted({posixpath.dirname(row["image"]) for row in chosen})
        files = {entry.path: entry for folder in folders for entry in source.entries(folder)}
        for row in sorted(chosen, key=lambda row: (row["split"] == "test", row["image"])):
            normal = row["label"] == "normal"
            yield source.sample(
                files.get(row["image"], Entry(row["image"], None, is_folder=False)),
                category=category,
                split=row["split"],
                label=NORMAL if normal else ANOMALOUS,
                defect="good" if normal else "anomaly",
                mask=row["mask"] or None,
            )


def _read_split(source: Source, path: str) -> dict[str, list[dict[str, str]]]:
    """Return rows of the split file by category.

    Raises:
        DataError: a column is missing, a split or label is unknown, or an image is named twice.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for where, row in read_table(source, path, COLUMNS, key="image"):
        if row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly") or not row["image"]:
            raise DataError(
                f"{where} is not a row of object, split (train or test), label (normal or anomaly), image and mask"
            )
        rows.setdefault(row["object"], []).append(row)
    return rows


def recognise(source: Source) -> Recognised | None:
    """Take the raw form with its split file, or the prepared form in 1cls, for this layout."""
    if source.has_file(VisaOptions.split_csv):
        return Recognised({}, (f"{VisaOptions.split_csv} → split, label and mask of every image",))
    for folder in PREPARED:
        if folder and source.has_folder(folder):
            names = [name for name in source.folders(folder) if source.has_folder(f"{folder}/{name}/train/good")]
            if names:
                return Recognised({}, (f"{folder}/<category>/train/good and test/{{good,bad}}: {listed(names)}",))
    return None


LAYOUT = Layout("visa", VisaOptions, samples, "VisA, raw with its split file or prepared", recognise)

"""VisA (Zou et al., ECCV 2022), raw with its split file or prepared into the folders of MVTec AD."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Entry, LayoutOptions, Source, choose
from unianom.data.layouts.mvtec import category_samples
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError, OptionError

PREPARED = ("", "1cls", "VisA_pytorch/1cls")
EXPECTED = "the prepared visa layout: <category>/train/good, <category>/test/{good,bad}, <category>/ground_truth/bad"
_COLUMNS = ("object", "split", "label", "image", "mask")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.split_csv.lower().endswith(".csv"):
            raise OptionError(f"split_csv='{self.split_csv}' must name a CSV file relative to the root")


def samples(source: Source, options: VisaOptions) -> Iterator[SampleRef]:
    """Samples of VisA: raw if the split file is there, else prepared. Masks hold small class numbers, all anomalous."""
    if source.fs.isfile(source.root + "/" + options.split_csv):
        yield from _raw_samples(source, options)
        return
    for folder in PREPARED:
        if source.has_folder(folder) and any(source.has_folder(f"{name}/train") for name in source.at(folder).folders()):
            pass
    raise DataError("")

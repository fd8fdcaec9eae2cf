"""A table of labels beside the images: CSV, JSON lines or Parquet, with columns of any names."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.names import listed, nearest
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import read_rows
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError, OptionError
from unianom.options import PositiveShare

SPLIT_VALUES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What a column of splits may hold, in small letters."""

_PLAIN_VALUES = frozenset(("0", "1", "-1", "0.0", "1.0", "-1.0", "true", "false", "yes", "no", "t", "f", "y", "n"))
"""Values of labels that name no defect type."""


@dataclass(frozen=True)
class LabelsOptions(LayoutOptions):
    """Options of the `labels` layout. A source that is a file is itself the table, and its folder the root.

    Args:
        dataset: name of the data set; empty takes the root's name.
        table: the table, relative to the root: .csv with commas, semicolons or tabs, .tsv, .jsonl, .json, .parquet.
        image: column of the images' files.
        images: folder that the images' names are relative to, relative to the root.
        ending: what the names lack, such as ".png".
        label: column that says what is normal.
        normal: its values that mean normal, in small letters or not; all others mean anomalous and, unless they are
            numbers 0, 1 or -1, true, false, yes or no, name the defect type. No value means that nobody knows.
        split: column of the split, "train", "val" or "test"; empty draws normal images to test.
        category: column of the category; empty takes the data set's name.
        defect: column of the defect type; empty takes the label.
        mask: column of the masks' files, relative to the root; no value means none.
        mask_threshold: mask values above this are anomalous; null takes what each mask shows to be right.
        abnormal_train: what becomes of anomalous images in train: "keep" them there, for supervised training, or
            move them to "test".
        train_fraction: without a column of splits, the share of the normal images of each category to train on; the
            others and all that are not normal are tested.
        seed: of that draw.
    """

    table: str = ""
    image: str = "image"
    images: str = ""
    ending: str = ""
    label: str = "label"
    normal: tuple[str, ...] = ()
    split: str = ""
    category: str = ""
    defect: str = ""
    mask: str = ""
    mask_threshold: MaskThreshold | None = None
    abnormal_train: Literal["keep", "test"] = "keep"
    train_fraction: PositiveShare = 0.8
    seed: int = 0


def samples(source: Source, options: LabelsOptions) -> Iterator[SampleRef]:
    """Yield samples in the order of the rows. An image that no row names is left out; a file that is not there is left
    for ingest to reject."""
    if source.has_file(""):
        if options.table:
            raise OptionError(f"{source.uri()} is a file and so the table itself; name the images' folder instead")
        table, source = source.name, replace(source.at(".."), dataset=options.dataset or source.at("..").name)
    else:
        table = options.table
    if not table:
        raise OptionError(f"name the table of labels in {source.uri()} with table; found: {source.found()}")
    rows = read_rows(source, table)
    _check_columns(rows, options, source.uri(table))
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for where, row in rows:
        path = _path(row.get(options.image, ""), options, where)
        if path in found:
            raise DataError(f"{where} names {path} a second time, after {found[path][0]}")
        found[path] = where, row
    files = _files(source, found)
    normal = {value.lower() for value in options.normal}
    labels = {path: _label(row.get(options.label, ""), normal) for path, (_, row) in found.items()}
    if NORMAL not in labels.values():
        values = sorted({row.get(options.label, "") for _, row in rows})
        raise OptionError(
            f"no row of {source.uri(table)} is normal: column {options.label} holds {listed(values)}; say which "
            f"of these mean normal with normal"
        )
    held_out: set[str] = set()
    if not options.split:
        normals = [path for path, label in labels.items() if label == NORMAL]
        categories = [found[path][1].get(options.category, "") for path in normals]
        held_out = hold_out(normals, categories, 1 - options.train_fraction, options.seed)
    for path, (where, row) in found.items():
        label = labels[path]
        mask = row.get(options.mask, "") if label == ANOMALOUS else ""
        yield source.sample(
            files.get(path, Entry(path, None, is_folder=False)),
            category=(row.get(options.category) or source.dataset) if options.category else source.dataset,
            split=_split(row, label, path in held_out, options, where),
            label=label,
            defect=_defect(row, label, options),
            mask=posixpath.normpath(mask) if mask else None,
            mask_threshold=options.mask_threshold if mask else None,
        )


def _check_columns(rows: list[tuple[str, dict[str, str]]], options: LabelsOptions, where: str) -> None:
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    for option in ("image", "label", "split", "category", "defect", "mask"):
        name = getattr(options, option)
        if name and name not in columns:
            raise OptionError(
                f"{where} has no column '{name}'{nearest(name, columns)}; name that of the {option} with {option}; its "
                f"columns: {listed(columns)}"
            )


def _path(name: str, options: LabelsOptions, where: str) -> str:
    if not name:
        raise DataError(f"{where} names no image in column {options.image}")
    if "\\" in name and "/" not in name:  # a table that was written on Windows
        name = name.replace("\\", "/")
    path = posixpath.normpath(posixpath.join(options.images, name + options.ending))
    if path.startswith(("/", "../")) or "://" in name:
        raise DataError(f"{where}: {name} lies outside of the root; name files relative to it, or to images")
    return path


def _files(source: Source, found: dict[str, tuple[str, dict[str, str]]]) -> dict[str, Entry]:
    """Return the images that are there by path; those that no row names are left out."""
    files: dict[str, Entry] = {}
    for folder in sorted({posixpath.dirname(path) for path in found}):
        if folder and not source.has_folder(folder):
            continue
        images = [entry for entry in source.entries(folder) if entry.is_image]
        files |= {entry.path: entry for entry in images}
        source.leave_out(folder, [entry for entry in images if entry.path not in found])
    return files


def _label(value: str, normal: set[str]) -> int | None:
    if not value:
        return None
    return NORMAL if value.lower() in normal else ANOMALOUS


def _split(row: dict[str, str], label: int | None, held_out: bool, options: LabelsOptions, where: str) -> str:
    if not options.split:
        return "train" if label == NORMAL and not held_out else "test"
    value = row.get(options.split, "")
    split = SPLIT_VALUES.get(value.lower())
    if split is None:
        raise DataError(f"{where}: split '{value}' in column {options.split} must be train, val or test")
    return "test" if label == ANOMALOUS and split == "train" and options.abnormal_train == "test" else split


def _defect(row: dict[str, str], label: int | None, options: LabelsOptions) -> str | None:
    if label is None:
        return None
    if label == NORMAL:
        return "good"
    value = row.get(options.defect or options.label, "")
    return value if value and value.lower() not in _PLAIN_VALUES else "anomaly"


LAYOUT = Layout("labels", LabelsOptions, samples, "a table of labels beside the images (CSV, JSON lines, Parquet)")

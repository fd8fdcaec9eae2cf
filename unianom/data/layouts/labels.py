"""A table of labels beside the images: CSV, JSON lines or Parquet, with columns of any names."""

from __future__ import annotations

import posixpath
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.names import listed, nearest
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import Table
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import draw_order, held_out_limits
from unianom.errors import DataError, OptionError
from unianom.options import PositiveShare
from unianom.temporary_database import temporary_database

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
    rows = Table(source, table)
    _check_columns(rows, options, source.uri(table))
    with temporary_database() as database:
        _store(database, rows, options)
        _find_files(database, source)
        normal = {value.lower() for value in options.normal}
        values = database.execute("select distinct label from images")
        if NORMAL not in (_label(value, normal) for (value,) in values):
            held = [value for (value,) in database.execute("select distinct label from images order by label")]
            raise OptionError(
                f"no row of {source.uri(table)} is normal: column {options.label} holds {listed(held)}; say which "
                f"of these mean normal with normal"
            )
        limits: dict[str, bytes] = {}
        if not options.split:
            named = database.execute("select path, category, label from images order by rowid")
            limits = held_out_limits(
                ((path, category) for path, category, value in named if _label(value, normal) == NORMAL),
                1 - options.train_fraction,
                options.seed,
            )
        for path, size, where, *texts in database.execute(
            f"select path, size, place, {_TEXTS} from images order by rowid"
        ):
            row = _Row(*texts)
            label = _label(row.label, normal)
            held_out = draw_order(path, options.seed) <= limits.get(row.category, b"") if limits else False
            mask = row.mask if label == ANOMALOUS else ""
            yield source.sample(
                Entry(path, size, is_folder=False),
                category=(row.category or source.dataset) if options.category else source.dataset,
                split=_split(row, label, held_out, options, where),
                label=label,
                defect=_defect(row, label),
                mask=posixpath.normpath(mask) if mask else None,
                mask_threshold=options.mask_threshold if mask else None,
            )


@dataclass(frozen=True)
class _Row:
    """What a row of the table says of an image, as text, "" for nothing."""

    label: str
    split: str
    category: str
    defect: str
    mask: str


_TEXTS = ", ".join(field.name for field in fields(_Row))


def _store(database: sqlite3.Connection, rows: Table, options: LabelsOptions) -> None:
    """Keep the rows in a table `images`, in their order.

    Raises:
        DataError: two rows name one image.
    """
    database.execute(f"create table images (path, size, place, {_TEXTS})")
    columns = (options.label, options.split, options.category, options.defect or options.label, options.mask)
    database.executemany(
        "insert into images values (?, null, ?, ?, ?, ?, ?, ?)",
        (
            (
                _path(row.get(options.image, ""), options, where),
                where,
                # a table may have a column without a name, as pandas writes for its index: it is none of these
                *(row.get(column, "") if column else "" for column in columns),
            )
            for where, row in rows
        ),
    )
    try:
        database.execute("create unique index by_path on images (path)")
    except sqlite3.IntegrityError:
        path, first, place = database.execute(
            "select later.path, earlier.place, later.place from "
            "(select path, min(rowid) as first from images group by path having count(*) > 1) as name "
            "join images as earlier on earlier.rowid = name.first "
            "join images as later on later.path = name.path and later.rowid > name.first order by later.rowid limit 1"
        ).fetchone()
        raise DataError(f"{place} names {path} a second time, after {first}") from None


def _find_files(database: sqlite3.Connection, source: Source) -> None:
    """Add the sizes of those images that are there; those that no row names are left out."""

    def is_named(image: Entry) -> bool:
        change = "update images set size = ? where path = ?"
        return database.execute(change, [image.size, image.path]).rowcount > 0

    folders = {posixpath.dirname(path) for (path,) in database.execute("select path from images")}
    for folder in sorted(folders):
        if not folder or source.has_folder(folder):
            images = (entry for entry in source.iter_entries(folder) if entry.is_image)
            source.leave_out(folder, (image for image in images if not is_named(image)))


def _check_columns(rows: Table, options: LabelsOptions, where: str) -> None:
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


def _label(value: str, normal: set[str]) -> int | None:
    if not value:
        return None
    return NORMAL if value.lower() in normal else ANOMALOUS


def _split(row: _Row, label: int | None, held_out: bool, options: LabelsOptions, where: str) -> str:
    if not options.split:
        return "train" if label == NORMAL and not held_out else "test"
    split = SPLIT_VALUES.get(row.split.lower())
    if split is None:
        raise DataError(f"{where}: split '{row.split}' in column {options.split} must be train, val or test")
    return "test" if label == ANOMALOUS and split == "train" and options.abnormal_train == "test" else split


def _defect(row: _Row, label: int | None) -> str | None:
    if label is None:
        return None
    if label == NORMAL:
        return "good"
    return row.defect if row.defect and row.defect.lower() not in _PLAIN_VALUES else "anomaly"


LAYOUT = Layout("labels", LabelsOptions, samples, "a table of labels beside the images (CSV, JSON lines, Parquet)")

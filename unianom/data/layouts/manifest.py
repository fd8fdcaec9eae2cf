"""JSON lines that name every image, such as the meta files of the UniAD family (You et al., NeurIPS 2022)."""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS, SampleRef
from unianom.errors import DataError, OptionError
from unianom.files import resolve
from unianom.temporary_database import temporary_database

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManifestOptions(LayoutOptions):
    """Options of the `manifest` layout. Paths of manifests are relative to the root, absolute or URIs.

    A source that is a file is itself the manifest of all splits, and its folder is the root.

    Args:
        dataset: name of the data set; empty takes the root's name.
        train: manifest of the training split.
        val: manifest of the validation split.
        test: manifest of the test split.
        manifest: manifest whose rows name their own split.
        deduplicate: drop rows that repeat an earlier one word for word, and say how many; else they are an error.
    """

    train: str = ""
    val: str = ""
    test: str = ""
    manifest: str = ""
    deduplicate: bool = True


def samples(source: Source, options: ManifestOptions) -> Iterator[SampleRef]:
    """Yield samples in the order of the rows.

    A row is a JSON object with `filename`; `label` 0, 1 or null; `clsname` or `category`, else the fourth part of the
    path from its end; `maskname` or `mask`, empty or absent for none; `label_name` or `defect`; and in a manifest of
    all splits `split`. Other keys are ignored. Files lie below the root unless they are absolute paths or URIs.
    """
    files = {"train": options.train, "val": options.val, "test": options.test, "": options.manifest}
    files = {split: path for split, path in files.items() if path}
    if source.has_file(""):
        if files:
            raise OptionError(f"{source.uri()} is a file and so the manifest itself; name the images' folder instead")
        files = {"": source.name}
        source = replace(source.at(".."), dataset=options.dataset or source.at("..").name)
    if not files:
        raise OptionError(f"name the manifests of {source.uri()}: train and test, or manifest for one with all splits")
    with temporary_database() as database:
        database.execute("create table seen (sample_id primary key, content) without rowid")
        for split, path in files.items():
            repeated = 0
            for where, row in _rows(source, path):
                sample = _sample(source, row, split, where)
                known = sample.sample_id, hash(sample)
                if database.execute("insert or ignore into seen values (?, ?)", known).rowcount:
                    yield sample
                elif not database.execute("select 1 from seen where sample_id = ? and content = ?", known).fetchone():
                    raise DataError(f"{where} names {sample.uri} again with another split, label, category or mask")
                elif not options.deduplicate:
                    raise DataError(f"{where} repeats {sample.uri}; set deduplicate=true to drop repeated rows")
                else:
                    repeated += 1
            if repeated:
                logger.warning("%d repeated rows of %s dropped", repeated, path)


def _rows(source: Source, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (for messages) and the content of each row."""
    uri = source.locate(path)
    fs, inside = resolve(uri)
    if not fs.isfile(inside):
        raise DataError(f"no manifest {uri}; relative paths are taken from {source.uri()}")
    empty = True
    with fs.open(inside, "rb") as handle:
        for number, line in enumerate(handle, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()  # some editors begin a file with a byte order mark
            if not text:
                continue
            where = f"line {number} of {uri}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{where} is not JSON ({error}); each line holds one object") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object with a filename")
            empty = False
            yield where, row
    if empty:
        raise DataError(f"manifest {uri} has no rows")


def _sample(source: Source, row: dict[str, Any], split: str, where: str) -> SampleRef:
    filename = _text(row, where, "filename")
    if not filename:
        raise DataError(f"{where} has no filename")
    uri = source.locate(filename)
    path = posixpath.normpath(uri.split("://", 1)[-1].lstrip("/") if uri == filename else filename)
    parts = path.split("/")
    if ".." in parts:
        raise DataError(
            f"{where}: {filename} leads out of the root {source.uri()}; name the root that holds all images"
        )
    category = _text(row, where, "category", "clsname")
    if not category and len(parts) < 4:
        raise DataError(f"{where} names no category or clsname, and {filename} has no fourth part from its end")
    row_split = _text(row, where, "split") or split
    if row_split not in SPLITS or split not in ("", row_split):
        raise DataError(f"{where}: split '{row_split}' must be {split or ', '.join(SPLITS)}")
    label = row.get("label")
    if label is not None and (type(label) is not int or label not in (NORMAL, ANOMALOUS)):
        raise DataError(f"{where}: label {label!r} must be 0 (normal), 1 (anomalous) or null (unknown)")
    mask = _text(row, where, "mask", "maskname")
    return SampleRef(
        sample_id=source.sample_id(path),
        dataset=source.dataset,
        category=category or parts[-4],
        split=row_split,
        label=label,
        defect="good" if label == NORMAL else _text(row, where, "defect", "label_name") or None,
        uri=uri,
        mask_uri=source.locate(mask) if mask else None,
    )


def _text(row: dict[str, Any], where: str, *keys: str) -> str:
    """Return the first of the keys that holds anything, "" if none does."""
    for key in keys:
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key} {value!r} must be text")
        if value:
            return value
    return ""


def recognise(source: Source) -> Recognised | None:
    """Take a file whose rows name `filename` and `split`, or train.json and test.json of rows with `filename`, for this
    layout."""
    if source.has_file(""):
        row = _first_row(source, "") if source.name.lower().endswith(ENDINGS) else {}
        return (
            Recognised({}, ("every row → an image with its split and label",))
            if {"filename", "split"} <= set(row)
            else None
        )
    for ending in ENDINGS:
        files = {split: f"{split}{ending}" for split in ("train", "test")}
        if all(source.has_file(file) and "filename" in _first_row(source, file) for file in files.values()):
            return Recognised(dict(files), tuple(f"{file} → {split}" for split, file in files.items()))
    return None


ENDINGS = (".json", ".jsonl", ".ndjson")


def _first_row(source: Source, path: str) -> dict[str, Any]:
    """Return the first row of a file of JSON lines; empty if it is none."""
    try:
        row = json.loads(source.read(path).decode("utf-8-sig").lstrip().partition("\n")[0])
    except (ValueError, DataError):
        return {}
    return row if isinstance(row, dict) else {}


LAYOUT = Layout("manifest", ManifestOptions, samples, "JSON lines naming every image (UniAD family)", recognise)

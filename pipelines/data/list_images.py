"""Images that lie anywhere → a listing, written once, whose ranges of rows a job then works on.

    folders, tables of paths, single files ─▶ rows, names checked in a database on disk ─▶ parts ─▶ manifest

Whatever the number of images, the names of one folder and the rows of one row group are in memory at a time.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.data.options import ListingOptions
from unianom import __version__, files
from unianom.data.id_digest import IdDigest
from unianom.data.image_listing import LISTING_SCHEMA, LISTING_VERSION, ImageListing
from unianom.data.layouts import LeftOut
from unianom.data.layouts.entries import IMAGE_SUFFIXES
from unianom.data.layouts.source import Source
from unianom.data.row_ranges import MOST_ROWS
from unianom.data.shards import MANIFEST
from unianom.errors import DataError, storage_error
from unianom.temporary_database import temporary_database

LISTING = "_listing"
"""Folder of the listing, in the output of the job that made it."""

GROUP_ROWS = MOST_ROWS
PART_ROWS = 256 * GROUP_ROWS
"""Rows of a row group and of a part."""

ONCE = "list each image once, and folders of one name by a folder that holds both"
"""What to do where two images have one name."""

TABLES = (".csv", ".jsonl", ".ndjson", ".parquet")
"""Endings of files that name images."""


class ListedImage(NamedTuple):
    """An image of a listing.

    Attributes:
        sample_id, dataset, uri: see `SampleRef`.
        category: as the table names it; None where it does not.
        size: bytes of its file, None where nothing tells.
    """

    sample_id: str
    dataset: str
    uri: str
    category: str | None
    size: int | None


def iter_images(
    uris: Sequence[str], options: ListingOptions, left_out: LeftOut | None = None
) -> Generator[ListedImage, None, None]:
    """Yield the images that folders, tables and single files name, in their order.

    Args:
        uris: folders or prefixes, which are walked; tables (`TABLES`); image files.
        options: how they are read.
        left_out: takes what lies in the folders and is no image.

    Raises:
        DataError: one of them is not there, is neither, or names no image.
    """
    for uri in uris:
        ending = PurePosixPath(uri.rstrip("/")).suffix.lower()
        if ending in TABLES and files.is_file(uri):
            yield from _of_table(uri, ending, options)
        elif ending in IMAGE_SUFFIXES and not files.is_folder(uri):
            source = Source.open(files.full_uri(uri).rpartition("/")[0])
            name = uri.rpartition("/")[2]
            yield ListedImage(source.sample_id(name), source.dataset, source.uri(name), None, None)
        elif files.is_file(uri):
            raise DataError(
                f"{uri} is neither an image ({', '.join(sorted(IMAGE_SUFFIXES))}) nor a table of images "
                f"({', '.join(TABLES)}); give --images one of these, or a folder"
            )
        else:
            source = Source.open(uri, left_out=left_out)
            for entry in source.images_below(""):
                yield ListedImage(
                    source.sample_id(entry.path), source.dataset, source.uri(entry.path), None, entry.size
                )


def _of_table(uri: str, ending: str, options: ListingOptions) -> Iterator[ListedImage]:
    """Yield the images that the rows of a table name; paths are relative to its folder, absolute or URIs."""
    source = Source.open(files.full_uri(uri).rpartition("/")[0])
    columns = [options.column, *([options.category_column] if options.category_column else [])]
    count = 0
    try:
        with files.open_for_reading(uri) as handle:
            read: Callable[..., Iterator[pa.Table]] = {".csv": _csv, ".parquet": _parquet}.get(ending, _json_lines)
            for table in read(handle, columns, uri):
                for path, *category in zip(*(table[name].to_pylist() for name in columns), strict=True):
                    count += 1
                    if not path:
                        raise DataError(f"row {count} of {uri} has no {options.column}; name an image in every row")
                    if category and not category[0]:
                        raise DataError(f"row {count} of {uri} has no {options.category_column}; name one in every row")
                    located = source.locate(path)
                    name = path if located == path else PurePosixPath(path).as_posix()
                    yield ListedImage(
                        f"{source.dataset}/{name.lstrip('/')}",
                        source.dataset,
                        located,
                        category[0] if category else None,
                        None,
                    )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise storage_error(error) or DataError(f"cannot read {uri}: {error}; it should be a table") from error
    if not count:
        raise DataError(f"{uri} has no rows; it should name images in its column {options.column}")


def _csv(handle: Any, columns: Sequence[str], uri: str) -> Iterator[pa.Table]:
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
    reader = pyarrow.csv.open_csv(handle, convert_options=convert)
    _check_columns(reader.schema.names, columns, uri)
    for batch in reader:
        yield pa.Table.from_batches([batch])


def _parquet(handle: Any, columns: Sequence[str], uri: str) -> Iterator[pa.Table]:
    parquet = pq.ParquetFile(handle)
    _check_columns(parquet.schema_arrow.names, columns, uri)
    for batch in parquet.iter_batches(batch_size=8192, columns=list(columns)):
        yield pa.Table.from_batches([batch]).cast(pa.schema([pa.field(name, pa.string()) for name in columns]))


def _json_lines(handle: Any, columns: Sequence[str], uri: str) -> Iterator[pa.Table]:
    lines = enumerate(handle, 1)
    while chunk := list(islice(lines, 8192)):
        rows = []
        for number, line in chunk:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {uri} is not JSON ({error}); each line holds one object") from error
            _check_columns(row if isinstance(row, dict) else (), columns, f"line {number} of {uri}")
            rows.append({name: None if row[name] is None else str(row[name]) for name in columns})
        yield pa.Table.from_pylist(rows, pa.schema([pa.field(name, pa.string()) for name in columns]))


def _check_columns(found: Iterable[str], columns: Sequence[str], where: str) -> None:
    for name, option in zip(columns, ("column", "category_column"), strict=False):
        if name not in found:
            raise DataError(
                f"{where} has no column '{name}'; it has {', '.join(found) or 'none'}; name it by --listing.{option}"
            )


def write_listing(
    folder: str,
    uris: Sequence[str],
    options: ListingOptions,
    category_of: Callable[[str | None], str],
    split: str,
    label: int | None,
) -> ImageListing:
    """List images into a folder, or return the listing that is finished there.

    Args:
        folder: of the listing; path or URI.
        uris, options: see `iter_images`.
        category_of: returns the category of a sample from what its table says, or raises an error.
        split, label: of all samples.

    Raises:
        DataError: as `iter_images`, or two images have one name.
    """
    if files.exists(files.join(folder, MANIFEST)):
        return ImageListing.open(folder)
    left_out = LeftOut()
    counts: dict[tuple[str, str], int] = defaultdict(int)
    ids: dict[tuple[str, str], IdDigest] = defaultdict(IdDigest)
    entries: list[dict[str, Any]] = []
    with temporary_database() as database:
        database.execute("create table names (name text primary key, uri text) without rowid")

        def rows() -> Iterator[dict[str, Any]]:
            for image in iter_images(uris, options, left_out):
                _check_new(database, image)
                category = category_of(image.category)
                group = (image.dataset, category)
                counts[group] += 1
                ids[group].add([image.sample_id])
                yield {
                    "sample_id": image.sample_id,
                    "dataset": image.dataset,
                    "category": category,
                    "split": split,
                    "label": label,
                    "defect": None if label is None else "good",
                    "uri": image.uri,
                    "size": image.size,
                }

        listed = rows()
        while (part := _write_part(folder, len(entries), listed)) is not None:
            entries.append(part)
    manifest = {
        "kind": ImageListing.kind,
        "schema_version": LISTING_VERSION,
        "tool_version": __version__,
        "images": list(uris),
        "counts": [
            {
                "dataset": dataset,
                "category": category,
                "split": split,
                "label": label,
                "defect": None if label is None else "good",
                "count": counts[dataset, category],
                "ids": ids[dataset, category].hex(),
            }
            for dataset, category in sorted(counts)
        ],
        "left_out": left_out.summary(),
        "files": entries,
    }
    files.write_json(files.join(folder, MANIFEST), manifest)
    return ImageListing.open(folder)


def _check_new(database: sqlite3.Connection, image: ListedImage) -> None:
    """Refuse a name that another image has."""
    try:
        database.execute("insert into names values (?, ?)", [image.sample_id, image.uri])
    except sqlite3.IntegrityError as error:
        (other,) = database.execute("select uri from names where name = ?", [image.sample_id]).fetchone()
        raise DataError(f"{other} and {image.uri} are both named {image.sample_id}; {ONCE}") from error


def _write_part(folder: str, number: int, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Write the next rows as a part; return its entry of the manifest, None where there are no more rows."""
    first = list(islice(rows, GROUP_ROWS))
    if not first:
        return None
    name = f"part-{number:05d}.parquet"
    path = files.join(folder, name)
    count, group = 0, first
    with (
        files.open_atomic(path) as handle,
        pq.ParquetWriter(handle, LISTING_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        while group:
            writer.write_table(pa.Table.from_pylist(group, LISTING_SCHEMA))
            count += len(group)
            group = list(islice(rows, GROUP_ROWS)) if count < PART_ROWS else []
    return {"name": name, "rows": count, "sha256": files.sha256_file(path)}

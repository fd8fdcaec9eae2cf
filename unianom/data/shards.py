"""Shard sets and score sets: a folder of Parquet files and their manifest.

`part-*.parquet` hold rows of `SAMPLE_SCHEMA` or `SCORE_SCHEMA`; a shard set also has `_rejected.parquet` with rows of
`REJECTED_SCHEMA`. `_manifest.json` is written last, so a folder without one is unfinished. Jobs work on a part, or on
a range of its rows, at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from types import UnionType
from typing import IO, Any, ClassVar, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unianom import files
from unianom.data.id_digest import IdDigest
from unianom.data.maps import MapsKept
from unianom.data.row_ranges import RowGroup, RowRange, cut_ranges, range_rows
from unianom.data.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA, SCORE_VERSION, SPLITS
from unianom.errors import DataError, storage_error

MANIFEST = "_manifest.json"
REJECTED = "_rejected.parquet"


HEAVY = frozenset(("image", "mask", "anomaly_map"))
"""Columns that make up nearly all of a part."""

SMALL = 32 << 20
"""Bytes of a part up to which its checksum is compared whatever is read of it."""

MOST_IN_MEMORY = 512 << 20
"""Bytes of a part on an object store up to which it is held in memory to compare its checksum."""

FOOTERS_AT_ONCE = 16
"""Parts whose row groups are looked up at the same time; on object stores that is waiting."""

SAMPLE_GROUP_BYTES, SAMPLE_GROUP_ROWS = 8 << 20, 1024
"""Images, masks and rows of a row group of shards: a reader of a range of rows reads whole groups, and holds as much.
Smaller ones would cost more: each has statistics, dictionaries and pages of its own for every column."""

_verified_files: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Selection:
    """Which samples of a shard set.

    Args:
        splits: of "train", "val", "test"; empty for all.
        categories: names; empty for all.
        labels: 0, 1; empty for all, unknown labels included.
    """

    splits: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """Return which rows of a batch are selected; an unknown label is in no list of labels."""
        keep = pa.array([True] * batch.num_rows)
        for column, values in (("split", self.splits), ("category", self.categories), ("label", self.labels)):
            if values:
                plain = batch[column].cast(pa.int8() if column == "label" else pa.string())
                keep = pc.and_(keep, pc.is_in(plain, value_set=pa.array(values, plain.type)))
        return keep


@dataclass(frozen=True)
class PartSet:
    """A finished folder of parts. Use `ShardSet` or `ScoreSet`.

    Attributes:
        uri: its folder.
        manifest: the content of `_manifest.json`.
        digest: SHA-256 of `_manifest.json`; names exactly this data.
    """

    uri: str
    manifest: dict[str, Any]
    digest: str

    schema: ClassVar[pa.Schema]
    version: ClassVar[int]
    kind: ClassVar[str]
    job: ClassVar[str]
    stated: ClassVar[dict[str, Any]] = {}
    """What a manifest tells that jobs rely on, by key: a type, or the same of a dict or of every entry of a list."""

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> Self:
        """Open a finished set.

        Raises:
            DataError: nothing there, its job unfinished, a damaged manifest, another kind of set, or another schema
                version.
        """
        folder = files.full_uri(uri)
        path = files.join(folder, MANIFEST)
        if not files.exists(path):
            names = files.list_names(folder)
            if any(name.startswith("part-") for name in names):
                raise DataError(f"{folder} is unfinished (no {MANIFEST}); run its {cls.job} command again")
            found = ", ".join(names[:5]) or "nothing"
            raise DataError(f"{folder} is no {cls.kind} (no {MANIFEST}; found: {found}); make one with {cls.job}")
        try:
            manifest = files.read_json(path)
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; {cls._again(folder)}") from error
        if not isinstance(manifest, dict):
            raise DataError(f"{path} is damaged: it holds no JSON object; {cls._again(folder)}")
        if manifest.get("kind") != cls.kind:
            raise DataError(f"{folder} is a {manifest.get('kind')}, not a {cls.kind}; make one with {cls.job}")
        if manifest.get("schema_version") != cls.version:
            raise DataError(
                f"{folder} has schema version {manifest.get('schema_version')}, this unianom reads {cls.version}; "
                f"{cls._again(folder)}"
            )
        if not isinstance(manifest.get("counts"), list) or not isinstance(manifest.get("files"), list):
            raise DataError(f"{path} is damaged: it names no counts or files; {cls._again(folder)}")
        for entry in manifest["files"]:
            _check_entry(entry, path)
        stated = {key: shape for key, shape in {**_COUNTS, **cls.stated}.items() if key in manifest}
        if fault := _shape_fault(manifest, stated):
            raise DataError(f"{path} is damaged: {fault}; {cls._again(folder)}")
        return cls(folder, manifest, files.sha256_file(path))

    @classmethod
    def _again(cls, folder: str) -> str:
        # a finished folder is not looked into again, so running the job over it would change nothing
        return f"remove {folder} and run {cls.job} again"

    @property
    def parts(self) -> list[str]:
        """Names of the part files, in order."""
        return [entry["name"] for entry in self.manifest["files"]]

    @property
    def categories(self) -> list[str]:
        """Every category, sorted."""
        return sorted({row["category"] for row in self.manifest["counts"]})

    def count(self, selection: Selection) -> int:
        """Return how many samples a selection holds, from the manifest."""
        return sum(row["count"] for row in self.selected_counts(selection))

    def selected_counts(self, selection: Selection) -> list[dict[str, Any]]:
        """Return the entries of the manifest's counts that a selection takes."""
        return [
            row
            for row in self.manifest["counts"]
            if (not selection.splits or row["split"] in selection.splits)
            and (not selection.categories or row["category"] in selection.categories)
            and (not selection.labels or row["label"] in selection.labels)
        ]

    def ids(self, selection: Selection) -> IdDigest | None:
        """Return the digest of the selected sample_ids, from the manifest; None where an earlier version wrote it."""
        found = IdDigest()
        for row in self.selected_counts(selection):
            if "ids" not in row:
                return None
            found.merge(IdDigest.from_hex(row["ids"]))
        return found

    def check(self, selection: Selection) -> None:
        """Refuse a selection that holds nothing.

        Raises:
            DataError: unknown split or category, or no sample.
        """
        unknown = sorted(set(selection.splits) - set(SPLITS))
        if unknown:
            raise DataError(f"unknown split {', '.join(unknown)}; splits are {', '.join(SPLITS)}")
        unknown = sorted(set(selection.categories) - set(self.categories))
        if unknown:
            raise DataError(f"{self.uri} has no category {', '.join(unknown)}; it has {', '.join(self.categories)}")
        if self.count(selection) == 0:
            have = sorted({(row["split"], row["label"]) for row in self.manifest["counts"]}, key=str)
            listed = ", ".join(f"{split} with label {label}" for split, label in have)
            raise DataError(f"{self.uri} has no sample of split {selection.splits or 'any'}; it has {listed or 'none'}")

    def read(
        self,
        part: str,
        selection: Selection | None = None,
        columns: Sequence[str] | None = None,
        rows: int = 64,
        chosen: Collection[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows of one part in their order, at most `rows` in a batch; row groups that cannot match are skipped.

        Args:
            part: its name.
            selection: which rows; None for all.
            columns: of these; None for all.
            rows: of a batch, at most.
            chosen: sample_ids of the selected rows that are taken; None for all.

        Raises:
            DataError: the part is missing, damaged, not the one in the manifest, or cannot be read.
        """
        wanted = list(columns or self.schema.names)
        with self._parquet(part, wanted) as parquet:
            groups = [g for g in range(parquet.num_row_groups) if self._may_match(parquet, g, selection)]
            needed = _needed(wanted, chosen)
            for batch in parquet.iter_batches(batch_size=rows, row_groups=groups, columns=needed):
                kept = _kept(batch, selection, chosen)
                if kept.num_rows:
                    yield kept.select(wanted)

    def ranges(self, selection: Selection, most_rows: int | None = None) -> list[RowRange]:
        """Return the rows of all parts that may be selected, as ranges in order; see `cut_ranges`.

        Args:
            selection: which rows are wanted.
            most_rows: of a range; None is by their number, see `range_rows`.

        Raises:
            DataError: as `read`.
        """

        most = range_rows(self.count(selection)) if most_rows is None else most_rows

        def cut(part: str) -> list[RowRange]:
            with self._parquet(part, compared=False) as parquet:
                groups = [
                    RowGroup(group.num_rows, group.total_byte_size, self._may_match(parquet, number, selection))
                    for number, group in enumerate(map(parquet.metadata.row_group, range(parquet.num_row_groups)))
                ]
            return cut_ranges(part, groups, most)

        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return [one for ranges in pool.map(cut, self.parts) for one in ranges]

    def read_range(
        self,
        within: RowRange,
        selection: Selection | None,
        columns: Sequence[str],
        rows: int = 64,
        chosen: Collection[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows of a range as `read` those of a part.

        Raises:
            DataError: as there.
        """
        needed = _needed(columns, chosen)
        with self._parquet(within.part, needed, within.opens) as parquet:
            groups, first = _groups_of(parquet, within)
            for batch in parquet.iter_batches(batch_size=rows, row_groups=groups, columns=needed):
                start, end = max(within.first - first, 0), min(within.end - first, batch.num_rows)
                first += batch.num_rows
                if start >= end:
                    continue
                kept = batch.slice(start, end - start)
                kept = _kept(kept, selection, chosen)
                if kept.num_rows:
                    yield kept.select(list(columns))

    def table(self, selection: Selection | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return chosen columns of every part as one table; leave out images, masks and maps unless few rows are
        selected."""
        wanted = list(columns or self.schema.names)
        batches = [b for part in self.parts for b in self.read(part, selection, wanted, rows=4096)]
        schema = pa.schema([self.schema.field(name) for name in wanted])
        return pa.Table.from_batches([b.cast(schema) for b in batches], schema)

    def locate(self, selection: Selection, columns: Sequence[str]) -> pa.Table:
        """Return where the selected rows lie: the chosen columns, and of each row `part` (its number), `group` (row
        group) and `row` (its place among the selected rows of the part)."""
        batches = []
        for number, part in enumerate(self.parts):
            row = 0
            for group in range(self.groups(part)):
                batch = self.read_group(part, group, selection, columns)
                places = {
                    "part": [number] * len(batch),
                    "group": [group] * len(batch),
                    "row": range(row, row + len(batch)),
                }
                for name, values in places.items():
                    batch = batch.append_column(name, pa.array(values, pa.int64()))
                batches.append(batch)
                row += len(batch)
        return pa.concat_tables(batches)

    def groups(self, part: str) -> int:
        """Return how many row groups a part has."""
        with self._parquet(part) as parquet:
            return int(parquet.num_row_groups)

    def read_group(self, part: str, group: int, selection: Selection, columns: Sequence[str]) -> pa.Table:
        """Return chosen columns of the selected rows of one row group, in order; strings not dictionary-coded.

        Raises:
            DataError: as `read`.
        """
        needed = list(dict.fromkeys([*columns, "split", "category", "label"]))
        with self._parquet(part, needed) as parquet:
            table = parquet.read_row_group(group, columns=needed).combine_chunks()
        batches = [batch.filter(selection.mask(batch)) for batch in table.to_batches()]
        kept = pa.Table.from_batches(batches, table.schema).select(list(columns))
        plain = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in kept.schema]
        return kept.cast(pa.schema(plain))

    @contextmanager
    def _parquet(self, part: str, columns: Sequence[str] = (), compared: bool = True) -> Iterator[pq.ParquetFile]:
        """Open a part that is the one in the manifest; what goes wrong inside becomes a DataError.

        Its rows and its schema are compared always. Its checksum is, where `compared`, if `columns` hold images, masks
        or maps, which are nearly all of it, or the part is small, once in a process as long as the file stays as it is;
        the pages that are read have checksums of their own.
        """
        place = files.join(self.uri, part)
        entry = next((entry for entry in self.manifest["files"] if entry["name"] == part), None)
        if entry is None:
            raise DataError(f"{self.uri} has no part {part}")
        try:
            with self._verified(part, entry["sha256"], bool(HEAVY & set(columns)), compared) as handle:
                parquet = pq.ParquetFile(handle, page_checksum_verification=True)
                if parquet.metadata.num_rows != entry["rows"]:
                    raise DataError(
                        f"{place} holds {parquet.metadata.num_rows} rows, {MANIFEST} says {entry['rows']}; "
                        f"{self._mend()}"
                    )
                if (fault := _schema_fault(parquet.schema_arrow, self.schema)) is not None:
                    raise DataError(f"{place} is no part of a {self.kind}: {fault}; {self._mend()}")
                yield parquet
        except FileNotFoundError as error:
            raise DataError(f"{place} is listed in the manifest but missing; {self._mend()}") from error
        except (pa.ArrowException, OSError, KeyError) as error:
            if (known := storage_error(error)) is not None:
                raise known from error
            raise DataError(f"cannot read {place}: {error}; if it is damaged, {self._mend()}") from error

    def _mend(self) -> str:
        return f"copy it again, or {self._again(self.uri)}"

    @contextmanager
    def _verified(self, part: str, sha256: str, heavy: bool, compared: bool) -> Iterator[Any]:
        """Open a part, after its checksum was compared if it is to be; see `_parquet`.

        One on an object store is fetched whole for that and read from memory, so that nothing is fetched twice.

        Raises:
            DataError: another checksum than the manifest's.
        """
        place = files.join(self.uri, part)
        fs, path = files.resolve(place)
        files.check_regular(fs, path)
        info = fs.info(path)
        size = int(info["size"])
        state = (place, sha256, *(info.get(key) for key in ("size", "mtime", "ino", "ETag", "LastModified", "created")))
        if not compared or state in _verified_files or not (heavy or size <= SMALL):
            with files.open_for_reading(place) as handle:
                yield handle
            return
        content = None
        if files.is_local(place) or size > MOST_IN_MEMORY:
            found = files.sha256_file(place)
        else:
            content = files.read_bytes(place)
            found = files.sha256_of(content)
        if found != sha256:
            raise DataError(
                f"{place} is damaged or another set's: its SHA-256 is {found[:12]}…, {MANIFEST} says {sha256[:12]}…; "
                f"{self._mend()}"
            )
        _verified_files.add(state)
        if content is not None:
            yield io.BytesIO(content)
            return
        with files.open_for_reading(place) as handle:
            yield handle

    def _may_match(self, parquet: pq.ParquetFile, group: int, selection: Selection | None) -> bool:
        """Return whether a row group can hold a selected row, by its statistics of `split`."""
        if selection is None or not selection.splits:
            return True
        statistics = parquet.metadata.row_group(group).column(self.schema.names.index("split")).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        return any(statistics.min <= split <= statistics.max for split in selection.splits)


def _groups_of(parquet: pq.ParquetFile, within: RowRange) -> tuple[list[int], int]:
    """Return the row groups that hold a range, and the number of the first row of the first of them."""
    groups: list[int] = []
    start = first = 0
    for number in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(number).num_rows
        if start < within.end and end > within.first:
            first = first if groups else start
            groups.append(number)
        start = end
    return groups, first


def _check_entry(entry: Any, manifest: str) -> None:
    """Refuse what a manifest says of a part unless it is a file beside it, with its rows and checksum."""
    types = {"name": str, "rows": int, "sha256": str}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in types.items()):
        raise DataError(f"{manifest} is damaged: a part in it lacks name, rows or sha256; copy it again")
    if not files.is_plain_name(entry["name"]):
        raise DataError(
            f"{manifest} names the part {entry['name']!r}, which is no file beside it; nothing is read from elsewhere, "
            f"so copy the whole folder again"
        )


_COUNTS = {"counts": [{"dataset": str, "category": str, "split": str, "label": object, "count": int}]}


def _shape_fault(content: Any, wanted: Any, name: str = "it") -> str | None:
    """Return where what was read from a JSON file is not what `stated` says, in words."""
    if isinstance(wanted, type | UnionType):
        return None if isinstance(content, wanted) else f"{name} is no {getattr(wanted, '__name__', wanted)}"
    if not isinstance(content, type(wanted)):
        return f"{name} is no {type(wanted).__name__}"
    if isinstance(wanted, list):
        faults = (_shape_fault(entry, wanted[0], f"an entry of {name}") for entry in content)
    else:
        faults = (
            _shape_fault(content[key], inner, key) if key in content else f"{name} has no {key}"
            for key, inner in wanted.items()
        )
    return next((fault for fault in faults if fault is not None), None)


def _schema_fault(found: pa.Schema, expected: pa.Schema) -> str | None:
    """Return where the schema of a part differs from the one it should have, in words."""
    for field in expected:
        if field.name not in found.names:
            return f"it has no column {field.name}"
        if found.field(field.name).type != field.type:
            return f"column {field.name} is {found.field(field.name).type}, not {field.type}"
    return None


@dataclass(frozen=True)
class ShardSet(PartSet):
    """Samples, as jobs/ingest.py writes them."""

    schema: ClassVar[pa.Schema] = SAMPLE_SCHEMA
    version: ClassVar[int] = SCHEMA_VERSION
    kind: ClassVar[str] = "shard set"
    job: ClassVar[str] = "jobs/ingest.py"
    stated: ClassVar[dict[str, Any]] = {"rejected": dict, "summary": {"masks": {"missing": {"count": int}}}}

    def rejected(self) -> pa.Table:
        """Return samples that ingest could not take, rows of `REJECTED_SCHEMA`.

        Raises:
            DataError: the file is missing, damaged or cannot be read.
        """
        place = files.join(self.uri, REJECTED)
        try:
            with files.open_for_reading(place) as handle:
                table = pq.read_table(handle).cast(REJECTED_SCHEMA)
        except (pa.ArrowException, OSError, ValueError) as error:
            if (known := storage_error(error)) is not None:
                raise known from error
            raise DataError(f"cannot read {place}: {error}; {self._mend()}") from error
        expected = sum(self.manifest.get("rejected", {}).values())
        if len(table) != expected:
            raise DataError(f"{place} holds {len(table)} rows, {MANIFEST} says {expected}; {self._mend()}")
        return table


@dataclass(frozen=True)
class ScoreSet(PartSet):
    """Scores, as jobs/score.py writes them; rejected samples are rows too, with their status and no score."""

    schema: ClassVar[pa.Schema] = SCORE_SCHEMA
    version: ClassVar[int] = SCORE_VERSION
    kind: ClassVar[str] = "score set"
    job: ClassVar[str] = "jobs/score.py"
    stated: ClassVar[dict[str, Any]] = {
        "shards": {"digest": str},
        "models": [{"digest": str, "config": {"input": dict}}],
        "splits": list,
        "maps": bool | str,
        "statuses": dict,
    }

    @property
    def maps(self) -> MapsKept:
        """Which anomaly maps are there: of no image, of those that come to review or fail, or of all.

        Raises:
            DataError: the manifest says something else.
        """
        kept = self.manifest["maps"]
        if isinstance(kept, bool):  # as before there was a choice of three
            return "all" if kept else "none"
        if kept not in get_args(MapsKept):
            raise DataError(
                f"{self.uri} holds the maps of '{kept}' images, this unianom knows {', '.join(get_args(MapsKept))}; "
                f"{self._again(self.uri)}"
            )
        return kept  # type: ignore[no-any-return]


class PartWriter:
    """Writes rows as a part: a new row group at every change of split, after more than `group_bytes` and after
    `group_rows` rows. A context manager, which closes it.

    Row groups of one split let readers skip the others. Image bytes are stored as they are: they are compressed
    already. Every page has a checksum, so that readers notice damage that Parquet itself would not.

    Args:
        handle: of a file that is open for writing.
        schema: of the rows.
        group_bytes: of images, masks and maps.
        group_rows: None for any number.
    """

    def __init__(
        self, handle: IO[bytes], schema: pa.Schema, group_bytes: int = 64 << 20, group_rows: int | None = None
    ) -> None:
        self._writer = pq.ParquetWriter(
            handle,
            schema,
            compression={name: _codec(name) for name in schema.names},
            use_dictionary=_dictionary(schema),
            write_page_checksum=True,
        )
        self._schema = schema
        self._group_bytes = group_bytes
        self._group_rows = group_rows or sys.maxsize
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._split: str | None = None
        self._bytes = 0
        self._count = 0

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._begin_row(row["split"])
        self._rows.append(row)
        self._count += 1
        self._bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))

    def write_table(self, table: pa.Table) -> None:
        """Add rows of the part's schema; the file is the same as if each was added by itself."""
        self._gather_rows()
        splits = table["split"].to_pylist()
        changes = [row for row in range(1, len(splits)) if splits[row] != splits[row - 1]]
        sizes = _binary_bytes(table)
        start = 0
        while start < len(splits):
            self._begin_row(splits[start])
            filled = self._bytes + np.cumsum(sizes[start:])  # after each row
            full = int(np.searchsorted(filled, self._group_bytes, side="right")) + start + 1
            full = min(full, start + self._group_rows - self._count)
            end = min([change for change in changes if change > start] + [full, len(splits)])
            self._tables.append(table.slice(start, end - start))
            self._bytes = int(filled[end - start - 1])
            self._count += end - start
            start = end

    def _begin_row(self, split: str) -> None:
        """Begin a row group where the next row is of another split, or this group is full."""
        if split != self._split or self._bytes > self._group_bytes or self._count >= self._group_rows:
            self._flush()
        self._split = split

    def _gather_rows(self) -> None:
        if self._rows:
            self._tables.append(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def _flush(self) -> None:
        self._gather_rows()
        if self._tables:
            self._writer.write_table(_as_one(self._tables, self._schema))
        self._tables, self._bytes, self._count = [], 0, 0

    def close(self) -> None:
        """Write what is left and the footer. Closing again does nothing."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(Exception):  # the file is thrown away; one left open would warn when it is collected
            self._writer.close()


def _needed(columns: Sequence[str], chosen: Collection[str] | None) -> list[str]:
    """Return the columns to read for those that are asked for, and to select and choose rows by."""
    named = () if chosen is None else ("sample_id",)
    return list(dict.fromkeys([*columns, *named, "split", "category", "label"]))


def _kept(batch: pa.RecordBatch, selection: Selection | None, chosen: Collection[str] | None) -> pa.RecordBatch:
    """Return the rows of a batch that are selected and, by sample_id, chosen; None takes all."""
    kept = batch if selection is None else batch.filter(selection.mask(batch))
    if chosen is None:
        return kept
    return kept.filter(pa.array([name in chosen for name in kept["sample_id"].to_pylist()], pa.bool_()))


def _binary_bytes(table: pa.Table) -> np.ndarray:
    """Return the bytes of each row's images, masks and maps."""
    sizes = np.zeros(len(table), np.int64)
    for field in table.schema:
        if pa.types.is_binary(field.type):
            sizes += pc.fill_null(pc.binary_length(table[field.name]), 0).to_numpy()
    return sizes


def _as_one(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """Join tables to one whose columns are in one piece, with dictionaries of the values that occur, in their order."""
    joined = pa.concat_tables(tables)
    columns = []
    for field in schema:
        column = joined[field.name]
        if pa.types.is_dictionary(field.type):
            columns.append(column.cast(field.type.value_type).combine_chunks().dictionary_encode())
        else:
            columns.append(column.combine_chunks())
    return pa.Table.from_arrays(columns, schema=schema)


def _codec(name: str) -> str:
    return "none" if name in ("image", "mask", "anomaly_map") else "zstd"


def _dictionary(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_dictionary(field.type)]


def write_rejected(uri: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write `_rejected.parquet`, also when nothing was rejected; the rows come sorted by sample_id."""
    path = files.join(uri, REJECTED)
    with files.open_atomic(path) as handle, pq.ParquetWriter(handle, REJECTED_SCHEMA, compression="zstd") as writer:
        left = iter(rows)
        table = _next_rejected(left)
        writer.write_table(table)  # also without a row
        while len(table):
            table = _next_rejected(left)
            if len(table):
                writer.write_table(table)


def _next_rejected(rows: Iterator[dict[str, Any]]) -> pa.Table:
    """Return the rows of the next row group; as dicts, few are in memory at once."""
    few = (list(islice(rows, 1024)) for _ in range(1024))
    tables = [pa.Table.from_pylist(found, REJECTED_SCHEMA) for found in few if found]
    return pa.concat_tables([REJECTED_SCHEMA.empty_table(), *tables]).combine_chunks()

"""Shard sets and score sets: a folder of Parquet files and their manifest.

`part-*.parquet` hold rows of `SAMPLE_SCHEMA` or `SCORE_SCHEMA`; a shard set also has `_rejected.parquet` with rows of
`REJECTED_SCHEMA`. `_manifest.json` is written last, so a folder without one is unfinished. A part is the unit of work
of every job.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unianom import files
from unianom.data.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA, SCORE_VERSION, SPLITS
from unianom.errors import DataError

MANIFEST = "_manifest.json"
REJECTED = "_rejected.parquet"


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
        """Which rows of a batch are selected; an unknown label is in no list of labels."""
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
        if manifest.get("kind") != cls.kind:
            raise DataError(f"{folder} is a {manifest.get('kind')}, not a {cls.kind}; make one with {cls.job}")
        if manifest.get("schema_version") != cls.version:
            raise DataError(
                f"{folder} has schema version {manifest.get('schema_version')}, this unianom reads {cls.version}; "
                f"{cls._again(folder)}"
            )
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
        """How many samples a selection holds, from the manifest."""
        return sum(
            row["count"]
            for row in self.manifest["counts"]
            if (not selection.splits or row["split"] in selection.splits)
            and (not selection.categories or row["category"] in selection.categories)
            and (not selection.labels or row["label"] in selection.labels)
        )

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
    ) -> Iterator[pa.RecordBatch]:
        """Rows of one part in their order, at most `rows` in a batch; row groups that cannot match are skipped.

        Raises:
            DataError: the part is missing, damaged or cannot be read.
        """
        wanted = list(columns or self.schema.names)
        with self._parquet(part) as parquet:
            groups = [g for g in range(parquet.num_row_groups) if self._may_match(parquet, g, selection)]
            needed = list(dict.fromkeys([*wanted, "split", "category", "label"]))
            for batch in parquet.iter_batches(batch_size=rows, row_groups=groups, columns=needed):
                kept = batch if selection is None else batch.filter(selection.mask(batch))
                if kept.num_rows:
                    yield kept.select(wanted)

    def table(self, selection: Selection | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Chosen columns of every part as one table; leave out images, masks and maps unless few rows are
        selected."""
        wanted = list(columns or self.schema.names)
        batches = [b for part in self.parts for b in self.read(part, selection, wanted, rows=4096)]
        schema = pa.schema([self.schema.field(name) for name in wanted])
        return pa.Table.from_batches([b.cast(schema) for b in batches], schema)

    def locate(self, selection: Selection, columns: Sequence[str]) -> pa.Table:
        """Where the selected rows lie: the chosen columns, and of each row `part` (its number), `group` (row group)
        and `row` (its place among the selected rows of the part)."""
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
        """How many row groups a part has."""
        with self._parquet(part) as parquet:
            return int(parquet.num_row_groups)

    def read_group(self, part: str, group: int, selection: Selection, columns: Sequence[str]) -> pa.Table:
        """Chosen columns of the selected rows of one row group, in order; strings not dictionary-coded.

        Raises:
            DataError: as `read`.
        """
        needed = list(dict.fromkeys([*columns, "split", "category", "label"]))
        with self._parquet(part) as parquet:
            table = parquet.read_row_group(group, columns=needed).combine_chunks()
        batches = [batch.filter(selection.mask(batch)) for batch in table.to_batches()]
        kept = pa.Table.from_batches(batches, table.schema).select(list(columns))
        plain = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in kept.schema]
        return kept.cast(pa.schema(plain))

    @contextmanager
    def _parquet(self, part: str) -> Iterator[pq.ParquetFile]:
        """An open part; what goes wrong inside becomes a DataError."""
        fs, path = files.resolve(files.join(self.uri, part))
        try:
            with fs.open(path, "rb") as handle:
                yield pq.ParquetFile(handle, page_checksum_verification=True)
        except FileNotFoundError as error:
            raise DataError(
                f"{self.uri}/{part} is listed in the manifest but missing; {self._again(self.uri)}"
            ) from error
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(
                f"cannot read {self.uri}/{part}: {error}; if it is damaged, {self._again(self.uri)}"
            ) from error

    def _may_match(self, parquet: pq.ParquetFile, group: int, selection: Selection | None) -> bool:
        """Whether a row group can hold a selected row, by its statistics of `split`."""
        if selection is None or not selection.splits:
            return True
        statistics = parquet.metadata.row_group(group).column(self.schema.names.index("split")).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        return any(statistics.min <= split <= statistics.max for split in selection.splits)


@dataclass(frozen=True)
class ShardSet(PartSet):
    """Samples, as jobs/ingest.py writes them."""

    schema: ClassVar[pa.Schema] = SAMPLE_SCHEMA
    version: ClassVar[int] = SCHEMA_VERSION
    kind: ClassVar[str] = "shard set"
    job: ClassVar[str] = "jobs/ingest.py"

    def rejected(self) -> pa.Table:
        """Samples that ingest could not take, rows of `REJECTED_SCHEMA`.

        Raises:
            DataError: the file is missing, damaged or cannot be read.
        """
        fs, path = files.resolve(files.join(self.uri, REJECTED))
        try:
            with fs.open(path, "rb") as handle:
                return pq.read_table(handle).cast(REJECTED_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {self.uri}/{REJECTED}: {error}; {self._again(self.uri)}") from error


@dataclass(frozen=True)
class ScoreSet(PartSet):
    """Scores, as jobs/score.py writes them; rejected samples are rows too, with their status and no score."""

    schema: ClassVar[pa.Schema] = SCORE_SCHEMA
    version: ClassVar[int] = SCORE_VERSION
    kind: ClassVar[str] = "score set"
    job: ClassVar[str] = "jobs/score.py"


class PartWriter:
    """Writes rows as a part: a new row group at every change of split and every `group_bytes`.

    Row groups of one split let readers skip the others. Image bytes are stored as they are: they are compressed
    already. Every page has a checksum, so that readers notice damage that Parquet itself would not.
    """

    def __init__(self, handle: IO[bytes], schema: pa.Schema, group_bytes: int = 64 << 20) -> None:
        self._writer = pq.ParquetWriter(
            handle,
            schema,
            compression={name: _codec(name) for name in schema.names},
            use_dictionary=_dictionary(schema),
            write_page_checksum=True,
        )
        self._schema = schema
        self._group_bytes = group_bytes
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        if self._rows and (row["split"] != self._rows[-1]["split"] or self._bytes > self._group_bytes):
            self._flush()
        self._rows.append(row)
        self._bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        self._writer.close()


def _codec(name: str) -> str:
    return "none" if name in ("image", "mask", "anomaly_map") else "zstd"


def _dictionary(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_dictionary(field.type)]


def write_rejected(uri: str, rows: list[dict[str, Any]]) -> None:
    """Write `_rejected.parquet`, sorted by sample_id; also when nothing was rejected."""
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["sample_id"]), REJECTED_SCHEMA)
    with files.open_atomic(files.join(uri, REJECTED)) as handle:
        pq.write_table(table, handle, compression="zstd")

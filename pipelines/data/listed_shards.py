"""A shard set without images: samples whose files lie elsewhere, and are fetched from there when they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.fetch import ERROR, STATUS, fetched_rows
from pipelines.data.image_files import AT_ONCE
from pipelines.data.timed_pool import TimedPool
from unianom.data.image import ImageLimits
from unianom.data.image_listing import CHECKED_SCHEMA
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SAMPLE_SCHEMA
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.options import from_plain

LISTED = "listed"
"""Entry of the manifest: the digest of the listing before an image was read."""


@dataclass(frozen=True)
class ListedShards(ShardSet):
    """Samples whose images were read and decoded once, and stay where they lie.

    Whoever asks for images gets those that were checked: their checksums are compared.
    """

    schema: ClassVar[pa.Schema] = CHECKED_SCHEMA
    kind: ClassVar[str] = "checked listing"
    job: ClassVar[str] = "jobs/train.py --images"
    stated: ClassVar[dict[str, Any]] = {**ShardSet.stated, LISTED: str, "limits": dict}

    def read(
        self,
        part: str,
        selection: Selection | None = None,
        columns: Sequence[str] | None = None,
        rows: int = 64,
        chosen: Collection[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows as `ShardSet.read`; where images are asked for, `AT_ONCE` in a batch.

        Raises:
            DataError: as there, or an image cannot be fetched any more, or is another one.
        """
        wanted = list(columns or SAMPLE_SCHEMA.names)
        read = super().read(part, selection, _stored(wanted), rows, chosen)
        return self._with_images(read, wanted) if "image" in wanted else read

    def read_range(
        self,
        within: RowRange,
        selection: Selection | None,
        columns: Sequence[str],
        rows: int = 64,
        chosen: Collection[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows as `ShardSet.read_range`; images as of `read`."""
        read = super().read_range(within, selection, _stored(columns), rows, chosen)
        return self._with_images(read, columns) if "image" in columns else read

    def _with_images(self, batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        limits = from_plain(ImageLimits, self.manifest["limits"])
        schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in columns])
        with TimedPool(AT_ONCE, limits) as pool:
            for rows in fetched_rows(pool, limits, map(_with_checked, batches)):
                for row in rows:
                    self._check(row)
                yield pa.RecordBatch.from_pylist(rows, schema)

    def _check(self, row: dict[str, Any]) -> None:
        """Refuse an image that is not the one that was checked."""
        if STATUS in row:
            what = f"{row['sample_id']} could be read when it was listed, and now cannot: {row[ERROR]}"
        elif row["sha256"] != row[_CHECKED]:
            what = f"{row['uri']} has changed since it was listed"
        else:
            return
        raise DataError(f"{what}; bring it back, or {self._again(self.uri)}")


def planned_source(shards: ShardSet) -> dict[str, str]:
    """Return what a plan says of its images: the digest of the shards or, before and after one is read, of a
    listing."""
    return {"images": shards.manifest[LISTED]} if isinstance(shards, ListedShards) else {"shards": shards.digest}


_CHECKED = "checked"
"""Name of the listed checksum, where that of the fetched image stands beside it."""


def _with_checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.rename_columns([_CHECKED if name == "sha256" else name for name in batch.schema.names])


def _stored(columns: Sequence[str]) -> list[str]:
    """Return the columns that are read of a listing for those that are asked for."""
    needed = ("sample_id", "uri", "sha256") if "image" in columns else ()
    return [name for name in dict.fromkeys([*columns, *needed]) if name in CHECKED_SCHEMA.names]

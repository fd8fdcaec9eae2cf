"""Listed images, fetched from where they lie ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.ahead import map_ahead
from pipelines.data.image_files import AHEAD, AHEAD_BYTES, AT_ONCE, read_image_file
from pipelines.data.timed_pool import TimedPool
from unianom import files
from unianom.data.image import ImageLimits
from unianom.data.image_listing import ImageListing
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SAMPLE_SCHEMA
from unianom.errors import ImageError

STATUS, ERROR = "status", "error"
"""Columns of why an image could not be fetched, which then is null."""


class ImageFetcher:
    """Reads rows of a listing with the images themselves.

    Args:
        listing: where they lie.
        limits: what an image may cost; its file is read within the time limit, and not at all if it is too large.
    """

    def __init__(self, listing: ImageListing, limits: ImageLimits) -> None:
        self._listing, self._limits = listing, limits
        self._pool = TimedPool(AT_ONCE, limits)

    def read_range(self, within: RowRange, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield rows of a range in their order, some at once.

        Args:
            within: of the listing.
            columns: of `SAMPLE_SCHEMA`; what is known only of decoded images is null.

        Returns:
            The columns, `STATUS` and `ERROR`.
        """
        listed = [name for name in columns if name in self._listing.schema.names]
        fields = [*(SAMPLE_SCHEMA.field(name).with_nullable(True) for name in columns)]
        schema = pa.schema([*fields, *(pa.field(name, pa.string()) for name in (STATUS, ERROR))])
        batches = self._listing.read_range(within, None, list(dict.fromkeys([*listed, "uri", "size"])))
        for rows in fetched_rows(self._pool, self._limits, batches):
            yield pa.RecordBatch.from_pylist(rows, schema)


Row = dict[str, Any]


def fetched_rows(pool: TimedPool, limits: ImageLimits, batches: Iterable[pa.RecordBatch]) -> Iterator[list[Row]]:
    """Yield rows that name images by `uri` with these, in their order, `AT_ONCE` at a time, fewer where they are large.

    Args:
        pool: threads that fetch, `AT_ONCE`.
        limits: what an image may cost.
        batches: the rows; with `size` an image that is too large is not even fetched.

    Returns:
        The rows as plain data, with `image` and its `sha256`, or with `STATUS` and `ERROR`.
    """

    def fetch(row: Row) -> Row:
        try:
            limits.check_bytes(row.get("size") or 0)
            data = read_image_file(row["uri"])
        except ImageError as error:
            return _failed(row, error)
        return {**row, "image": data, "sha256": files.sha256_of(data)}

    waiting: list[Row] = []
    held = 0
    wanted = (row for batch in batches for row in batch.to_pylist())
    for row in map_ahead(pool, fetch, wanted, AHEAD, _failed, lambda row: row.get("size") or 0, AHEAD_BYTES):
        size = len(row.get("image") or b"")
        if waiting and held + size > AHEAD_BYTES:  # far less than the 2 GiB that a column of a batch holds
            yield waiting
            waiting, held = [], 0
        waiting.append(row)
        held += size
        if len(waiting) == AT_ONCE:
            yield waiting
            waiting, held = [], 0
    if waiting:
        yield waiting


def _failed(row: Row, error: ImageError) -> Row:
    return {**row, STATUS: error.status, ERROR: str(error)}


def fetch_errors(table: pa.Table) -> dict[int, ImageError]:
    """Return why images were not fetched, by the number of their row."""
    if STATUS not in table.column_names:
        return {}
    rows = np.flatnonzero(table["image"].is_null().to_numpy())
    told = table.select([STATUS, ERROR]).take(pa.array(rows)).to_pylist()
    return {int(row): ImageError(one[STATUS], one[ERROR]) for row, one in zip(rows, told, strict=True)}

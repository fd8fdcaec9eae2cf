"""Listed images, fetched from where they lie ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipelines.data.ahead import map_ahead
from pipelines.data.ingest_part import read_image_file
from pipelines.data.timed_pool import TimedPool
from unianom import files
from unianom.data.image import ImageLimits
from unianom.data.image_listing import ImageListing
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SAMPLE_SCHEMA
from unianom.errors import ImageError

AT_ONCE = 16
"""Images that a worker fetches at the same time; on object stores that is waiting."""

AHEAD = 2 * AT_ONCE
"""Images that are being fetched or wait, at most."""

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
        rows = (
            row
            for batch in self._listing.read_range(within, None, list(dict.fromkeys([*listed, "uri", "size"])))
            for row in batch.to_pylist()
        )
        waiting: list[dict[str, object]] = []
        for row in map_ahead(self._pool, self._fetch, rows, AHEAD, _failed):
            waiting.append(row)
            if len(waiting) == AT_ONCE:
                yield _batch(waiting, columns)
                waiting = []
        if waiting:
            yield _batch(waiting, columns)

    def _fetch(self, row: dict[str, object]) -> dict[str, object]:
        try:
            self._limits.check_bytes(int(row["size"] or 0))  # type: ignore[call-overload]
            data = read_image_file(str(row["uri"]))
        except ImageError as error:
            return _failed(row, error)
        return {**row, "image": data, "sha256": files.sha256_of(data)}


def _failed(row: dict[str, object], error: ImageError) -> dict[str, object]:
    return {**row, STATUS: error.status, ERROR: str(error)}


def _batch(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> pa.RecordBatch:
    fields = [*(SAMPLE_SCHEMA.field(name).with_nullable(True) for name in columns)]
    fields += [pa.field(name, pa.string()) for name in (STATUS, ERROR)]
    return pa.RecordBatch.from_pylist(list(rows), pa.schema(fields))


def fetch_errors(table: pa.Table) -> dict[int, ImageError]:
    """Return why images were not fetched, by the number of their row."""
    if STATUS not in table.column_names:
        return {}
    rows = np.flatnonzero(table["image"].is_null().to_numpy())
    told = table.select([STATUS, ERROR]).take(pa.array(rows)).to_pylist()
    return {int(row): ImageError(one[STATUS], one[ERROR]) for row, one in zip(rows, told, strict=True)}

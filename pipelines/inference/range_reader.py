"""Reads the images of a range of rows: the first stage of a scoring, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.decoded_rows import decode_fitted, is_listed, same_model_batches, with_sizes
from pipelines.data.fetch import ImageFetcher, fetch_errors
from pipelines.data.timed_pool import TimedPool
from pipelines.inference.score_columns import IDENTITY
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.image_listing import ImageListing
from unianom.data.row_ranges import RowRange
from unianom.data.shards import Selection, ShardSet
from unianom.errors import ImageError


class RangeReader:
    """Reads a range of rows as prepared images. A `ReadStage`.

    Its block holds, for each run of neighbouring rows of one model, the images that can be read, N×S×S×3 uint8, under
    the run's number; the `IDENTITY` columns of all rows; and as plain data the runs and what cannot be read.

    Args:
        shards, selection, model_set, limits: see `RangeScorer`.
        policies: input policy of each model folder.
    """

    def __init__(
        self,
        shards: ShardSet | ImageListing,
        selection: Selection,
        model_set: ModelSet,
        limits: ImageLimits,
        policies: Mapping[str, InputPolicy],
    ) -> None:
        self._shards, self._selection, self._model_set = shards, selection, model_set
        self._limits, self._policies = limits, policies
        self._fetcher = ImageFetcher(shards, limits) if isinstance(shards, ImageListing) else None
        self._pool = TimedPool(1, limits)

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        """Return the images of a range."""
        within = RowRange(**task)
        rows = clock.iterate("read", self._rows(within, [*IDENTITY, "image"]))
        arrays: dict[str, np.ndarray] = {}
        tables: list[pa.Table] = []
        runs: list[dict[str, Any]] = []
        for folder, table in same_model_batches(rows, self._model_set.folder_of, within.rows):
            pixels, sizes, errors = self._decoded(table, self._policies[folder], clock)
            arrays[str(len(runs))] = pixels
            told = [[row, error.status, str(error)] for row, error in errors.items()]
            runs.append({"model": folder, "rows": len(table), "errors": told})
            known = table.select(list(IDENTITY))
            tables.append(with_sizes(known, sizes, errors) if is_listed(table) else known)
        return Block(arrays, pa.concat_tables(tables) if tables else None, {"runs": runs})

    def _rows(self, within: RowRange, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if self._fetcher is not None:
            return self._fetcher.read_range(within, columns)
        return self._shards.read_range(within, self._selection, columns)

    def _decoded(
        self, table: pa.Table, policy: InputPolicy, clock: StageClock
    ) -> tuple[np.ndarray, np.ndarray, dict[int, ImageError]]:
        """Return the images that can be read, height and width of the files of all, and why the others cannot, by the
        number of their row."""
        pixels = np.empty((len(table), policy.side, policy.side, 3), np.uint8)
        sizes = np.zeros((len(table), 2), np.int32)
        unread = fetch_errors(table)
        images = table["image"]

        def decode(row: int) -> ImageError | None:
            if row in unread:
                return unread[row]
            try:
                pixels[row], sizes[row] = decode_fitted(images[row].as_py(), policy, self._limits, clock)
            except ImageError as error:
                return error
            return None

        found = self._pool.submit_each(decode, range(len(table))).result()
        errors = {row: error for row, error in enumerate(found) if error is not None}
        return (np.delete(pixels, list(errors), axis=0) if errors else pixels), sizes, errors

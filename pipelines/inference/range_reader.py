"""Reads the images of a range of rows: the first stage of a scoring, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.decoded_rows import decode_fitted, is_listed, same_model_batches, with_sizes
from pipelines.data.fetch import ImageFetcher, fetch_errors
from pipelines.data.image_files import AT_ONCE
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
        pixels: list[list[np.ndarray]] = []
        tables: list[pa.Table] = []
        runs: list[dict[str, Any]] = []
        # files of a few images at a time, since a range may have hundreds of any size
        for folder, table in same_model_batches(rows, self._model_set.folder_of, AT_ONCE):
            if not runs or runs[-1]["model"] != folder:
                runs.append({"model": folder, "rows": 0, "errors": []})
                pixels.append([])
            run = runs[-1]
            images, sizes, errors = self._decoded(table, self._policies[folder], clock)
            pixels[-1] += images
            run["errors"] += [[run["rows"] + row, error.status, str(error)] for row, error in errors.items()]
            run["rows"] += len(table)
            known = table.select(list(IDENTITY))
            tables.append(with_sizes(known, sizes, errors) if is_listed(table) else known)
        arrays = {str(number): self._stacked(run["model"], pixels[number]) for number, run in enumerate(runs)}
        return Block(arrays, pa.concat_tables(tables) if tables else None, {"runs": runs})

    def _stacked(self, folder: str, images: list[np.ndarray]) -> np.ndarray:
        """Return the images of a run, N×S×S×3, N may be 0; the list is empty then."""
        side = self._policies[folder].side
        stacked = np.empty((len(images), side, side, 3), np.uint8)
        images.reverse()
        for row in range(len(stacked)):
            stacked[row] = images.pop()  # each is let go as soon as it is copied
        return stacked

    def _rows(self, within: RowRange, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if self._fetcher is not None:
            return self._fetcher.read_range(within, columns)
        return self._shards.read_range(within, self._selection, columns)

    def _decoded(
        self, table: pa.Table, policy: InputPolicy, clock: StageClock
    ) -> tuple[list[np.ndarray], np.ndarray, dict[int, ImageError]]:
        """Return the images that can be read, height and width of the files of all, and why the others cannot, by the
        number of their row."""
        sizes = np.zeros((len(table), 2), np.int32)
        unread = fetch_errors(table)
        images = table["image"]

        def decode(row: int) -> tuple[np.ndarray, tuple[int, int]] | ImageError:
            if row in unread:
                return unread[row]
            try:
                return decode_fitted(images[row].as_py(), policy, self._limits, clock)
            except ImageError as error:
                return error

        pixels: list[np.ndarray] = []
        errors: dict[int, ImageError] = {}
        for row, found in enumerate(self._pool.submit_each(decode, range(len(table))).result()):
            if isinstance(found, ImageError):
                errors[row] = found
            else:
                pixels.append(found[0])
                sizes[row] = found[1]
        return pixels, sizes, errors

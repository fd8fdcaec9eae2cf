"""Writes the scores of a range of rows: the third stage of a scoring, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.inference.score_columns import ScoreColumns, ScoredBatch, score_table
from pipelines.inference.score_manifest import score_part, score_record
from pipelines.runtime import outputs
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from unianom import files
from unianom.data.image import encode_map
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import PartWriter
from unianom.errors import ImageError


def readable(run: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers of the rows of a run whose image could be read, ascending."""
    return np.setdiff1d(np.arange(run["rows"], dtype=np.int64), [row for row, *_ in run["errors"]])


class RangeWriter:
    """Writes the score part of a range. A `WriteStage`.

    Args:
        digests, output, plan: see `RangeScorer`.
    """

    def __init__(self, digests: Mapping[str, str], output: str, plan: str) -> None:
        self._digests, self._output, self._plan = digests, output, plan
        self._pool = ThreadPoolExecutor(1)

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        """Write a score part and its record."""
        within = RowRange(**task)
        name = score_part(within.part, self._plan, within.first)
        batches, start = [], 0
        for number, run in enumerate(block.plain["runs"]):
            rows = block.rows.slice(start, run["rows"])  # type: ignore[union-attr]
            batches.append(self._scored(str(number), run, rows, block.arrays, clock))
            start += run["rows"]
        table = score_table(batches) if batches else SCORE_SCHEMA.empty_table()
        path = files.join(self._output, name)
        with clock.stage("write"):
            with files.open_atomic(path) as handle, PartWriter(handle, SCORE_SCHEMA) as writer:
                writer.write_table(table)
            record = score_record(self._plan, name, table, path)
            outputs.commit_part(self._output, name, record)
        return record

    def _scored(
        self, name: str, run: Mapping[str, Any], rows: pa.Table, arrays: Mapping[str, np.ndarray], clock: StageClock
    ) -> ScoredBatch:
        places = readable(run)
        scored = None
        if len(places):
            values = arrays[f"{name}/values"]
            decisions = np.array(run["decisions"], object)
            scored = ScoreColumns(values[0], decisions, (values[1], values[2], values[3]) if len(values) == 4 else None)
        maps = arrays.get(f"{name}/maps", np.empty((0, 0, 0), np.float32))

        def encode(anomaly_map: np.ndarray) -> tuple[bytes, float, float]:
            with clock.stage("encode maps"):
                return encode_map(anomaly_map)

        kept = places[run["kept"]].tolist() if len(places) else []
        return ScoredBatch(
            rows=rows,
            model=self._digests[run["model"]],
            places=places,
            scored=scored,
            maps={row: self._pool.submit(encode, own) for row, own in zip(kept, maps, strict=True)},
            map_pixels=maps.size,
            errors={row: ImageError(status, message) for row, status, message in run["errors"]},
        )

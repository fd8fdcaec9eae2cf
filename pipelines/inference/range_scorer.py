"""The worker of jobs/score.py: ranges of rows of shards to score parts.

    one thread reads ─▶ several decode ─▶ the worker's own: forward, search, decide ─▶ several encode maps ─▶ one writes

Each step is bounded in what it holds, and order is kept throughout.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.ahead import Behind, read_ahead
from pipelines.data.decoded_batches import BatchDecoder, DecodedBatch
from pipelines.data.decoded_rows import same_model_batches
from pipelines.data.fetch import ImageFetcher
from pipelines.data.timed_pool import TimedPool
from pipelines.inference.score_columns import IDENTITY, PackedMap, ScoreColumns, ScoredBatch, check_finite, score_table
from pipelines.inference.score_manifest import score_part, score_record
from pipelines.runtime import outputs
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.stage_clock import StageClock
from unianom import files
from unianom.calibration import Calibration
from unianom.data.image import ImageLimits, InputPolicy, encode_map
from unianom.data.image_listing import ImageListing
from unianom.data.maps import MapsKept
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import PartWriter, Selection, ShardSet
from unianom.execution import Execution
from unianom.methods.base import ScoredImages
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.thresholds import FAIL, REVIEW

STAGES = "stages"
"""Key of a task's result: CPU seconds of each stage. It is no part of the record that is stored."""

PASSED = ("read", "decode", "resize", "normalise", "predict", "rows", "encode maps", "write")
"""These stages, in the order in which images pass through."""

TOLD = ["sample_id", "status"]
"""Columns that the record of a part is made of."""

WRITTEN_ROWS = 128
WRITTEN_PIXELS = 1 << 23
"""Rows that are written at once, at most, and pixels of their maps; tables of fewer cost more than what is in them."""


class RangeScorer:
    """Scores the samples of a range of rows. A `PartTask`; its task is the range as plain data.

    Args:
        shards: the shard set, or the listing of images that lie elsewhere.
        selection: which samples; of a listing all.
        model_set: which model for which category.
        digests: model folder to model digest.
        output: folder of the score set.
        plan: digest of the scoring plan.
        maps: which anomaly maps are kept.
        batch_size: images in one forward pass; fewer where an image cannot be read or the next is another model's.
        limits: what an image may cost.
        execution: how models are run.
        threads: threads that decode images and encode maps beside the network.
        fold: whether batch norm of trained methods is folded.
    """

    def __init__(
        self,
        shards: ShardSet | ImageListing,
        selection: Selection,
        model_set: ModelSet,
        digests: dict[str, str],
        output: str,
        plan: str,
        maps: MapsKept,
        batch_size: int,
        limits: ImageLimits,
        execution: Execution,
        threads: int,
        fold: bool = False,
    ) -> None:
        self._shards, self._selection, self._model_set, self._digests = shards, selection, model_set, digests
        self._output, self._plan, self._maps = output, plan, maps
        self._batch_size, self._execution, self._fold = batch_size, execution, fold
        self._fetcher = ImageFetcher(shards, limits) if isinstance(shards, ImageListing) else None
        self._pool = TimedPool(threads, limits)
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._clock = StageClock()
        self._decoder = BatchDecoder(self._pool, threads, limits, self._clock)
        self._ahead = 2 * max(batch_size, threads)
        self._models: dict[str, Model] = {}
        if not model_set.by_category:
            self._model(model_set.uri)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one score part and its record."""
        self._clock.take()
        within = RowRange(**task)
        name = score_part(within.part, self._plan, within.first)
        told: list[pa.Table] = []
        path = files.join(self._output, name)
        with files.open_atomic(path) as handle, PartWriter(handle, SCORE_SCHEMA) as writer:
            with closing(self._decoded(within)) as batches, Behind(self._writer, 1) as behind:
                for group in _grouped(self._scored(batch) for batch in batches):
                    behind.submit(self._write, writer, told, group)
            with self._clock.stage("write"):
                writer.close()
        with self._clock.stage("write"):
            told.append(SCORE_SCHEMA.empty_table().select(TOLD))
            record = score_record(self._plan, name, pa.concat_tables(told), path)
            outputs.commit_part(self._output, name, record)
        return {**record, STAGES: self._clock.take()}

    def _decoded(self, within: RowRange) -> Generator[DecodedBatch, None, None]:
        """Yield the batches of a range, in its order; a batch never mixes models."""
        rows = self._clock.iterate("read", self._rows(within, [*IDENTITY, "image"]))
        batches = same_model_batches(read_ahead(self._reader, rows), self._model_set.folder_of, self._batch_size)
        yield from self._decoder.decoded(batches, self._policy, self._ahead)

    def _rows(self, within: RowRange, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if self._fetcher is not None:
            return self._fetcher.read_range(within, columns)
        return self._shards.read_range(within, self._selection, columns)

    def _policy(self, folder: str) -> InputPolicy:
        return self._model(folder).method.input

    def _model(self, folder: str) -> Model:
        if folder not in self._models:
            model = load_model(folder, self._execution)
            if self._fold and isinstance(model.method, TrainedMethod):
                model.fold()
            self._models[folder] = model
        return self._models[folder]

    def _scored(self, batch: DecodedBatch) -> ScoredBatch:
        scored, maps = self._score(batch) if len(batch.places) else (None, {})
        side = self._policy(batch.model).side
        return ScoredBatch(
            rows=batch.rows,
            model=self._digests[batch.model],
            places=batch.places,
            scored=scored,
            maps=maps,
            map_pixels=len(maps) * side**2,
            errors=batch.errors,
        )

    def _score(self, batch: DecodedBatch) -> tuple[ScoreColumns, Mapping[int, Future[PackedMap]]]:
        """Return what the model says of the images of a batch, and their maps that are kept, by row, being encoded."""
        model = self._model(batch.model)
        names = batch.rows["category"].to_pylist()
        categories = [names[row] for row in batch.places.tolist()]
        with self._clock.stage("predict"):
            images = batch.images.to(model.method.device)
            scored, calibration, maps = predict_batch(model, images, categories, self._maps)
            scores, *calibrated_parts = _fetch(torch.stack([scored.score.float(), *(calibration or ())]))
            calibrated = (calibrated_parts[0], calibrated_parts[1], calibrated_parts[2]) if calibration else None
            if not np.isfinite(scores).all():
                model.method.check_finite(images)
        with self._clock.stage("rows"):
            common = None if calibrated is None else calibrated[2]
            check_finite(scores, common, batch.rows["sample_id"].take(pa.array(batch.places)).to_pylist())
            decisions = model.decide_each(scores, common, categories)
        kept = batch.places
        if self._maps == "flagged":
            flagged = np.flatnonzero((decisions == REVIEW) | (decisions == FAIL))
            kept = kept[flagged]
            if len(flagged):
                with self._clock.stage("predict"):
                    maps = scored.predict_rows(torch.from_numpy(flagged).to(scored.score.device)).anomaly_map
        encoded = {}
        if maps is not None:
            encoded = {
                row: self._pool.submit_unlimited(self._encode, own)
                for row, own in zip(kept.tolist(), _fetch(maps), strict=True)
            }
        return ScoreColumns(scores, decisions, calibrated), encoded

    def _encode(self, anomaly_map: np.ndarray) -> PackedMap:
        with self._clock.stage("encode maps"):
            return encode_map(anomaly_map)

    def _write(self, writer: PartWriter, told: list[pa.Table], batches: Sequence[ScoredBatch]) -> None:
        """Write the rows of some batches, in their order; by the writer's thread."""
        with self._clock.stage("rows"):
            table = score_table(batches)
            told.append(table.select(TOLD))
        with self._clock.stage("write"):
            writer.write_table(table)


def _grouped(batches: Iterator[ScoredBatch]) -> Iterator[list[ScoredBatch]]:
    """Yield groups of batches that are written at once."""
    group: list[ScoredBatch] = []
    rows = pixels = 0
    for batch in batches:
        group.append(batch)
        rows, pixels = rows + len(batch.rows), pixels + batch.map_pixels
        if rows >= WRITTEN_ROWS or pixels >= WRITTEN_PIXELS:
            yield group
            group, rows, pixels = [], 0, 0
    if group:
        yield group


def predict_batch(
    model: Model, images: torch.Tensor, categories: Sequence[str], maps: MapsKept
) -> tuple[ScoredImages, Calibration | None, torch.Tensor | None]:
    """Return the scores of B×3×S×S images and their calibration, and, where all are kept, their maps; B×S×S. All of it
    is still on the model's device, for which nothing has waited."""
    if maps == "all":
        prediction, calibration = model.examine(images, categories)
        return ScoredImages.of(prediction), calibration, prediction.anomaly_map
    scored, calibration = model.score_images(images, categories)
    return scored, calibration, None


def _fetch(values: torch.Tensor) -> np.ndarray:
    """Return values as float32 on the host; waits for the device they are on."""
    array: np.ndarray = values.float().cpu().numpy()
    return array

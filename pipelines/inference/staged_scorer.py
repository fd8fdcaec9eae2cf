"""jobs/score.py in three stages, each on the processes that suit it; writes what `range_scorer` writes.

any CPU: read, decode, resize ─uint8─▶ a device: normalise, forward, search, decide ─▶ any CPU: encode maps, write
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.decoded_batches import decode_fitted, is_listed, same_model_batches, with_sizes
from pipelines.data.fetch import ImageFetcher, fetch_errors
from pipelines.data.timed_pool import TimedPool
from pipelines.inference.range_scorer import predict_batch
from pipelines.inference.score_columns import IDENTITY, ScoreColumns, ScoredBatch, check_finite, score_table
from pipelines.inference.score_manifest import score_part, score_record
from pipelines.runtime import outputs
from pipelines.runtime.device_turn import Turn
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stages import Stages
from unianom import files
from unianom.data.device_feed import DeviceFeed, Fetched
from unianom.data.image import ImageLimits, InputPolicy, encode_map
from unianom.data.image_listing import ImageListing
from unianom.data.maps import MapsKept
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import PartWriter, Selection, ShardSet
from unianom.errors import ImageError
from unianom.execution import Execution
from unianom.methods.base import ScoredImages
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.options import from_plain
from unianom.thresholds import FAIL, REVIEW


def scoring_stages(arguments: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Stages:
    """Return the stages of a scoring.

    Args:
        arguments: of `RangeScorer`.
        models: contents of `model.json`, in the order of the model set's folders.
    """
    folders = arguments["model_set"].folders
    policies = {
        folder: from_plain(InputPolicy, model["config"]["input"]) for folder, model in zip(folders, models, strict=True)
    }
    read = {name: arguments[name] for name in ("shards", "selection", "model_set", "limits")}
    compute = {name: arguments[name] for name in ("execution", "batch_size", "maps", "fold")}
    write = {name: arguments[name] for name in ("digests", "output", "plan")}
    return Stages(
        read=partial(RangeReader, policies=policies, **read),
        compute=partial(RangePredictor, **compute),
        write=partial(RangeWriter, **write),
    )


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


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch whose scores are computed or on their way.

    Attributes:
        start: number of its first image in the run.
        categories: of its images.
        scored: what the method knows of them.
        values: scores, and where there is a calibrator offset, scale and calibrated score; 1×B or 4×B.
        maps: all of its maps; None where not all are kept.
    """

    start: int
    categories: Sequence[str]
    scored: ScoredImages
    values: Fetched
    maps: Fetched | None


class RangePredictor:
    """Scores prepared images on a device. A `ComputeStage`.

    Its block holds, for each run, under "<run>/values" the scores, and offset, scale and calibrated score where there
    is a calibrator (1×K or 4×K float32); under "<run>/maps" the maps that are kept (M×S×S float32), and as plain data
    "decisions", and "kept", the numbers of their images.

    Args:
        execution, batch_size, maps, fold: see `RangeScorer`.
    """

    def __init__(self, execution: Execution, batch_size: int, maps: MapsKept, fold: bool) -> None:
        self._execution, self._batch_size, self._maps, self._fold = execution, batch_size, maps, fold
        self._models: dict[str, tuple[Model, DeviceFeed]] = {}
        self._loading = threading.Lock()

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        """Return what the models say of the images of a block."""
        runs: list[_Run] = []
        start = 0
        for number, run in enumerate(block.plain["runs"]):
            rows = block.rows.slice(start, run["rows"])  # type: ignore[union-attr]
            runs.append(_Run(str(number), run, rows))
            start += run["rows"]
        with torch.inference_mode():
            # the first batches are on their way to the device while another task has its turn
            given = [(run, *self._of(run.model)) for run in runs]
            coming = [feed.batches(block.arrays[run.name]) for run, _, feed in given]
            arrays: dict[str, np.ndarray] = {}
            with turn, clock.stage("predict"):
                for (run, model, feed), batches in zip(given, coming, strict=True):
                    arrays |= self._predict(run, model, feed, batches)
        return Block(arrays, block.rows, {"runs": [run.plain for run in runs]})

    def _of(self, folder: str) -> tuple[Model, DeviceFeed]:
        with self._loading:  # two tasks may come at once, and a model is loaded once
            if folder not in self._models:
                model = load_model(folder, self._execution)
                if self._fold and isinstance(model.method, TrainedMethod):
                    model.fold()
                feed = DeviceFeed(model.method.device, model.method.input, self._batch_size)
                self._models[folder] = model, feed
            return self._models[folder]

    def _predict(
        self, run: _Run, model: Model, feed: DeviceFeed, batches: Iterator[torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """Return the arrays of a run. What one batch gives is looked at when the device has the next one."""
        values: list[np.ndarray] = []
        maps: list[Fetched] = []
        kept: list[int] = []
        decisions: list[str | None] = []

        def finish(batch: _Batch) -> None:
            found = batch.values.numpy()
            common = found[3] if len(found) == 4 else None
            check_finite(found[0], common, run.sample_ids[batch.start : batch.start + found.shape[1]])
            decided = model.decide_each(found[0], common, batch.categories)
            values.append(found)
            decisions.extend(decided.tolist())
            if batch.maps is not None:
                kept.extend(range(batch.start, batch.start + found.shape[1]))
                maps.append(batch.maps)
            elif self._maps == "flagged":
                flagged = np.flatnonzero((decided == REVIEW) | (decided == FAIL))
                if len(flagged):
                    kept.extend((batch.start + flagged).tolist())
                    chosen = torch.from_numpy(flagged).to(batch.scored.score.device)
                    maps.append(feed.fetch(batch.scored.predict_rows(chosen).anomaly_map.float()))

        last: _Batch | None = None
        start = 0
        for images in batches:
            categories = run.categories[start : start + len(images)]
            scored, calibration, all_maps = predict_batch(model, images, categories, self._maps)
            stacked = torch.stack([scored.score.float(), *(part.float() for part in calibration or ())])
            batch = _Batch(
                start,
                categories,
                scored,
                feed.fetch(stacked),
                None if all_maps is None else feed.fetch(all_maps.float()),
            )
            start += len(images)
            if last is not None:
                finish(last)
            last = batch
        if last is not None:
            finish(last)
        run.plain |= {"decisions": decisions, "kept": kept}
        arrays = {f"{run.name}/values": np.concatenate(values, axis=1)} if values else {}
        if maps:
            arrays[f"{run.name}/maps"] = np.concatenate([one.numpy() for one in maps])
        return arrays


class _Run:
    """Neighbouring rows of one model in a block.

    Attributes:
        name: its number.
        plain: what is handed on of it.
        model: folder of the model.
        places: numbers of the rows whose image could be read.
        sample_ids, categories: of these.
    """

    def __init__(self, name: str, plain: Mapping[str, Any], rows: pa.Table) -> None:
        self.name, self.plain = name, dict(plain)
        self.model: str = plain["model"]
        self.places = readable(plain)
        taken = rows.select(["sample_id", "category"]).take(pa.array(self.places))
        self.sample_ids: list[str] = taken["sample_id"].to_pylist()
        self.categories: list[str] = taken["category"].to_pylist()


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

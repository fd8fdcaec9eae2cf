"""Scores the images of a range of rows on a device: the second stage of a scoring."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.inference.range_scorer import predict_batch
from pipelines.inference.range_writer import readable
from pipelines.inference.score_columns import check_finite
from pipelines.runtime.device_turn import Turn, for_task_and_batch
from pipelines.runtime.models import load_model
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from unianom.data.device_feed import DeviceFeed, Fetched
from unianom.data.maps import MapsKept
from unianom.execution import Execution
from unianom.methods.base import ScoredImages
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.thresholds import FAIL, REVIEW


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
            coming = [feed.batches(block.arrays[run.name], run.batch_sizes(self._batch_size)) for run, _, feed in given]
            arrays: dict[str, np.ndarray] = {}
            with clock.stage("predict"):
                for (run, model, feed), batches in zip(given, coming, strict=True):
                    task_turn, batch_turn = for_task_and_batch(turn, model.method.device.type)
                    with task_turn:
                        arrays |= self._predict(run, model, feed, batches, batch_turn)
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
        self,
        run: _Run,
        model: Model,
        feed: DeviceFeed,
        batches: Iterator[torch.Tensor],
        batch_turn: AbstractContextManager[None],
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
            with batch_turn:
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

    def batch_sizes(self, rows: int) -> list[int]:
        """Return how many images each batch of so many rows has, of which some cannot be read: other batches than those
        of fused stages would give other last bits."""
        sizes: list[int] = np.bincount(self.places // rows).tolist()
        return sizes

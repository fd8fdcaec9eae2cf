"""Scoring against the bare forward pass."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipelines.benchmarks.bare_forward import BareForward
from pipelines.benchmarks.harness import OURS, Side, Timing, interleave
from pipelines.benchmarks.options import PipeBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.inference.range_scorer import STAGES, RangeScorer
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.task_worker import ENDED, STARTED
from pipelines.runtime.tasks import run_tasks
from unianom import files
from unianom.data.image import ImageLimits, decode_image, prepare_image
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import OptionError
from unianom.execution import CPU, Execution
from unianom.methods import MemoryMethod, Method
from unianom.model import Model
from unianom.options import to_plain

MEANINGFUL_IMAGES = 500
"""Below so many images, the first and last task weigh too much in a throughput."""

FORWARD_IMAGES = 256
"""Images in one turn of the bare forward pass."""

STAGE_IMAGES = 128
"""Images, at least, that the stages of a worker are measured on."""


def measure_pipe(options: PipeBenchmark) -> dict[str, Any]:
    """Score a shard set as jobs/score.py does, in turns with the bare forward pass.

    A turn of scoring lasts from the start of the first task to the end of the last, so Ray's start-up is not in it; it
    is told apart. The bare forward pass is timm's `forward_features`, all blocks, on decoded images kept in memory:
    in one process, and in as many processes at the same time as there are workers.
    """
    shards = ShardSet.open(options.shards)
    workers = options.workers or os.cpu_count() or 1
    runtime = RuntimeOptions(workers=workers, local=False)
    method = memory_model(options.model)
    images = shards.count(Selection())
    alone, together = "bare forward, 1 process", f"bare forward, {workers} processes at once"
    walls: list[float] = []
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder:
        cached = str(Path(folder) / "images.npy")
        batches = input_batches(method, shards, Selection(), options.batch_size)
        np.save(cached, np.concatenate(list(islice(batches, max(1, FORWARD_IMAGES // options.batch_size)))))

        def score() -> Timing:
            with TemporaryDirectory(dir=folder) as output:
                start = time.perf_counter()
                results = list(
                    run_tasks(
                        RangeScorer, scorer_arguments(options, shards, output), _range_tasks(shards), runtime, images
                    )
                )
                walls.append(time.perf_counter() - start)
            return Timing(images, span(results))

        with BareForward(options.model, cached, options.batch_size, workers) as bare:
            sides: dict[str, Side] = {
                OURS: score,
                alone: lambda: Timing(*bare.run(1)),
                together: lambda: Timing(*bare.run(workers)),
            }
            measured = interleave(sides, options.rounds)
        stages = stage_split(options, shards, folder)
    starts = [wall - turn.seconds for wall, turn in zip(walls, measured.turns[OURS], strict=True)]
    notes = [f"Ray's start-up (actors, loading the model), not in R_pipe: {statistics.median(starts):.1f} s (median)"]
    if images < MEANINGFUL_IMAGES:
        notes.append(f"only {images} images: take at least {MEANINGFUL_IMAGES} for a figure that means something")
    return write_report(
        options,
        "images",
        measured,
        {
            f"R_pipe = {OURS} ÷ ({workers} × {alone})": measured.ratio(OURS, alone, workers),
            f"{OURS} ÷ {together}": measured.ratio(OURS, together),
        },
        start_up_seconds=starts,
        tables={"one worker, CPU milliseconds an image": stages},
        notes=notes,
    )


def scorer_arguments(options: PipeBenchmark, shards: ShardSet, output: str) -> dict[str, Any]:
    """Return the arguments of `RangeScorer`, as jobs/score.py gives them."""
    model_set = ModelSet.open(options.model)
    return {
        "shards": shards,
        "selection": Selection(),
        "model_set": model_set,
        "digests": dict(zip(model_set.folders, (model["digest"] for model in model_set.descriptions()), strict=True)),
        "output": output,
        "plan": files.digest_of(to_plain(options)),
        "maps": options.maps,
        "batch_size": options.batch_size,
        "limits": ImageLimits(),
        "execution": Execution("cpu", options.engine),
        "threads": 1,
    }


def span(results: Sequence[dict[str, Any]]) -> float:
    """Return the seconds from the start of the first task to the end of the last."""
    return max(result[ENDED] for result in results) - min(result[STARTED] for result in results)


def _range_tasks(shards: ShardSet) -> list[dict[str, Any]]:
    return [to_plain(within) for within in shards.ranges(Selection())]


def memory_model(folder: str) -> MemoryMethod:
    """Return the method of a model folder.

    Raises:
        OptionError: it holds several models, or one without a memory bank.
    """
    model_set = ModelSet.open(folder)
    if model_set.by_category:
        raise OptionError(f"{folder} holds a model for each category; give the folder of one of them")
    method = load_model(model_set.uri, CPU).method
    if not isinstance(method, MemoryMethod):
        raise OptionError(f"{folder} holds a {method.name}; this benchmark takes models with a memory bank")
    return method


def input_batches(method: Method, shards: ShardSet, selection: Selection, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield selected images as the network's input, B×3×S×S; a smaller last batch is left out."""
    policy = method.input
    waiting: list[np.ndarray] = []
    for part in shards.parts:
        for rows in shards.read(part, selection, ["image"]):
            for data in rows["image"].to_pylist():
                waiting.append(prepare_image(decode_image(data).pixels, policy))
                if len(waiting) == batch_size:
                    yield normalise(waiting, policy)
                    waiting = []


class StagedScorer(RangeScorer):
    """A `RangeScorer` that also tells how its prediction splits into forward pass and search."""

    _within = False

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Score a range; see `RangeScorer`."""
        start = time.process_time()
        result = super().run(task)
        stages = result[STAGES]
        stages["predict"] -= stages["forward"] + stages["search, map"]
        # threads of Arrow, which read and write Parquet, and of Ray
        rest = time.process_time() - start - sum(stages.values())
        return {**result, STAGES: {**stages, "rest": rest}}

    def _model(self, folder: str) -> Model:
        new = folder not in self._models
        model = super()._model(folder)
        if new:
            method: Any = model.method
            method.embed = self._clocked("forward", method.embed)
            for name in ("score_patches", "search_bank", "anomaly_maps", "image_scores"):
                setattr(method, name, self._clocked("search, map", getattr(method, name)))
        return model

    def _clocked(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are clocked, but for those within another one's: time counts once."""

        def call(*arguments: Any) -> Any:
            if self._within:
                return function(*arguments)
            self._within = True
            try:
                with self._clock.stage(stage):
                    return function(*arguments)
            finally:
                self._within = False

        return call


def stage_split(options: PipeBenchmark, shards: ShardSet, folder: str) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds an image of each stage of one worker, and its share."""
    tasks = _range_tasks(shards)
    enough = next((n for n in range(1, len(tasks)) if sum(t["rows"] for t in tasks[:n]) >= STAGE_IMAGES), len(tasks))
    seconds: dict[str, float] = {}
    images = 0
    with TemporaryDirectory(dir=folder) as output:
        arguments = scorer_arguments(options, shards, output)
        for result in run_tasks(StagedScorer, arguments, tasks[:enough], RuntimeOptions(workers=1, local=False), 0):
            for stage, spent in result[STAGES].items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            images += result["rows"]
    total = sum(seconds.values())
    return {
        stage: {"ms": 1000 * spent / images, "share": spent / total}
        for stage, spent in {**seconds, "all": total}.items()
    }

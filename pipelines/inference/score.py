"""jobs/score.py: shards and a model → scores.

    shards ─▶ actors: read, decode ahead, forward, search ─▶ one score part per shard part ─▶ manifest

A part's bytes depend on the plan alone, so whoever writes it, and however often, the folder ends up the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.data.ahead import map_ahead
from pipelines.data.engine import choose_engine, say_precision
from pipelines.data.image_source import SampleSource
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score_manifest import check_unscored, commit_scores, score_part
from pipelines.runtime import outputs
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from unianom import files
from unianom.data.image import ImageLimits, decode_prepared, encode_map
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import PartWriter, ScoreSet, Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, ImageError
from unianom.execution import CPU, Execution
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.options import to_plain

IDENTITY = ("sample_id", "dataset", "category", "split", "label", "defect", "uri", "sha256", "height", "width")


@dataclass(frozen=True)
class ScoreResult:
    """Result of a scoring.

    Attributes:
        scores: the finished score set.
        fresh: whether this run wrote anything.
        images_per_second: of this run; 0 if it had nothing to do.
    """

    scores: ScoreSet
    fresh: bool
    images_per_second: float


def score(options: ScoreOptions) -> ScoreResult:
    """Score, continue an interrupted scoring, or find it done.

    Raises:
        DataError: wrong inputs, an output that is another's, or too many samples without a score.
        ModelError: no usable model.
    """
    shards = ShardSet.open(options.shards)
    selection = Selection(options.splits, options.categories)
    shards.check(selection)
    model_set = ModelSet.open(options.model)
    models = model_set.descriptions()
    for category in options.categories or shards.categories:
        model_set.folder_of(category)
    runtime = choose_engine(
        options.runtime,
        SampleSource(shards, selection, options.limits),
        shards.count(selection) // len(models),
        lambda: load_model(model_set.folders[0], CPU).method,
    )
    execution = replace(runtime.execution, search=options.search)
    say_precision(models, execution)
    masks_missing = shards.manifest["summary"]["masks"]["missing"]["count"]
    anomalous = shards.count(Selection(options.splits, options.categories, (1,)))
    maps = anomalous > masks_missing if options.maps is None else options.maps
    plan = {
        "shards": shards.digest,
        "models": [model["digest"] for model in models],
        "splits": list(options.splits),
        "categories": list(options.categories),
        "maps": maps,
        "batch_size": options.batch_size,
        "fold_batch_norm": options.fold_batch_norm,
        "limits": to_plain(options.limits),
        **execution.plan,
        **({"search": "device"} if execution.searches_on_device else {}),  # left out before there was a choice
        "threads": runtime.cpus_per_worker,
    }
    output = files.full_uri(options.output)
    inputs = {"model": options.model, "shards": options.shards}
    with outputs.open_output(output, "score set", plan, inputs=inputs, overwrite=options.overwrite) as digest:
        fresh = not outputs.is_complete(output)
        rate = 0.0
        if fresh:
            arguments = {
                "shards": shards,
                "selection": selection,
                "model_set": model_set,
                "digests": dict(zip(model_set.folders, plan["models"], strict=True)),
                "output": output,
                "plan": digest,
                "maps": maps,
                "batch_size": options.batch_size,
                "limits": options.limits,
                "execution": execution,
                "threads": runtime.cpus_per_worker,
                "fold": options.fold_batch_norm,
            }
            rate = _write_parts(arguments, shards, selection, runtime)
            commit_scores(output, digest, shards, selection, models, plan)
    scores = ScoreSet.open(output)
    check_unscored(scores, options.max_reject_fraction)
    return ScoreResult(scores, fresh, rate)


def _write_parts(arguments: dict[str, Any], shards: ShardSet, selection: Selection, runtime: RuntimeOptions) -> float:
    """Write the score parts that are not there yet; return the images per second."""
    output, digest = arguments["output"], arguments["plan"]
    tasks, done = [], 0
    for part in shards.parts:
        record = outputs.part_record(output, score_part(part, digest))
        if record is None:
            tasks.append({"part": part})
        else:
            done += record["rows"]
    if done:
        print(f"continuing: {done} samples are scored already")
    images = shards.count(selection) - done
    progress = Progress("score", images)
    for record in run_tasks(PartScorer, arguments, tasks, runtime, images):
        progress.advance(record["rows"])
    return progress.close()


class PartScorer:
    """Scores the samples of one shard part. A `PartTask`.

    Args:
        shards: the shard set.
        selection: which samples.
        model_set: which model for which category.
        digests: model folder to model digest.
        output: folder of the score set.
        plan: digest of the scoring plan.
        maps: whether anomaly maps are kept.
        batch_size: images in one forward pass.
        limits: what an image may cost.
        execution: how models are run.
        threads: images decoded at the same time, ahead of the network.
        fold: whether batch norm of trained methods is folded.
    """

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        model_set: ModelSet,
        digests: dict[str, str],
        output: str,
        plan: str,
        maps: bool,
        batch_size: int,
        limits: ImageLimits,
        execution: Execution,
        threads: int,
        fold: bool = False,
    ) -> None:
        self._shards, self._selection, self._model_set, self._digests = shards, selection, model_set, digests
        self._output, self._plan, self._maps = output, plan, maps
        self._batch_size, self._limits, self._execution, self._fold = batch_size, limits, execution, fold
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = 2 * batch_size
        self._models: dict[str, Model] = {}
        if not model_set.by_category:
            self._model(model_set.uri)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one score part and its record."""
        name = score_part(task["part"], self._plan)
        statuses: Counter[str] = Counter()
        path = files.join(self._output, name)
        with files.open_atomic(path) as handle:
            writer = PartWriter(handle, SCORE_SCHEMA)
            for row in self._scored(task["part"]):
                writer.write(row)
                statuses[row["status"]] += 1
            writer.close()
        record = {
            "plan": self._plan,
            "name": name,
            "rows": sum(statuses.values()),
            "statuses": dict(sorted(statuses.items())),
            "sha256": files.sha256_file(path),
        }
        outputs.commit_part(self._output, name, record)
        return record

    def _scored(self, part: str) -> Iterator[dict[str, Any]]:
        """Yield rows of SCORE_SCHEMA in the order of the part; a batch never mixes models."""
        waiting: list[tuple[dict[str, Any], np.ndarray]] = []
        folder = ""
        for row, pixels in map_ahead(self._pool, self._decode, self._rows(part), self._ahead):
            if isinstance(pixels, ImageError):
                yield from self._predict(folder, waiting)
                waiting = []
                yield self._row(row, status=pixels.status, error=str(pixels))
                continue
            if waiting and (len(waiting) == self._batch_size or row["folder"] != folder):
                yield from self._predict(folder, waiting)
                waiting = []
            folder = row["folder"]
            waiting.append((row, pixels))
        yield from self._predict(folder, waiting)

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        for batch in self._shards.read(part, self._selection, [*IDENTITY, "image"]):
            for row in batch.to_pylist():
                folder = self._model_set.folder_of(row["category"])
                self._model(folder)  # loaded here, in the actor's own thread, before a decoding thread asks for it
                yield {**row, "folder": folder}

    def _decode(self, row: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | ImageError]:
        data = row.pop("image")
        policy = self._model(row["folder"]).method.input
        try:
            return row, decode_prepared(data, policy, self._limits)
        except ImageError as error:
            return row, error

    def _model(self, folder: str) -> Model:
        if folder not in self._models:
            model = load_model(folder, self._execution)
            if self._fold and isinstance(model.method, TrainedMethod):
                model.fold()
            self._models[folder] = model
        return self._models[folder]

    def _predict(self, folder: str, waiting: list[tuple[dict[str, Any], np.ndarray]]) -> Iterator[dict[str, Any]]:
        if not waiting:
            return
        model = self._model(folder)
        images = normalise([pixels for _, pixels in waiting], model.method.input).to(model.method.device)
        prediction, calibration = model.examine(images, [row["category"] for row, _ in waiting])
        scores = prediction.score.float().cpu().numpy()
        maps = prediction.anomaly_map.float().cpu().numpy()
        affine: list[tuple[float | None, ...]] = [(None, None, None)] * len(waiting)
        if calibration is not None:
            affine = list(zip(*(part.float().cpu().tolist() for part in calibration), strict=True))
        for (row, _), value, anomaly_map, (level, spread, common) in zip(waiting, scores, maps, affine, strict=True):
            if not np.isfinite(value) or (common is not None and not np.isfinite(common)):
                model.method.check_finite(images)
                raise DataError(
                    f"{row['sample_id']} got the score {value} (calibrated: {common}); check the model's weights and "
                    f"precision"
                )
            decision = model.decide(float(value), common, row["category"])
            encoded, offset, scale = encode_map(anomaly_map) if self._maps else (None, None, None)
            yield self._row(
                row,
                score=float(value),
                calibrated_score=common,
                calibration_offset=level,
                calibration_scale=spread,
                decision=decision,
                anomaly_map=encoded,
                map_offset=offset,
                map_scale=scale,
                status="ok",
            )

    def _row(self, row: dict[str, Any], **values: Any) -> dict[str, Any]:
        return {**{key: row[key] for key in IDENTITY}, "model": self._digests[row["folder"]], **values}

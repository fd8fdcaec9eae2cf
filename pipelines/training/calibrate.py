"""A fitted model and normal training images → the model with a calibrator, whose scores all categories share (CADA).

    shards ─▶ actors: what the method makes of every normal image ─▶ cached embeddings and statistics ─▶ one actor: the
    head ─▶ calibrator in the model folder

The cache has a key of its own, so that another variant or another head runs no network, and a killed run continues; the
head's training continues from its last checkpoint.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import ray
import torch

from pipelines.data.feature_cache import (
    Arrays,
    BatchFunction,
    CachedFeatures,
    FeatureCache,
    ImageBatch,
    JoinedRows,
    finite,
)
from pipelines.data.image_source import SampleSource
from pipelines.data.splits import held_out_normals, some
from pipelines.runtime import outputs
from pipelines.runtime.actors import connect, set_threads
from pipelines.runtime.errors import user_error
from pipelines.runtime.locks import exclusive
from pipelines.runtime.model_set import ModelSet, write_index
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import scope, track
from pipelines.training.options import CalibrateOptions
from unianom import __version__, files
from unianom.calibration import Calibrator, HeadTrainer, MapStatistics
from unianom.configs.calibration import CalibrationConfig
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.methods import Method
from unianom.model import Model, is_model, versions
from unianom.options import to_plain

FEATURES, STATISTICS, CATEGORY = "embedding", "statistics", "category"
"""Names of the cached arrays: N×C×h×w; N×3 float64, mean, mean square and maximum of each map; N int32,
their classes."""

MOMENTS = "moments"
"""Name of the array of the sums of the embeddings' channels and of their squares, 2×C float64 for each batch."""


@dataclass(frozen=True)
class CalibrateResult:
    """One calibrated model.

    Attributes:
        folder: its model folder.
        categories: those it was calibrated with.
        fresh: whether this run wrote it.
        metrics: number of images, α, and how well the calibrator knows the images it learned from.
    """

    folder: str
    categories: list[str]
    fresh: bool
    metrics: dict[str, float]


def calibrate(options: CalibrateOptions) -> list[CalibrateResult]:
    """Calibrate a model, or every model of a folder of them.

    Raises:
        DataError: no normal training image, another calibrator is there already, or constant maps.
        ModelError: no usable model.
    """
    shards, model_set = ShardSet.open(options.shards), ModelSet.open(options.model)
    model_set.descriptions()  # a missing or damaged model shows now
    output = model_set.uri if options.output is None else files.full_uri(options.output)
    tasks = []
    for folder in model_set.folders:
        own = output if not model_set.by_category else files.join(output, folder.rsplit("/", 1)[-1])
        tasks.append((EmbeddingCache.of(folder, shards, options), own))
    anew = model_set.by_category and not files.same_place(output, model_set.uri)
    with ExitStack() as stack:
        if anew:
            stack.enter_context(_opened_for_all(tasks, output, options))
        elif not model_set.by_category:
            stack.enter_context(_opened(*tasks[0], options))
        run = stack.enter_context(track(options.tracking, "calibrate", output, to_plain(options)))
        results = []
        for kept, own in tasks:
            result = _calibrate_planned(kept, own, options)
            prefix = f"{scope(result.categories[0])}/" if model_set.by_category else ""
            run.metrics({prefix + name: value for name, value in result.metrics.items()})
            results.append(result)
        if anew:
            write_index(
                output, {category: folder.rsplit("/", 1)[-1] for category, folder in model_set.by_category.items()}
            )
    return results


def calibrate_model(folder: str, output: str, shards: ShardSet, options: CalibrateOptions) -> CalibrateResult:
    """Calibrate one model; see `calibrate`.

    Args:
        folder: its model folder.
        output: the same, or another one.
        shards, options: images, and how.
    """
    return _calibrate_planned(EmbeddingCache.of(folder, shards, options), output, options)


def _opened_for_all(
    tasks: list[tuple[EmbeddingCache, str]], output: str, options: CalibrateOptions
) -> AbstractContextManager[str]:
    """Claim the folder that the calibrated models of single categories are written to; none is refused later."""
    plan = {"models": [files.digest_of(_plan(kept, options)) for kept, _ in tasks]}
    inputs = {"model": options.model, "shards": options.shards}
    for kept, own in tasks:
        outputs.check_output(own, "calibrated model", _plan(kept, options), overwrite=options.overwrite)
    return outputs.open_output(output, "calibrated models", plan, inputs=inputs, overwrite=options.overwrite)


def _plan(kept: EmbeddingCache, options: CalibrateOptions) -> dict[str, Any]:
    """Return what a calibrated model depends on."""
    return {"model": kept.model, **_found_plan(kept, options)}


def _found_plan(kept: EmbeddingCache, options: CalibrateOptions) -> dict[str, Any]:
    """Return what a calibrator depends on."""
    return {"found_by": files.digest_of(kept.plan), "calibration": to_plain(options.calibration)}


def _opened(kept: EmbeddingCache, output: str, options: CalibrateOptions) -> AbstractContextManager[Any]:
    """Claim the folder that the calibrator is written to, the model's own or another one."""
    if files.same_place(kept.model, output):
        return exclusive(files.join(output, outputs.LOCK), output)
    inputs = {"model": kept.model, "shards": options.shards}
    return outputs.open_output(
        output, "calibrated model", _plan(kept, options), inputs=inputs, overwrite=options.overwrite
    )


def _calibrate_planned(kept: EmbeddingCache, output: str, options: CalibrateOptions) -> CalibrateResult:
    """Calibrate one model, or find it calibrated."""
    plan = _found_plan(kept, options)
    with _opened(kept, output, options):
        before = _already(output, plan, options)
        if before is not None:
            return CalibrateResult(output, kept.categories, False, before)
        return _calibrate(output, kept, plan, options)


def _calibrate(output: str, kept: EmbeddingCache, plan: dict[str, Any], options: CalibrateOptions) -> CalibrateResult:
    """Fit a calibrator and write it; the output is claimed."""
    connect(options.runtime)
    kept.fill(options)
    checkpoint = files.join(kept.cache.uri, f"head-{files.digest_of(plan)[:12]}.pt")
    calibrator, metrics = _fit(kept, checkpoint, options)
    made = {
        "plan": plan,
        "shards": {"digest": kept.shards.digest},
        "images": options.images,
        "metrics": metrics,
        "versions": versions(),
    }
    if not files.same_place(kept.model, output):
        load_model(kept.model, "cpu").save(output)
    Model.add_calibrator(output, calibrator, made)
    files.remove(checkpoint)
    return CalibrateResult(output, kept.categories, True, metrics)


def _already(output: str, plan: dict[str, Any], options: CalibrateOptions) -> dict[str, float] | None:
    """Return the metrics of this very calibration if it lies in the output already, else None.

    Raises:
        DataError: another one lies there, and `overwrite` is not set.
    """
    if not is_model(output):
        return None
    description = files.read_json(files.join(output, "model.json"))
    made = description["provenance"].get("calibration")
    if made is None or description.get("calibrator") is None:
        return None
    if made["plan"] == plan:
        metrics: dict[str, float] = made["metrics"]
        return metrics
    if not options.overwrite:
        raise DataError(
            f"{output} has another calibrator ({made['plan']['calibration']['variant']}); give another --output, or "
            f"replace it with --overwrite true"
        )
    return None


def _choose(
    description: dict[str, Any], shards: ShardSet, categories: list[str], options: CalibrateOptions
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the normal images to learn from, and of those that the model's training held out.

    Raises:
        DataError: held-out ones are asked for and there are none, or which they are cannot be told.
    """
    columns = ["sample_id", "category", "split"]
    rows = shards.table(Selection(("train", "val"), tuple(categories), (NORMAL,)), columns).to_pylist()
    if options.images == "all":
        return frozenset(row["sample_id"] for row in rows), frozenset()
    provenance, name = description["provenance"], f"the model for {some(categories)}"
    held_out: frozenset[str] = frozenset()
    if provenance["shards"]["digest"] == shards.digest:  # of other shards it has seen nothing, and held nothing out
        held_out = held_out_normals(provenance, rows, name, options.held_out_fraction)
    if options.images == "held_out":
        if not held_out:
            raise DataError(
                f"{name} held no normal image out; give --images train, or train it with "
                f"--threshold.validation_fraction above 0"
            )
        return held_out, held_out
    chosen = frozenset(row["sample_id"] for row in rows if row["split"] == "train") - held_out
    if not chosen:
        raise DataError(f"{shards.uri} has no normal training image for {name}; give --images all")
    return chosen, held_out


# ------------------------------------------------------------------------------------------- what the network finds
@dataclass(frozen=True)
class NormalEmbeddings:
    """What a method makes of normal images, as calibrators learn from it. An `Extractor`.

    Attributes:
        model: folder of the model.
        categories: whose places are the classes.
        half: keep embeddings as float16 instead of float32.
    """

    model: str
    categories: tuple[str, ...]
    half: bool

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = load(self.model)
        kind = "half precision; give --precision full" if self.half else "float32; check the model's weights"

        def compute(batch: ImageBatch) -> Arrays:
            prediction = method.predict(batch.tensor(method))
            features = (prediction.embedding.half() if self.half else prediction.embedding.float()).cpu().numpy()
            values = finite(features, f"embeddings of {batch.part} are not finite in {kind}").astype(np.float64)
            sums = np.stack([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
            return {
                FEATURES: features,
                STATISTICS: np.stack(MapStatistics.of(prediction.raw_map), axis=1).astype(np.float64),
                CATEGORY: np.array([self.categories.index(name) for name in batch.column("category")], np.int32),
                MOMENTS: sums[None],
            }

        return BatchFunction(method.input, compute)


@dataclass(frozen=True)
class EmbeddingCache:
    """The normal images that calibrators of a model learn from, and the cache of what the model makes of them.

    Attributes:
        cache: the cache.
        plan: everything its content depends on, as calibrated models record it.
        model: folder of the model.
        shards, categories: the corpus.
        chosen: sample_ids.
        held_out: sample_ids of the normal images that the model's training held out.
    """

    cache: FeatureCache
    plan: dict[str, Any]
    model: str
    shards: ShardSet
    categories: list[str]
    chosen: frozenset[str]
    held_out: frozenset[str]

    @staticmethod
    def of(model: str, shards: ShardSet, options: CalibrateOptions) -> EmbeddingCache:
        """Return which images, and where.

        Raises:
            DataError: no normal training image, or which were held out cannot be told.
        """
        description = files.read_json(files.join(model, "model.json"))
        categories: list[str] = description["categories"]
        selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
        shards.check(selection)
        chosen, held_out = _choose(description, shards, categories, options)
        network = network_key(description)
        plan = {
            "tool": __version__,
            **network,
            "shards": shards.digest,
            "images": files.digest_of({"ids": sorted(chosen)}),
            "batch_size": options.batch_size,
            "half": options.precision == "half",
            "limits": to_plain(options.limits),
            "device": options.runtime.device,
            "threads": options.runtime.cpus_per_worker,
        }
        cache = FeatureCache.below(
            options.folder or files.beside(model, "prepared"),
            "calibration images",
            {"": SampleSource(shards, selection, options.limits, chosen, columns=("category",))},
            {**network, "categories": categories, "half": options.precision == "half"},
            options.runtime,
            options.batch_size,
        )
        return EmbeddingCache(cache, plan, model, shards, categories, chosen, held_out)

    def fill(self, options: CalibrateOptions) -> None:
        """Compute embeddings and statistics of all these images, or find them computed."""
        extractor = NormalEmbeddings(self.model, tuple(self.categories), options.precision == "half")
        self.cache.fill({"": extractor}, options.batch_size, options.runtime, "inspect normals")


def network_key(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the outputs of a model depend on, from its `model.json`."""
    return {key: description[key] for key in ("method", "config", "weights_sha256", "bank_sha256")}


def summed_moments(features: CachedFeatures) -> np.ndarray:
    """Return the sums of the embeddings' channels and of their squares over all images, 2×C float64."""
    # batch by batch and then part by part, as the order of a sum decides its last bits
    return np.sum([reduce(np.add, rows) for rows in features.arrays(MOMENTS)], axis=0)


# ------------------------------------------------------------------------------------------------------- the head
def _fit(kept: EmbeddingCache, checkpoint: str, options: CalibrateOptions) -> tuple[Calibrator, dict[str, float]]:
    """Fit the calibrator: take statistics from the kept arrays, and train the head in one actor."""
    config, runtime = options.calibration, options.runtime
    trainer: Any = ray.remote(
        num_cpus=runtime.cpus_per_worker, num_gpus=runtime.gpus_per_worker, max_restarts=3, max_task_retries=3
    )(HeadActor).remote(kept, config, checkpoint, runtime.device, runtime.cpus_per_worker)
    try:
        steps = config.iterations if config.has_head else 0
        if steps:
            progress = Progress("calibrate", steps, "steps")
            for end in [*range(options.checkpoint_every, steps, options.checkpoint_every), steps]:
                done, loss = ray.get(trainer.run.remote(end))
                progress.set(done, f"loss {loss:.4g}")
            progress.close()
        state, metrics = ray.get(trainer.result.remote())
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from error
    channels, height, width = kept.cache.open().row_shape(FEATURES)
    calibrator = Calibrator(config, kept.categories, channels, (height, width))
    calibrator.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return calibrator.eval(), metrics


class HeadActor:
    """Trains a calibrator's head on kept arrays, checkpoint by checkpoint. A Ray actor; may be made anew any time.

    Args:
        kept: the arrays.
        config: of the calibrator.
        checkpoint: file of the last checkpoint; None to keep none.
        device, threads: to train on.
    """

    def __init__(
        self, kept: EmbeddingCache, config: CalibrationConfig, checkpoint: str | None, device: str, threads: int
    ) -> None:
        set_threads(threads)
        self._kept, self._config, self._checkpoint, self._device = kept, config, checkpoint, device
        self._loss = 0.0
        # made by the first call, since what fails in an actor's constructor is told as the actor's death
        self._calibrator: Calibrator | None = None
        self._trainer: HeadTrainer | None = None

    def calibrator(self) -> Calibrator:
        """Return the calibrator with its statistics, at the last checkpoint."""
        if self._calibrator is not None:
            return self._calibrator
        config, features = self._config, self._kept.cache.open()
        statistics = MapStatistics(*np.concatenate(features.arrays(STATISTICS)).T)
        self._category = np.concatenate(features.arrays(CATEGORY))
        self._rows = JoinedRows(features.arrays(FEATURES))
        channels, height, width = features.row_shape(FEATURES)
        moments = summed_moments(features) / (len(self._category) * height * width)
        calibrator = Calibrator(config, self._kept.categories, channels, (height, width))
        calibrator.set_statistics(statistics, self._category, *moments)
        self._calibrator = calibrator.to(self._device).eval()
        self._targets = statistics.targets(config.statistics)
        if config.has_head:
            self._trainer = HeadTrainer(self._calibrator, self._rows, self._targets, self._category)
            if self._checkpoint is not None and files.exists(self._checkpoint):
                content = io.BytesIO(files.read_bytes(self._checkpoint))
                self._trainer.restore(torch.load(content, map_location=self._device, weights_only=True))
        return self._calibrator

    def run(self, end: int) -> tuple[int, float]:
        """Train up to a step and keep a checkpoint; the step reached, and the mean loss of the last steps.

        Raises:
            OptionError: the calibrator has no head.
        """
        self.calibrator()
        if self._trainer is None:
            raise OptionError(f"calibration.variant={self._config.variant} has no head to train; take cada")
        if self._trainer.step < end:
            losses: list[float] = []
            self._trainer.run(end, lambda _, loss: losses.append(loss))
            self._loss = float(np.mean(losses[-100:]))
            if self._checkpoint is not None:
                buffer = io.BytesIO()
                torch.save(self._trainer.state(), buffer)
                files.write_bytes(self._checkpoint, buffer.getvalue())
        return self._trainer.step, self._loss

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the calibrator's state, and its metrics on the images it learned from."""
        calibrator = self.calibrator()
        metrics = {"images": float(len(self._category)), "alpha": float(calibrator.alpha)}
        metrics |= head_metrics(calibrator, self._rows, self._targets, self._category)
        return {name: value.cpu().numpy() for name, value in calibrator.state_dict().items()}, metrics


@torch.inference_mode()
def head_metrics(
    calibrator: Calibrator, rows: JoinedRows, targets: np.ndarray, category: np.ndarray, size: int = 64
) -> dict[str, float]:
    """Measure how well a trained head fits its own training images.

    Returns:
        For "cada" the shares of the variance of u and γ that are explained; for "classifier" its accuracy.
    """
    if not calibrator.config.has_head:
        return {}
    device = calibrator.class_statistics.device
    starts = range(0, len(category), size)
    outputs = [
        calibrator.outputs(
            torch.from_numpy(rows.take(np.arange(start, min(start + size, len(category))))).to(device).float()
        )
        for start in starts
    ]
    made = torch.cat(outputs).cpu()
    if calibrator.config.variant == "classifier":
        return {"classifier_accuracy": float((made.argmax(1).numpy() == category).mean())}
    predicted = calibrator.target_mean.cpu().numpy() + made.numpy() * calibrator.target_deviation.cpu().numpy()
    left = ((predicted - targets) ** 2).mean(0) / np.maximum(targets.var(0), np.finfo(np.float64).tiny)
    return {"explained_level": float(1 - left[0]), "explained_top": float(1 - left[1])}

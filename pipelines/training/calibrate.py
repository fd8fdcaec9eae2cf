"""A fitted model and normal training images → the model with a calibrator, whose scores all categories share (CADA).

    shards ─▶ actors: what the method finds in every normal image ─▶ kept embeddings and statistics ─▶ one actor: the
    head ─▶ calibrator in the model folder

What the network finds is kept under a key of its own, so that another variant or another head runs no network, and a
killed run continues; the head's training continues from its last checkpoint.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import ray
import torch

from pipelines.data.feature_cache import array_name, write_npy_header
from pipelines.data.reader import SampleReader
from pipelines.data.splits import held_out_normals, some
from pipelines.runtime import outputs
from pipelines.runtime.actors import connect, run_unfinished, set_threads
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
from unianom.data.image import ImageLimits
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.model import Model, is_model, versions
from unianom.options import to_plain

FEATURES, STATISTICS, CATEGORY = "embedding", "statistics", "category"
"""Names of the arrays kept of a part: N×C×h×w; N×3 float64, mean, mean square and maximum of each map; N int32,
their classes."""

MOMENTS = "moments"
"""Name of the array of a part with the sums of the embedding's channels and of their squares, 2×C float64."""


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
    """What a calibrated model depends on."""
    return {"model": kept.model, **_found_plan(kept, options)}


def _found_plan(kept: EmbeddingCache, options: CalibrateOptions) -> dict[str, Any]:
    """What a calibrator depends on."""
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
    checkpoint = files.join(kept.uri, f"head-{files.digest_of(plan)[:12]}.pt")
    calibrator, metrics = _fit(kept, checkpoint, options)
    made = {
        "plan": plan,
        "shards": {"uri": kept.shards.uri, "digest": kept.shards.digest},
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
    """Metrics of this very calibration, if it lies in the output already.

    Raises:
        DataError: another one does, and `overwrite` is not set.
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
    """Names of the normal images to learn from, and of those that the model's training held out.

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
class EmbeddingCache:
    """Where what a model finds in normal images is kept for all calibrators, and of which images it is.

    Attributes:
        uri: the folder.
        plan: everything its content depends on.
        model: folder of the model.
        shards, categories: the corpus.
        chosen: sample_ids.
        held_out: sample_ids of the normal images that the model's training held out.
    """

    uri: str
    plan: dict[str, Any]
    model: str
    shards: ShardSet
    categories: list[str]
    chosen: frozenset[str]
    held_out: frozenset[str]

    @staticmethod
    def of(model: str, shards: ShardSet, options: CalibrateOptions) -> EmbeddingCache:
        """Which images, and where.

        Raises:
            DataError: no normal training image, or which were held out cannot be told.
        """
        description = files.read_json(files.join(model, "model.json"))
        categories: list[str] = description["categories"]
        shards.check(Selection(("train", "val"), tuple(categories), (NORMAL,)))
        chosen, held_out = _choose(description, shards, categories, options)
        plan = {
            "tool": __version__,
            **{key: description[key] for key in ("method", "config", "weights_sha256", "bank_sha256")},
            "shards": shards.digest,
            "images": files.digest_of({"ids": sorted(chosen)}),
            "batch_size": options.batch_size,
            "half": options.precision == "half",
            "limits": to_plain(options.limits),
            "device": options.runtime.device,
            "threads": options.runtime.cpus_per_worker,
        }
        uri = files.join(options.folder or files.beside(model, "prepared"), files.digest_of(plan)[:20])
        return EmbeddingCache(uri, plan, model, shards, categories, chosen, held_out)

    def fill(self, options: CalibrateOptions) -> None:
        """Compute embeddings and statistics of all these images, or find them computed."""
        with outputs.open_cache(self.uri, "calibration images", self.plan) as complete:
            if complete:
                return
            arguments = {
                "model": self.model,
                "shards": self.shards,
                "selection": Selection(("train", "val"), tuple(self.categories), (NORMAL,)),
                "chosen": self.chosen,
                "categories": self.categories,
                "output": self.uri,
                "batch_size": options.batch_size,
                "limits": options.limits,
                "half": options.precision == "half",
                "device": options.runtime.device,
                "threads": options.runtime.cpus_per_worker,
            }
            progress = Progress("inspect normals", len(self.chosen))
            tasks = {part: {"part": part} for part in self.shards.parts}
            records, _ = run_unfinished(PartInspector, arguments, tasks, self.uri, options.runtime, progress, "rows")
            shape = next(record["shape"] for record in records.values() if record["rows"])
            outputs.finish(self.uri, {"rows": {part: r["rows"] for part, r in records.items()}, "shape": shape})

    def made(self) -> dict[str, Any]:
        """Rows of each part, and the shape of an embedding; once filled."""
        made: dict[str, Any] = files.read_json(files.join(self.uri, "_manifest.json"))
        return made


class PartInspector:
    """Keeps what a method finds in one part's chosen images. A `PartTask`."""

    def __init__(
        self,
        model: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        categories: list[str],
        output: str,
        batch_size: int,
        limits: ImageLimits,
        half: bool,
        device: str,
        threads: int,
    ) -> None:
        self._method = load_model(model, device).method
        self._reader = SampleReader(shards, selection, chosen, batch_size, limits, threads)
        self._shards, self._selection, self._chosen = shards, selection, chosen
        self._categories, self._output, self._half = categories, output, half

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write the arrays of one part and their record."""
        part = task["part"]
        category = self._category(part)
        statistics: list[np.ndarray] = []
        moments: np.ndarray | None = None
        shape: list[int] | None = None
        with ExitStack() as stack:
            handle: IO[bytes] | None = None
            for images in self._reader.batches(part, self._method):
                found = self._method.inspect(images)
                features = self._checked(found.features, part)
                if handle is None:
                    shape = list(features.shape[1:])
                    handle = stack.enter_context(files.open_atomic(self._path(part, FEATURES)))
                    write_npy_header(handle, features.dtype, (len(category), *shape))
                handle.write(features.tobytes())
                statistics.append(np.stack(MapStatistics.of(found.unsmoothed), axis=1))
                values = features.astype(np.float64)
                sums = np.stack([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
                moments = sums if moments is None else moments + sums
        self._save(part, CATEGORY, np.array(category, np.int32))
        self._save(part, STATISTICS, np.concatenate([np.empty((0, 3)), *statistics]))
        if moments is not None:
            self._save(part, MOMENTS, moments)
        record = {"part": part, "rows": len(category), "shape": shape}
        outputs.commit_part(self._output, part, record)
        return record

    def _category(self, part: str) -> list[int]:
        """The class of every chosen image of a part."""
        found = []
        for batch in self._shards.read(part, self._selection, ["sample_id", "category"]):
            found += [
                self._categories.index(r["category"]) for r in batch.to_pylist() if r["sample_id"] in self._chosen
            ]
        return found

    def _checked(self, features: torch.Tensor, part: str) -> np.ndarray:
        kept = (features.half() if self._half else features.float()).cpu().numpy()
        if not np.isfinite(kept).all():
            kind = "half precision; give --precision full" if self._half else "float32; check the model's weights"
            raise DataError(f"embeddings of {part} are not finite in {kind}")
        return kept

    def _path(self, part: str, name: str) -> str:
        return files.join(self._output, array_name(part, name))

    def _save(self, part: str, name: str, array: np.ndarray) -> None:
        files.write_array(self._path(part, name), array)


class KeptRows:
    """EmbeddingCache embeddings by the number of their image, through all parts.

    Args:
        arrays: of the parts, in order, n×C×h×w each.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *(len(array) for array in arrays)])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Those of some images, n×C×h×w."""
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack([self._arrays[part][i - self._starts[part]] for part, i in zip(parts, indices)])


# ------------------------------------------------------------------------------------------------------- the head
def _fit(kept: EmbeddingCache, checkpoint: str, options: CalibrateOptions) -> tuple[Calibrator, dict[str, float]]:
    """Statistics from the kept arrays, and the head trained by one actor."""
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
    channels, height, width = kept.made()["shape"]
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
        self._copies = tempfile.TemporaryDirectory(prefix="unianom-calibration-")
        self._loss = 0.0
        # made by the first call, since what fails in an actor's constructor is told as the actor's death
        self._calibrator: Calibrator | None = None
        self._trainer: HeadTrainer | None = None

    def calibrator(self) -> Calibrator:
        """The calibrator with its statistics, at the last checkpoint."""
        if self._calibrator is not None:
            return self._calibrator
        config, made = self._config, self._kept.made()
        filled = [part for part in self._kept.shards.parts if made["rows"][part]]
        copies = Path(self._copies.name)

        def load(name: str) -> list[np.ndarray]:
            return [files.map_array(files.join(self._kept.uri, array_name(part, name)), copies) for part in filled]

        statistics = MapStatistics(*np.concatenate(load(STATISTICS)).T)
        self._category = np.concatenate(load(CATEGORY))
        channels, height, width = made["shape"]
        moments = np.sum(load(MOMENTS), axis=0) / (len(self._category) * height * width)
        calibrator = Calibrator(config, self._kept.categories, channels, (height, width))
        calibrator.set_statistics(statistics, self._category, *moments)
        self._calibrator = calibrator.to(self._device).eval()
        self._targets = statistics.targets(config.statistics)
        self._rows = KeptRows(load(FEATURES))
        if config.has_head:
            self._trainer = HeadTrainer(self._calibrator, self._rows, self._targets, self._category)
            if self._checkpoint is not None and files.exists(self._checkpoint):
                content = io.BytesIO(files.read_bytes(self._checkpoint))
                self._trainer.restore(torch.load(content, map_location=self._device, weights_only=True))
        return self._calibrator

    def run(self, end: int) -> tuple[int, float]:
        """Train up to a step and keep a checkpoint; the step reached, and the mean loss of the last steps."""
        self.calibrator()
        assert self._trainer is not None
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
        """The calibrator's state, and what it makes of the images it learned from."""
        calibrator = self.calibrator()
        metrics = {"images": float(len(self._category)), "alpha": float(calibrator.alpha)}
        metrics |= head_metrics(calibrator, self._rows, self._targets, self._category)
        return {name: value.cpu().numpy() for name, value in calibrator.state_dict().items()}, metrics


@torch.inference_mode()
def head_metrics(
    calibrator: Calibrator, rows: KeptRows, targets: np.ndarray, category: np.ndarray, size: int = 64
) -> dict[str, float]:
    """How well a trained head knows its own training images.

    Returns:
        For "cada" the shares of the variance of u and γ that are explained; for "classifier" its accuracy.
    """
    if calibrator.head is None:
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

"""A fitted model and normal training images → the model with a calibrator, whose scores all categories share (CADA).

    shards ─▶ actors: what the method makes of every normal image ─▶ cached embeddings and statistics ─▶ one actor: the
    head ─▶ calibrator in the model folder

The cache has a key of its own, so that another variant or another head runs no network, and a killed run continues; the
head's training continues from its last checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pipelines.data.engine import choose_engine, say_precision
from pipelines.data.image_source import SampleSource
from pipelines.runtime import outputs
from pipelines.runtime.locks import exclusive
from pipelines.runtime.model_set import ModelSet, write_index
from pipelines.runtime.models import load_model
from pipelines.runtime.tracking import scope, track
from pipelines.training.calibration_head import train_calibrator
from pipelines.training.calibration_images import EmbeddingCache
from pipelines.training.options import CalibrateOptions
from unianom import files
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.execution import CPU
from unianom.model import Model, is_model, versions
from unianom.options import to_plain


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
    descriptions = model_set.descriptions()  # a missing or damaged model shows now
    categories = tuple({name for description in descriptions for name in description["categories"]})
    images = SampleSource(shards, Selection(("train", "val"), categories, (NORMAL,)), options.limits)
    runtime = choose_engine(
        options.runtime,
        images,
        images.count() // len(descriptions),
        lambda: load_model(model_set.folders[0], CPU).method,
    )
    say_precision(descriptions, runtime.execution)
    options = replace(options, runtime=runtime)
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
    kept.fill(options)
    checkpoint = files.join(kept.cache.uri, f"head-{files.digest_of(plan)[:12]}.pt")
    calibrator, metrics = train_calibrator(kept, checkpoint, options)
    made = {
        "plan": plan,
        "shards": {"digest": kept.shards.digest},
        "images": options.images,
        "metrics": metrics,
        "versions": versions(),
    }
    if not files.same_place(kept.model, output):
        load_model(kept.model, CPU).save(output)
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

"""Training any method by name: the options each takes, and the one call behind jobs/train.py."""

from __future__ import annotations

from dataclasses import replace

from pipelines.data.engine import choose_engine
from pipelines.data.image_source import SampleSource
from pipelines.data.ingest_manifest import check_rejected
from pipelines.data.ingest_summary import left_out_lines
from pipelines.data.listed_shards import ListedShards
from pipelines.data.normal_images import NormalImages
from pipelines.runtime.console import console
from pipelines.runtime.models import make_memory_method
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import scope, track
from pipelines.training.calibrate import calibrate_model
from pipelines.training.driver import plan_trainings, train_planned
from pipelines.training.job import make_method
from pipelines.training.memory_bank import fit_planned_banks, plan_banks
from pipelines.training.options import CalibrateOptions, CalibratorVariant, TrainingOptions, TrainJobOptions
from pipelines.training.per_category import FitResult, open_models, open_shards
from unianom import files
from unianom.configs import method_of
from unianom.configs.calibration import CalibrationConfig
from unianom.data.schema import NORMAL
from unianom.data.shards import REJECTED, Selection, ShardSet
from unianom.errors import OptionError
from unianom.model import is_model
from unianom.options import to_plain
from unianom.temporary_database import temporary_database

NAMED = 10
"""Images that cannot be read and are named one by one."""


def train(options: TrainJobOptions) -> list[FitResult]:
    """Fit the method that `options` (one of `train_options()`) belongs to; record and register the result.

    Raises:
        UnianomError: see `plan_banks`, `plan_trainings`, `open_models`, `NormalImages` and
            `pipelines.runtime.tracking.track`.
    """
    if not options.images:
        return _train(options, None)
    with temporary_database() as database:
        return _train(options, NormalImages(database, options.images, options.listing, options.limits))


def _train(options: TrainJobOptions, images: NormalImages | None) -> list[FitResult]:
    """Fit to images that are listed, or else to the shards."""
    name = method_of(options.method)
    output = files.full_uri(options.output)
    shards = open_shards(options) if images is None else images.planned()
    options = replace(options, runtime=_runtime(options, shards, images))
    if isinstance(options, TrainingOptions):
        tasks = plan_trainings(name, options.method, options)
    else:
        tasks = plan_banks(name, options.method, options, shards)
    params = {"method_name": name, **to_plain(options)}
    with open_models(tasks, options), track(options.tracking, "train", output, params) as run:
        if options.register_as is not None and run.uri is None:
            raise OptionError("register_as needs an MLflow server; give one with --tracking.mlflow_uri")
        if isinstance(options, TrainingOptions):
            results = train_planned(name, tasks, options, run)
        else:
            if images is not None and not all(is_model(task.output) for task in tasks):
                tasks = plan_banks(name, options.method, options, _checked(images, output, options))
            results = fit_planned_banks(name, tasks, options)
        if options.calibrate is not None:
            _calibrate(results, options, options.calibrate)
        for result in results:
            _record(run, result, options, single=not options.per_category)
    return results


def _checked(images: NormalImages, output: str, options: TrainJobOptions) -> ListedShards:
    """Return those of the listed images that can be read; tell of the others.

    Raises:
        DataError: they are none, or the others are more than may be left out.
    """
    shards = images.check(output, options.runtime)
    for line in left_out_lines(shards.manifest["summary"].get("left_out", {})):
        console.print(line)
    for row in shards.rejected().slice(0, NAMED).to_pylist():
        console.print(f"left out: {row['uri']}: {row['status']}, {row['error']}")
    if (count := sum(shards.manifest["rejected"].values())) > NAMED:
        console.print(f"left out: {count - NAMED} more images, see {shards.uri}/{REJECTED}")
    check_rejected(shards, options.max_reject_fraction)
    return shards


def _runtime(options: TrainJobOptions, shards: ShardSet, listed: NormalImages | None) -> RuntimeOptions:
    """Return the job's options of running, with the engine that computes frozen encoders."""
    name = method_of(options.method)
    categories = list(options.categories) or shards.categories
    selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
    images = SampleSource(shards, selection, options.limits) if listed is None else listed.examples()
    each = shards.count(selection) if options.few_shot is None else options.few_shot * len(categories)
    make = make_method if isinstance(options, TrainingOptions) else make_memory_method
    return choose_engine(
        options.runtime,
        images,
        each // (len(categories) if options.per_category else 1),
        lambda: make(name, options.method),
    )


def _calibrate(results: list[FitResult], options: TrainJobOptions, variant: CalibratorVariant) -> None:
    """Put a calibrator of one variant into every fitted model."""
    shards = open_shards(options)
    how = CalibrateOptions(
        model=options.output,
        shards=shards.uri,
        calibration=CalibrationConfig(variant=variant),
        batch_size=options.batch_size,
        folder=files.beside(options.output, "prepared"),
        overwrite=options.overwrite,
        limits=options.limits,
        runtime=options.runtime,
    )
    for result in results:
        calibrate_model(result.folder, result.folder, shards, how)


def _record(run: Run, result: FitResult, options: TrainJobOptions, single: bool) -> None:
    prefix = "" if single else f"{scope(result.categories[0])}/"
    values = dict(result.metrics)
    if result.threshold is not None:
        values |= {"threshold": result.threshold.value, "threshold_promised": float(result.threshold.promised)}
        if result.threshold.promised:
            values["threshold_target_fpr"] = result.threshold.target_fpr
    values |= {f"{scope(name)}/threshold": own.value for name, own in result.category_thresholds.items()}
    run.metrics({prefix + key: value for key, value in values.items()})
    run.artifact_bytes(f"{prefix}model.json", files.read_bytes(files.join(result.folder, "model.json")))
    if options.register_as is not None:
        name = options.register_as if single else f"{options.register_as}-{files.safe_name(result.categories[0])}"
        version = run.register_model(result.folder, name)
        print(f"registered in MLflow: {name} version {version}, alias candidate")

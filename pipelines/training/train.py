"""Training any method by name: the options each takes, and the one call behind jobs/train.py."""

from __future__ import annotations

from dataclasses import replace

from pipelines.data.engine import choose_engine
from pipelines.data.image_source import SampleSource
from pipelines.runtime.models import make_memory_method
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import scope, track
from pipelines.training.calibrate import calibrate_model
from pipelines.training.driver import plan_trainings, train_planned
from pipelines.training.job import make_method
from pipelines.training.memory_bank import fit_planned_banks, plan_banks
from pipelines.training.options import CalibrateOptions, CalibratorVariant, TrainingOptions, TrainJobOptions
from pipelines.training.per_category import FitResult, open_models
from unianom import files
from unianom.configs import method_of
from unianom.configs.calibration import CalibrationConfig
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import OptionError
from unianom.options import to_plain


def train(options: TrainJobOptions) -> list[FitResult]:
    """Fit the method that `options` (one of `train_options()`) belongs to; record and register the result.

    Raises:
        UnianomError: see `plan_banks`, `plan_trainings`, `open_models` and `pipelines.runtime.tracking.track`.
    """
    name = method_of(options.method)
    output = files.full_uri(options.output)
    options = replace(options, runtime=_runtime(options))
    if isinstance(options, TrainingOptions):
        tasks = plan_trainings(name, options.method, options)
    else:
        tasks = plan_banks(name, options.method, options)
    params = {"method_name": name, **to_plain(options)}
    with open_models(tasks, options), track(options.tracking, "train", output, params) as run:
        if options.register_as is not None and run.uri is None:
            raise OptionError("register_as needs an MLflow server; give one with --tracking.mlflow_uri")
        if isinstance(options, TrainingOptions):
            results = train_planned(name, tasks, options, run)
        else:
            results = fit_planned_banks(name, tasks, options)
        if options.calibrate is not None:
            _calibrate(results, options, options.calibrate)
        for result in results:
            _record(run, result, options, single=not options.per_category)
    return results


def _runtime(options: TrainJobOptions) -> RuntimeOptions:
    """Return the job's options of running, with the engine that computes frozen encoders."""
    name, shards = method_of(options.method), ShardSet.open(options.shards)
    categories = list(options.categories) or shards.categories
    selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
    images = SampleSource(shards, selection, options.limits)
    each = images.count() if options.few_shot is None else options.few_shot * len(categories)
    make = make_method if isinstance(options, TrainingOptions) else make_memory_method
    return choose_engine(
        options.runtime,
        images,
        each // (len(categories) if options.per_category else 1),
        lambda: make(name, options.method),
    )


def _calibrate(results: list[FitResult], options: TrainJobOptions, variant: CalibratorVariant) -> None:
    """Put a calibrator of one variant into every fitted model."""
    shards = ShardSet.open(options.shards)
    how = CalibrateOptions(
        model=options.output,
        shards=options.shards,
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

"""Training any method by name: the options each takes, and the one call behind jobs/train.py."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

from pipelines.runtime.cli import documented_arguments
from pipelines.runtime.tracking import Run, TrackingOptions, scope, track
from pipelines.training.calibrate import CalibrateOptions, calibrate_model
from pipelines.training.driver import plan_trainings, train_planned
from pipelines.training.memory_bank import fit_planned_banks, plan_banks
from pipelines.training.network_options import TrainingOptions
from pipelines.training.options import FitOptions, FitResult
from pipelines.training.per_category import open_models
from unianom import files
from unianom.configs.calibration import CalibrationConfig
from unianom.data.shards import ShardSet
from unianom.errors import OptionError
from unianom.methods import METHODS, MemoryMethod
from unianom.options import to_plain

JOB_ARGUMENTS = """    calibrate: also put a calibrator into the model, as jobs/calibrate.py does by default: "cada", or
        by "classifier" or "labels"; null for none.
    register_as: name under which MLflow registers the model, alias "candidate"; null for not at all.
    tracking: where MLflow records the run.
    method: the method's own options."""


Calibrated = Literal["cada", "classifier", "labels"]
"""Kinds of calibrators that jobs/train.py can add."""


def train_options() -> dict[str, type]:
    """The options class of every method: what fitting needs, and the method's own options as `method`."""
    classes: dict[str, type] = {}
    for name, method in METHODS.items():
        base = FitOptions if issubclass(method, MemoryMethod) else TrainingOptions
        fields: list[Any] = [
            ("calibrate", Calibrated | None, None),
            ("register_as", str | None, None),
            ("tracking", TrackingOptions, field(default_factory=TrackingOptions)),
            ("method", method.Config, field(default_factory=method.Config)),
        ]
        added = {"__post_init__": _check}
        cls = dataclasses.make_dataclass(f"Train_{name}", fields, bases=(base,), frozen=True, namespace=added)
        summary = f"Fit {name}: {(method.Config.__doc__ or '').splitlines()[0]}"
        cls.__doc__ = "\n".join([summary, "", "Args:", documented_arguments(FitOptions, base), JOB_ARGUMENTS])
        classes[name] = cls
    return classes


def _check(options: Any) -> None:
    super(type(options), options).__post_init__()
    if options.register_as is not None and not options.tracking.enabled:
        raise OptionError("register_as needs tracking; leave out --tracking.enabled false")
    name = options.register_as
    if name is not None and (set("/:") & set(name) or not name.strip(". ")):
        raise OptionError(f"register_as={name}: MLflow takes no '/' or ':' in a model's name, and more than dots")


def train(options: Any) -> list[FitResult]:
    """Fit the method that `options` (one of `train_options()`) belongs to; record and register the result.

    Raises:
        UnianomError: see `plan_banks`, `plan_trainings`, `open_models` and `pipelines.runtime.tracking.track`.
    """
    name = next(name for name, method in METHODS.items() if method.Config is type(options.method))
    output = files.full_uri(options.output)
    memory = issubclass(METHODS[name], MemoryMethod)
    tasks = (plan_banks if memory else plan_trainings)(name, options.method, options)
    params = {"method_name": name, **to_plain(options)}
    with open_models(tasks, options), track(options.tracking, "train", output, params) as run:
        if options.register_as is not None and run.id is None:
            raise OptionError("register_as needs an MLflow server; give one with --tracking.mlflow_uri")
        if memory:
            results = fit_planned_banks(name, tasks, options)
        else:
            results = train_planned(name, tasks, options, run)
        if options.calibrate is not None:
            _calibrate(results, options)
        for result in results:
            _record(run, result, options, single=not options.per_category)
    return results


def _calibrate(results: list[FitResult], options: Any) -> None:
    """Put a calibrator into every fitted model."""
    shards = ShardSet.open(options.shards)
    how = CalibrateOptions(
        model=options.output,
        shards=options.shards,
        calibration=CalibrationConfig(variant=options.calibrate),
        batch_size=options.batch_size,
        folder=files.beside(options.output, "prepared"),
        overwrite=options.overwrite,
        limits=options.limits,
        runtime=options.runtime,
    )
    for result in results:
        calibrate_model(result.folder, result.folder, shards, how)


def _record(run: Run, result: FitResult, options: Any, single: bool) -> None:
    prefix = "" if single else f"{scope(result.categories[0])}/"
    values = dict(result.metrics)
    if result.threshold is not None:
        values["threshold"] = result.threshold.value
    run.metrics({prefix + key: value for key, value in values.items()})
    run.artifact_bytes(f"{prefix}model.json", files.read_bytes(files.join(result.folder, "model.json")))
    if options.register_as is not None:
        name = options.register_as if single else f"{options.register_as}-{files.safe_name(result.categories[0])}"
        version = run.register_model(result.folder, name)
        print(f"registered in MLflow: {name} version {version}, alias candidate")

"""Trials of a trained method: a training by Ray Train."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, SupportsFloat

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.models import load_model
from pipelines.runtime.run_record import Run
from pipelines.training.driver import plan_job
from pipelines.training.job import Segment, make_method
from pipelines.training.options import WORK, TrainingOptions
from pipelines.training.ray_training import run_job
from pipelines.training.validation import PROGRESS
from pipelines.tuning.objective import OBJECTIVE, memory
from pipelines.tuning.objective_validation import ObjectiveValidation
from pipelines.tuning.raw_outputs import RAW_OUTPUTS, RAW_OUTPUTS_FOLDER, compute_raw_outputs, load_raw_outputs
from pipelines.tuning.records import REPORTS, read_reports
from pipelines.tuning.trial import Campaign, FittedTrial, TrialContext
from unianom import files
from unianom.errors import DataError
from unianom.execution import CPU, Execution
from unianom.model import is_model


class TrainedCampaign(Campaign[TrainingOptions]):
    """A campaign of a method that is trained."""

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        validation_set = self.train(values, folder, context, None)
        raw_outputs, milliseconds = load_raw_outputs(files.join(folder, RAW_OUTPUTS_FOLDER))
        method = load_model(trained_model(folder), CPU).method
        return FittedTrial(method, raw_outputs, validation_set, milliseconds, memory(method))

    def train(self, values: Mapping[str, Any], folder: str, context: TrialContext, segment: Segment | None) -> str:
        """Train a trial, or a segment of it, unless that was done; return the URI of the validation images."""
        config, options = self.config_of(values), self.fit_options(values)
        work, kept = files.join(folder, WORK), files.join(folder, RAW_OUTPUTS_FOLDER)
        with context.exclusive():
            validation_set = self.validation_set_of(make_method(self.name, config))
        ended = is_model(trained_model(folder)) and files.exists(files.join(kept, RAW_OUTPUTS))
        if ended or (segment is not None and files.exists(segment.state)):
            return validation_set
        with context.exclusive():
            job = plan_job(self.name, config, options, self.shards, self.categories, self.chosen, work)
        validator = ObjectiveValidation(validation_set, self.validation.pixel_stride, self.objective, kept)
        reports = Reports(folder, job.iterations)
        run_job(replace(job, validator=validator, segment=segment), options, work, reports, "", context.callbacks())
        files.remove(files.join(work, "checkpoints"))
        return validation_set

    def tests(self, values: Mapping[str, Any], folder: str) -> str:
        model = trained_model(self.trial_folder(values))
        if not is_model(model):
            raise DataError(
                f"the models of the trials in {self.folder} were not kept, so they cannot be diagnosed; run the "
                f"campaign with --diagnose true from its start, in another output"
            )
        return self.tests_for(load_model(model, CPU).method, folder)

    def find_in_tests(self, values: Mapping[str, Any], tests: str, execution: Execution) -> FittedTrial:
        method = load_model(trained_model(self.trial_folder(values)), execution).method
        batches = ValidationSet(tests).batches(self.options.batch_size, method.input, method.device)
        raw_outputs = {name: value.cpu() for name, value in compute_raw_outputs(method, batches).items()}
        return FittedTrial(method.to("cpu"), raw_outputs, tests, 0.0, memory(method))


class Reports(Run):
    """Keeps the validations that a training run records, in the trial's folder, so that they outlive its process.

    Args:
        folder: of the trial.
        iterations: of the run.
    """

    def __init__(self, folder: str, iterations: int) -> None:
        self._folder, self._iterations = folder, iterations
        self._lock = threading.Lock()

    def metrics(self, values: Mapping[str, SupportsFloat | None], step: int | None = None) -> None:
        found = {name.removeprefix("validation/"): value for name, value in values.items() if "validation/" in name}
        if OBJECTIVE not in found or step is None:
            return
        report = {PROGRESS: round(100 * step / self._iterations), **found}
        with self._lock:
            before = [old for old in read_reports(self._folder) if old[PROGRESS] < report[PROGRESS]]
            files.write_json(files.join(self._folder, REPORTS), [*before, report])


def trained_model(folder: str) -> str:
    """Return the model folder of a trained trial, where it is kept."""
    return files.join(folder, WORK, "trained")

"""What the trials of a campaign share, and one trial: fit it, then search its postprocess options.

A trial is what its values say and nothing else: it lies in a folder named by them, and whoever finds its record there
need not run it. So a campaign that died goes on by being started again: trials with a record report what they reported
before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import ray
import torch
from ray.train import UserCallback

from pipelines.data.options import ValidationOptions
from pipelines.data.splits import TrainValSplit
from pipelines.data.validation_set import ValidationSet, build_tests, build_validation_set
from pipelines.runtime.errors import reason, user_error
from pipelines.training.options import WORK, CalibrateOptions, FitOptions
from pipelines.training.ray_training import WorkersLostError
from pipelines.training.validation import PROGRESS
from pipelines.tuning.objective import (
    OBJECTIVE,
    Postprocessor,
    ScoredSetting,
    best_setting,
    postprocess_all,
    score_settings,
)
from pipelines.tuning.raw_outputs import RAW_OUTPUTS_FOLDER
from pipelines.tuning.records import (
    BEST,
    GIVEN,
    LATENCY,
    MAPS,
    MEMORY,
    RECORD,
    SCORES,
    begin_trial,
    read_record,
    read_reports,
    seconds_since,
    trial_id,
    write_early_end,
    write_settings,
)
from pipelines.tuning.statuses import CRASHED, DONE, FAILED
from unianom import files
from unianom.data.shards import ShardSet
from unianom.errors import MachineError, UnianomError, WeightsError
from unianom.execution import Execution
from unianom.methods import METHODS, Method
from unianom.options import from_plain, to_plain, with_values

FittingOptions = TypeVar("FittingOptions", bound=FitOptions | CalibrateOptions)


@dataclass(frozen=True)
class Campaign(Generic[FittingOptions]):
    """What all trials of a campaign share; its kinds say how a trial is fitted.

    Attributes:
        name, config: the method, and its options as plain data where a trial says nothing.
        options: of fitting it.
        shards, categories: the corpus.
        chosen: which images are learned from, and which held out.
        settings: values of the postprocess options that every trial is finished with; the first has those of `config`.
        validation, objective: what trials are compared on, and by.
        folder: of the campaign.
        keep_models: whether trained models stay, for a diagnosis.
    """

    name: str
    config: dict[str, Any]
    options: FittingOptions
    shards: ShardSet
    categories: list[str]
    chosen: TrainValSplit
    settings: list[dict[str, Any]]
    validation: ValidationOptions
    objective: dict[str, float]
    folder: str
    keep_models: bool

    @property
    def config_class(self) -> type:
        """Class of the options that are searched."""
        return METHODS[self.name].Config

    def config_of(self, values: Mapping[str, Any]) -> Any:
        """Return the options of a trial."""
        return with_values(from_plain(self.config_class, self.config), values)

    def fit_options(self, values: Mapping[str, Any]) -> FittingOptions:
        """Return the options of fitting a trial."""
        return self.options

    def final_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a trial at its end, for tables and figures."""
        return dict(values)

    def trial_folder(self, values: Mapping[str, Any]) -> str:
        """Return the folder of a trial."""
        return files.join(self.folder, "trials", trial_id(values))

    def validation_set_of(self, method: Method) -> str:
        """Build the validation images as input of a method, and return their URI."""
        return build_validation_set(
            self.shards,
            self.categories,
            self.chosen.held_out,
            method.input,
            self.validation,
            self.options.limits,
            files.join(self.folder, "validation"),
        )

    def tests_for(self, method: Method, folder: str) -> str:
        """Build the test split as input of a method, for a diagnosis, and return its URI."""
        images = files.join(folder, "images")
        return build_tests(self.shards, self.categories, method.input, self.options.limits, images)

    def run(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> dict[str, Any]:
        """Run a trial in its folder; write and return its record."""
        return finish_trial(self, values, folder, self.fit(values, folder, context))

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        """Fit a trial in its folder and compute its raw outputs on the validation images."""
        raise NotImplementedError

    def tests(self, values: Mapping[str, Any], folder: str) -> Any:
        """Prepare what `find_in_tests` takes, in the driver; for a diagnosis, in its folder.

        Raises:
            DataError: there is no labelled test split, or what is needed of the trial was not kept.
        """
        raise NotImplementedError

    def find_in_tests(self, values: Mapping[str, Any], tests: Any, execution: Execution) -> FittedTrial:
        """Compute the raw outputs of a trial on the test split."""
        raise NotImplementedError


class FittedTrial(NamedTuple):
    """A fitted trial, on the CPU, and its raw outputs on the images at a URI.

    Attributes:
        postprocessor: the method, or what makes maps and scores as one does.
        raw_outputs: N×… by name.
        validation_set: URI of the N images.
        latency_ms, memory_mb: of a prediction of one image, and of weights and bank.
    """

    postprocessor: Postprocessor
    raw_outputs: dict[str, torch.Tensor]
    validation_set: str
    latency_ms: float
    memory_mb: float


@dataclass(frozen=True)
class TrialContext:
    """What a trial has of Tune and Ray Train while it is fitted.

    Attributes:
        callbacks: makes what Ray Train calls with the reports of its workers.
        exclusive: entered while images are prepared that other trials need, too.
    """

    callbacks: Callable[[], Sequence[UserCallback]] = tuple
    exclusive: Callable[[], AbstractContextManager[None]] = nullcontext


def _is_of_the_machine(error: BaseException) -> bool:
    """Return whether Ray lost something, and not what ran on it failed."""
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def run_trial(
    campaign: Campaign,
    values: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
    context: TrialContext | None = None,
) -> dict[str, Any]:
    """Run a trial, or report again what came of it.

    Args:
        campaign: what it belongs to.
        values: of its options, by name.
        report: called with the objective at the end, and before it with what the trial reported when it ran before.
        context: what it has of Tune and Ray Train; None for nothing.

    Returns:
        Its record.

    Raises:
        UnianomError: it failed, now or before; its record says why.
    """
    folder = campaign.trial_folder(values)
    record = read_record(folder)
    if record is None:
        begin_trial(folder, values)
        for earlier in read_reports(folder):
            report(earlier)
        try:
            record = campaign.run(values, folder, context or TrialContext())
        except Exception as error:
            known = user_error(error)
            # a full disk, a lost connection and missing weights are no fault of the values, either
            ours = isinstance(known, MachineError | WorkersLostError | WeightsError) or isinstance(error, OSError)
            if ours or (known is None and _is_of_the_machine(error)):
                # also what a trial sees of being stopped, which the driver then records
                write_early_end(folder, values, CRASHED, str(known or reason(error)))
                raise
            why = str(known) if known is not None else reason(error)
            write_early_end(folder, values, FAILED, why)
            raise
    else:
        for earlier in record["reports"]:
            report(earlier)
        if record["status"] == FAILED or not (record["reports"] or record["status"] == DONE):
            raise UnianomError(record["error"] or "it was stopped before it told anything")
    if record["status"] == DONE:
        report({OBJECTIVE: record["objective"], PROGRESS: 100, LATENCY: record[LATENCY], MEMORY: record[MEMORY]})
    return record


def finish_trial(campaign: Campaign, values: Mapping[str, Any], folder: str, fitted: FittedTrial) -> dict[str, Any]:
    """Search the postprocess options of a fitted trial; write and return its record."""
    config = campaign.config_of(values)
    validation_set = ValidationSet(fitted.validation_set, campaign.validation.pixel_stride)
    scored = score_settings(
        fitted.postprocessor, fitted.raw_outputs, config, campaign.settings, validation_set, campaign.objective
    )
    best, measured = best_setting(scored)
    write_settings(folder, scored)
    kept = {BEST: best.values, **({GIVEN: scored[0].values} if config == campaign.config_of({}) else {})}
    for name, setting in kept.items():
        configs = [with_values(config, setting)]
        (scores,), maps = postprocess_all(fitted.postprocessor, fitted.raw_outputs, configs, validation_set)
        files.write_array(files.join(folder, f"{name}-{SCORES}"), scores)
        files.write_array(files.join(folder, f"{name}-{MAPS}"), maps)
    record = {
        "trial": trial_id(values),
        "status": DONE,
        "error": None,
        "values": to_plain(dict(values)),
        "reports": read_reports(folder),
        "objective": measured.objective,
        "seconds": seconds_since(folder),
        LATENCY: fitted.latency_ms,
        MEMORY: fitted.memory_mb,
        "best": _plain_setting(best),
        "default": _plain_setting(scored[0]),
        "proxy": fitted.validation_set,
    }
    files.write_json(files.join(folder, RECORD), record)
    if not campaign.keep_models:
        files.remove(files.join(folder, WORK))
    files.remove(files.join(folder, RAW_OUTPUTS_FOLDER))
    return record


def _plain_setting(setting: ScoredSetting) -> dict[str, Any] | None:
    if setting.measured is None:
        return None
    return {"values": to_plain(setting.values), **to_plain(setting.measured)}

"""What Ray Tune sees of a campaign: configs for values, a function to run, when to stop, and whom to tell."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from pipelines.data.options import METRICS
from pipelines.runtime.actors import set_threads
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import Run, track
from pipelines.training.validation import PROGRESS, WORKERS
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.space import Choice, Dimension, key_of
from pipelines.tuning.trial import (
    CRASHED,
    DONE,
    LATENCY,
    MEMORY,
    RECORD,
    STOPPED,
    Campaign,
    TrialContext,
    hold_lock,
    read_record,
    run_trial,
    write_end,
)
from unianom import files
from unianom.options import to_plain

SPENT = "spent.json"
"""Seconds that a campaign and its trials took so far."""

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # see Budget
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints boxes whatever the verbosity
    # relative paths in options mean what they mean to the user
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune would take the first Ctrl-C for a wish to stop in good order, which costs it minutes; nothing is lost anyway
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextmanager
def surroundings() -> Iterator[None]:
    """Environment and quiet that Ray Tune runs in."""
    with _environment(TUNE_ENVIRONMENT), _silent("ray.tune"):
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """No words of a logger: Tune tells of every failed trial with a long traceback, and the recorder in one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True)
class TrialValues:
    """How Tune's configs stand for values of options.

    Attributes:
        planned: values of trials by number; None where a search chooses them.
        dimensions: of the search.
    """

    planned: list[dict[str, Any]] | None
    dimensions: tuple[Dimension, ...]

    def space(self) -> dict[str, Any]:
        """Tune's parameter space."""
        return {} if self.planned is None else {"number": tune.grid_search(list(range(len(self.planned))))}

    def of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a trial."""
        if self.planned is not None:
            return self.planned[config["number"]]
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            told, domain = config[dimension.name], dimension.domain
            values[dimension.name] = domain.values[told] if isinstance(domain, Choice) else domain.rounded(told)
        return values

    def are(self, values: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether a config stands for these values."""
        return key_of(self.of(config)) == key_of(values)

    def distributions(self) -> dict[str, Any]:
        """Optuna's, by option. A choice is told by its place, for Optuna knows no lists."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        made: dict[str, Any] = {}
        for dimension in self.dimensions:
            domain = dimension.domain
            if isinstance(domain, Choice):
                made[dimension.name] = CategoricalDistribution(list(range(len(domain.values))))
            elif domain.integer:
                made[dimension.name] = IntDistribution(round(domain.low), round(domain.high), log=domain.log)
            else:
                made[dimension.name] = FloatDistribution(domain.low, domain.high, log=domain.log)
        return made

    def points(self, trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Configs of trials, each once; those outside the space are left out."""
        found: dict[str, dict[str, Any]] = {}
        for values in trials:
            point: dict[str, Any] = {}
            for dimension in self.dimensions:
                value, domain = values[dimension.name], dimension.domain
                if isinstance(domain, Choice):
                    places = [n for n, known in enumerate(domain.values) if to_plain(known) == to_plain(value)]
                    if places:
                        point[dimension.name] = places[0]
                elif isinstance(value, int | float) and domain.low <= value <= domain.high:
                    point[dimension.name] = value
            if len(point) == len(self.dimensions):
                found.setdefault(key_of(values), point)
        return list(found.values())


def tree_parzen(values: TrialValues, points: list[dict[str, Any]], seed: int, pareto: bool) -> Searcher:
    """Optuna's TPE, for accuracy or, if `pareto`, also for latency and memory.

    It begins with some points: the options as given, and after an interruption all trials that were ever begun, in
    their order, so that it learns again what it knew.
    """
    from optuna import logging as optuna_logging
    from ray.tune.search.optuna import OptunaSearch

    optuna_logging.set_verbosity(optuna_logging.WARNING)
    goals: dict[str, Any] = {"metric": OBJECTIVE, "mode": "max"}
    if pareto:
        goals = {"metric": [OBJECTIVE, LATENCY, MEMORY], "mode": ["max", "min", "min"]}
    return OptunaSearch(space=values.distributions(), points_to_evaluate=points or None, seed=seed, **goals)


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving that never stops the trial with the options as given, since all others are
    compared with it.

    Args:
        spared: tells that trial by its config.
        options: of the scheduler.
    """

    def __init__(self, spared: Callable[[dict[str, Any]], bool], **options: Any) -> None:
        super().__init__(**options)
        self._spared = spared

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if self._spared(trial.config) else decision


class PassOn(TuneReportCallback):
    """Tells Tune what workers of Ray Train report of the objective, and nothing of their checkpoints."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if OBJECTIVE in metrics[0]:
            super().after_report(run_context, metrics, None)


def tune_trial(campaign: Campaign, values: TrialValues, turn: Any, config: dict[str, Any]) -> None:
    """What Tune runs for every trial."""
    set_threads(campaign.options.runtime.cpus_per_worker)
    context = TrialContext(lambda: [PassOn()], partial(hold_lock, turn))
    run_trial(campaign, values.of(config), tune.report, context)


class Budget(Stopper):
    """Stops all trials once they took too long.

    Args:
        hours: of the campaign; None for no limit.
        gpu_hours: the sum over trials of their hours times `gpus`; None for no limit.
        gpus: of a trial.
        seconds, trial_seconds: spent before, by the campaign and by all its trials.
    """

    def __init__(
        self, hours: float | None, gpu_hours: float | None, gpus: float, seconds: float, trial_seconds: float
    ) -> None:
        self._hours, self._gpu_hours, self._gpus = hours, gpu_hours, gpus
        self._before, self._trials_before = seconds, trial_seconds
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._seconds[trial_id] = result.get("time_total_s", 0.0)  # a trial may end without having told anything
        return False

    def stop_all(self) -> bool:
        spent = self.spent()
        if self._hours is not None and spent["seconds"] >= 3600 * self._hours:
            return True
        return self._gpu_hours is not None and spent["trial_seconds"] * self._gpus >= 3600 * self._gpu_hours

    def spent(self) -> dict[str, float]:
        """Seconds of the campaign and of all its trials."""
        return {
            "seconds": self._before + time.monotonic() - self._start,
            "trial_seconds": self._trials_before + sum(self._seconds.values()),
        }


class Recorder(tune.Callback):
    """Writes down how trials end that cannot do so themselves, and tells MLflow and the terminal of all.

    Args:
        campaign, values: to know a trial by its config.
        tracking, store, run: where MLflow records the job, the folder of its store by default, and its run.
        budget: whose trials are not stopped for good.
        progress: shown.
        best: objective so far; None for none.
    """

    def __init__(
        self,
        campaign: Campaign,
        values: TrialValues,
        tracking: TrackingOptions,
        store: str,
        run: Run,
        budget: Budget,
        progress: Progress,
        best: float | None = None,
    ) -> None:
        self._campaign, self._values, self._budget, self._progress = campaign, values, budget, progress
        self._tracking, self._store, self._run = tracking, store, run
        self._open: dict[str, tuple[ExitStack, Run]] = {}
        self._told: dict[str, list[dict[str, Any]]] = {}
        self._workers: dict[str, str] = {}
        self._ended: dict[str, int] = {}
        self._best = -math.inf if best is None else best

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and never reads them again here

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """End the MLflow runs of trials that were cut short; the same command goes on with them."""
        for stack, _run in self._open.values():
            stack.close()

    def _track(self, values: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """The MLflow run of a trial."""
        return track(
            self._tracking,
            "trial",
            self._campaign.trial_folder(values),
            to_plain(dict(values)),
            default_folder=self._store,
            parent=self._run.id,
        )

    def tell_again(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell MLflow of trials that ended before, for their driver may have died in between."""
        for record in records if self._run.id is not None else ():
            with self._track(record["values"]) as own:
                _tell(own, record)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        stack = ExitStack()
        self._open[trial.trial_id] = (stack, stack.enter_context(self._track(self._values.of(trial.config))))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if PROGRESS not in result:
            return
        self._workers[trial.trial_id] = result.get(WORKERS, "")
        told = {name: value for name, value in result.items() if name in TOLD}
        self._told.setdefault(trial.trial_id, []).append({PROGRESS: result[PROGRESS], **told})
        self._open[trial.trial_id][1].metrics(told, result[PROGRESS])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = self._values.of(trial.config)
        folder = self._campaign.trial_folder(values)
        record = read_record(folder)
        if record is None and not self._budget.stop_all():
            record = write_end(folder, values, STOPPED, told=self._told.get(trial.trial_id, []))
        self._end(trial, record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = self._values.of(trial.config)
        folder = self._campaign.trial_folder(values)
        record = read_record(folder)
        if record is None:
            path = files.join(folder, RECORD)
            if files.exists(path):
                record = files.read_json(path)
            else:
                record = write_end(folder, values, CRASHED, "its process died (out of memory, or its machine was lost)")
        self._end(trial, record)

    def _end(self, trial: Any, record: dict[str, Any] | None) -> None:
        release(self._workers.pop(trial.trial_id, ""))
        stack, own = self._open.pop(trial.trial_id, (ExitStack(), Run()))
        if record is not None:
            _tell(own, record)
            if record["status"] == DONE:
                self._best = max(self._best, record["objective"])
            self._ended[record["status"]] = self._ended.get(record["status"], 0) + 1
        stack.close()
        files.write_json(files.join(self._campaign.folder, SPENT), self._budget.spent())
        words = ", ".join(f"{count} {status}" for status, count in self._ended.items())
        best = "" if self._best == -math.inf else f", best {self._best:.4f}"
        self._progress.set(sum(self._ended.values()), words + best)


def _tell(run: Run, record: Mapping[str, Any]) -> None:
    """How a trial ended, to its MLflow run."""
    run.tags({"unianom.status": record["status"], "unianom.error": record["error"] or ""})
    if record["status"] == DONE:
        run.metrics({f"best/{name}": value for name, value in record["best"]["metrics"].items()})
        run.json("record.json", record)


def release(workers: str) -> None:
    """Give back what the workers of a training hold whose trial has ended, if they hold it still.

    Ray Train gives it back where its controller ended in good order, but that of a stopped trial is killed. What should
    notice that asks the dashboard, which need not be there, and gives up where two Rays run on a machine.
    """
    if not workers:
        return
    group = PlacementGroup(ray.PlacementGroupID.from_hex(workers))
    if placement_group_table(group).get("state") not in (None, "REMOVED"):
        remove_placement_group(group)


TOLD = (OBJECTIVE, *METRICS, LATENCY, MEMORY)
"""What of a trial's reports goes to MLflow."""

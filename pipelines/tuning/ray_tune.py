"""What Ray Tune sees of a campaign: configs for values, a search, a scheduler, and a function to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipelines.runtime.task_worker import set_threads
from pipelines.tuning.dimensions import Choice, Dimension
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.preparation_lock import hold_lock
from pipelines.tuning.records import LATENCY, MEMORY
from pipelines.tuning.space import key_of
from pipelines.tuning.trial import Campaign, TrialContext, run_trial
from unianom.options import to_plain

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
    """Set the environment that Ray Tune runs in, and silence it."""
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
    """Silence a logger: Tune tells of every failed trial with a long traceback, and the recorder in one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True)
class TrialValues:
    """Maps Tune's configs to values of options.

    Attributes:
        planned: values of trials by number; None where a search chooses them.
        dimensions: of the search.
    """

    planned: list[dict[str, Any]] | None
    dimensions: tuple[Dimension, ...]

    def space(self) -> dict[str, Any]:
        """Return Tune's parameter space."""
        return {} if self.planned is None else {"number": tune.grid_search(list(range(len(self.planned))))}

    def of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a trial."""
        if self.planned is not None:
            return self.planned[config["number"]]
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            given, domain = config[dimension.name], dimension.domain
            values[dimension.name] = domain.values[given] if isinstance(domain, Choice) else domain.rounded(given)
        return values

    def are(self, values: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Return whether a config stands for these values."""
        return key_of(self.of(config)) == key_of(values)

    def distributions(self) -> dict[str, Any]:
        """Return Optuna's distributions by option. A choice is given by its place, for Optuna knows no lists."""
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
        """Return configs of trials, each once; those outside the space are left out."""
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
    """Return Optuna's TPE, for accuracy or, if `pareto`, also for latency and memory.

    It begins with some points: the options as given, and after an interruption, or where more trials are wanted than
    before, all that were ever begun, in their order, so that it learns again what it knew.
    """
    from optuna import logging as optuna_logging
    from ray.tune.search.optuna import OptunaSearch

    optuna_logging.set_verbosity(optuna_logging.WARNING)
    goals: dict[str, Any] = {"metric": OBJECTIVE, "mode": "max"}
    if pareto:
        goals = {"metric": [OBJECTIVE, LATENCY, MEMORY], "mode": ["max", "min", "min"]}
    # another seed for every state of a campaign: with the same one, a search that goes on would draw again what it
    # drew at its beginning, and find these trials done
    seed += max(0, len(points) - 1)
    return OptunaSearch(space=values.distributions(), points_to_evaluate=points or None, seed=seed, **goals)


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving that never stops the trial with the options as given, since all others are
    compared with it.

    Args:
        spared: returns whether a config is of that trial.
        options: of the scheduler.
    """

    def __init__(self, spared: Callable[[dict[str, Any]], bool], **options: Any) -> None:
        super().__init__(**options)
        self._spared = spared

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if self._spared(trial.config) else decision


class ObjectiveReportCallback(TuneReportCallback):
    """Passes to Tune what workers of Ray Train report of the objective, and nothing of their checkpoints."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if OBJECTIVE in metrics[0]:
            super().after_report(run_context, metrics, None)


def tune_trial(campaign: Campaign, values: TrialValues, lock: Any, config: dict[str, Any]) -> None:
    """Run a trial, as a function of Tune."""
    set_threads(campaign.options.runtime.cpus_per_worker)
    context = TrialContext(lambda: [ObjectiveReportCallback()], partial(hold_lock, lock))
    run_trial(campaign, values.of(config), tune.report, context)

"""Runs the trials of one campaign on Ray Tune, or those that are missing.

Everything a trial computes lies in a folder named by its values, so a campaign whose driver died goes on with the same
command: trials with a record report to Tune again what they once reported, in no time, and those that had not ended
continue. Tune's own pickled state is never read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from ray import tune as ray_tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.actors import beside_driver, connect, pool_size
from pipelines.runtime.progress import Progress
from pipelines.runtime.run_record import Run
from pipelines.runtime.signals import own_signals
from pipelines.training.job import make_method
from pipelines.training.options import WORK
from pipelines.training.validation import PROGRESS
from pipelines.tuning.budget import SPENT, Budget
from pipelines.tuning.campaign_run import CampaignRun
from pipelines.tuning.dimensions import Choice, Dimension
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.options import TuneOptions, output_of
from pipelines.tuning.preparation_lock import PreparationLock
from pipelines.tuning.ray_tune import Halving, TrialValues, surroundings, tree_parzen, tune_trial
from pipelines.tuning.recorder import Recorder
from pipelines.tuning.records import PLAN, RECORD, read_record, trial_id
from pipelines.tuning.space import draw, grid, grid_size, key_of, read_value
from pipelines.tuning.statuses import CARRIED, CRASHED, DONE
from pipelines.tuning.trained_trials import TrainedCampaign
from pipelines.tuning.trial import Campaign
from unianom import files
from unianom.errors import DataError, OptionError

AGAIN = 2
"""How often trials are run again that crashed."""

AnyCampaign = TypeVar("AnyCampaign", bound=Campaign[Any])


class Driver(Generic[AnyCampaign]):
    """Runs the trials of one campaign.

    Args:
        campaign: the campaign.
        trial_space: what differs between trials.
        options: of the job.
        run: the MLflow run of the job.
    """

    def __init__(self, campaign: AnyCampaign, trial_space: Sequence[Dimension], options: TuneOptions, run: Run) -> None:
        self.campaign, self.trial_space, self.options, self.tracking_run = campaign, trial_space, options, run

    @property
    def trains(self) -> bool:
        """Whether trials are trainings with workers of their own."""
        return isinstance(self.campaign, TrainedCampaign)

    def prepare(self) -> None:
        """Compute what all trials share, before the first; Ray is connected."""
        campaign = self.campaign
        ValidationSet(campaign.validation_set_of(make_method(campaign.name, campaign.config_of({})))).check(
            campaign.objective
        )

    def run(self) -> CampaignRun:
        """Run the trials that are missing; return every record."""
        planned = self._planned()
        before = self.records()
        have = {record["trial"] for record in before}
        if planned is None:
            wanted = int(min(self.count(), self._most()))
            missing = wanted - len(have)
        else:
            wanted = len(planned)
            missing = sum(trial_id(values) not in have for values in planned)
        budget = self.budget()
        fresh = missing > 0 and not budget.stop_all()
        if fresh:
            connect(self.options.runtime, dashboard=self.trains)
            self.prepare()
            for _ in range(1 + AGAIN):
                self.run_trials(planned, before, budget)
                before = self.records()
                if not self.crashed() or budget.stop_all():
                    break
            self.sweep()
        elif self.options.diagnose:
            connect(self.options.runtime)
            self.prepare()
        return self.collect(wanted, fresh)

    def collect(self, wanted: int, fresh: bool) -> CampaignRun:
        """Return all records.

        Raises:
            DataError: there is none of a trial that came to its end.
        """
        records = self.records(crashed=True)
        if not any(record["status"] == DONE for record in records):
            errors = "; ".join(dict.fromkeys(record["error"] for record in records if record["error"]))
            raise DataError(
                f"no trial came to its end ({errors or 'none was begun'}); mend the options, or raise the budget"
            )
        return CampaignRun(self.campaign, records, wanted, self.budget().spent()["seconds"], fresh)

    def count(self) -> int:
        """Return how many trials are wanted, where there are so many."""
        return self.options.trials or (8 if self.options.search == "pbt" else 24)

    def _most(self) -> float:
        """Return how many trials there can be."""
        finite = all(isinstance(dimension.domain, Choice) for dimension in self.trial_space)
        return grid_size(self.trial_space) if finite else math.inf

    def default(self) -> dict[str, Any]:
        """Return the values of the trial with the options as given."""
        config = self.campaign.config_of({})
        return {dimension.name: read_value(config, dimension.name) for dimension in self.trial_space}

    def _planned(self) -> list[dict[str, Any]] | None:
        """Return values of all trials, those given first; None if the search chooses them on its way."""
        default, options = self.default(), self.options
        if not self.trial_space:
            return [default]
        if options.search == "tpe":
            return None
        if options.search == "grid":
            rest = list(grid(self.trial_space))
        else:
            rest = draw(self.trial_space, self.count(), options.seed)
        planned = [default, *(values for values in rest if key_of(values) != key_of(default))]
        return planned if options.search == "grid" and options.trials is None else planned[: self.count()]

    def records(self, crashed: bool = False) -> list[dict[str, Any]]:
        """Return the records of all trials that have one, in the order they were begun."""
        found = []
        trials = files.join(self.campaign.folder, "trials")
        for trial in files.list_names(trials):
            folder = files.join(trials, trial)
            path = files.join(folder, RECORD)
            if not files.exists(path):
                continue
            record = files.read_json(path)
            if record["status"] != CARRIED and (crashed or record["status"] != CRASHED):
                found.append((files.read_json(files.join(folder, PLAN))["begun"], record))
        return [record for _, record in sorted(found, key=lambda pair: pair[0])]

    def _begun(self) -> list[dict[str, Any]]:
        """Return values of all trials that were ever begun, in that order."""
        trials = files.join(self.campaign.folder, "trials")
        plans = [files.join(trials, trial, PLAN) for trial in files.list_names(trials)]
        begun = [files.read_json(path) for path in plans if files.exists(path)]
        return [plan["values"] for plan in sorted(begun, key=lambda plan: plan["begun"])]

    def budget(self) -> Budget:
        """Return what is left of the budget of time."""
        options, path = self.options, files.join(self.campaign.folder, SPENT)
        before = files.read_json(path) if files.exists(path) else {"seconds": 0.0, "trial_seconds": 0.0}
        gpus = options.runtime.gpus_per_worker * (options.runtime.workers or 1 if self.trains else 1)
        return Budget(options.hours, options.gpu_hours, gpus, before["seconds"], before["trial_seconds"])

    def crashed(self) -> bool:
        """Return whether there are trials whose process died, or whose machine failed them."""
        return len(self.records(crashed=True)) > len(self.records())

    def run_trials(
        self, planned: list[dict[str, Any]] | None, before: Sequence[Mapping[str, Any]], budget: Budget
    ) -> None:
        """Run Ray Tune over trials; those that have a record only report it again, if a search or ASHA is to know.

        Args:
            planned: values of the trials; None where a search chooses them.
            before: records of trials that ended before.
            budget: after which no trial goes on.
        """
        options, runtime = self.options, self.options.runtime
        asha = self.trains and options.early_stopping.enabled and not options.pareto and options.search != "pbt"
        if planned is not None and not asha:
            planned = [values for values in planned if read_record(self.campaign.trial_folder(values)) is None]
        values = TrialValues(planned, tuple(self.trial_space))
        points = [] if planned is not None else values.points([self.default(), *self._begun()])
        count = len(planned) if planned is not None else max(self.count(), len(points))
        # a trial that trains needs nothing itself, its workers do; but Tune takes no empty request, so it gets one byte
        resources: dict[str, float] = {"memory": 1}
        if not self.trains:
            resources = {"cpu": runtime.cpus_per_worker, "gpu": self.trial_gpus()}
        progress = Progress("tune", count, "trials")
        best = max((record["objective"] for record in before if record["status"] == DONE), default=None)
        store = files.beside(output_of(options), "").rstrip("/")
        recorder = Recorder(self.campaign, values, options.tracking, store, self.tracking_run, budget, progress, best)
        search: SearchAlgorithm | Searcher | None = None
        if planned is None:
            search = tree_parzen(values, points, options.seed, options.pareto)
        scheduler: TrialScheduler | None = None
        if asha:
            stopping = options.early_stopping
            scheduler = Halving(
                partial(values.are, self.default()),
                time_attr=PROGRESS,
                max_t=101,  # a trial that reports 100 has ended by itself
                grace_period=round(100 * stopping.grace),
                reduction_factor=stopping.reduction,
            )
        goal: dict[str, Any] = {} if options.pareto else {"metric": OBJECTIVE, "mode": "max"}
        lock = beside_driver(PreparationLock)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(partial(tune_trial, self.campaign, values, lock), resources),
            param_space=values.space(),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=count if planned is None else 1,
                max_concurrent_trials=self._concurrency(count),
                # what still trains in a process whose trial was stopped ends with the process alone
                reuse_actors=not self.trains,
                **goal,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=files.join(self.campaign.folder, "_tune"),
                failure_config=ray_tune.FailureConfig(max_failures=0),
                stop=budget,
                callbacks=[recorder],
                verbose=0,
            ),
        )
        files.remove(files.join(self.campaign.folder, "_tune"))
        recorder.record_again(before)
        with surroundings(), recorder, own_signals():
            tuner.fit()
        progress.close()
        files.remove(files.join(self.campaign.folder, "_tune"))

    def trial_gpus(self) -> float:
        """Return the GPUs of a trial that does all by itself."""
        return 0.0

    def sweep(self) -> None:
        """Remove what trials leave that were stopped: checkpoints of a training that will not go on."""
        for record in self.records():
            if record["status"] != DONE:
                files.remove(files.join(self.campaign.folder, "trials", record["trial"], WORK))

    def _concurrency(self, trials: int) -> int:
        runtime = self.options.runtime
        gpus = runtime.gpus_per_worker if self.trains else self.trial_gpus()
        workers = runtime.workers or 1 if self.trains else 1
        least = workers * (self.options.concurrency or 1)
        fit = pool_size(dataclasses.replace(runtime, workers=None, gpus_per_worker=gpus), 1 << 30, least)
        if fit < workers:
            raise OptionError(
                f"a trial of {workers} workers of {runtime.cpus_per_worker} CPUs and {runtime.gpus_per_worker:g} GPUs "
                f"does not fit this Ray; lower --runtime.workers"
            )
        return max(1, min(self.options.concurrency or fit // workers, trials))

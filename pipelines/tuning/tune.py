"""A campaign: the options of a method searched with Ray Tune, without test data.

    shards ─▶ held-out normals + synthetic anomalies ─▶ trials on Ray Tune: fit, then thousands of reading options on
    kept raw outputs ─▶ best setting as a recipe ─▶ tables, figures, MLflow ─▶ (all chosen) a diagnosis on test images

Everything a trial finds lies in a folder named by its values, so a campaign whose driver died goes on with the same
command: trials with a record tell Tune again what they once told it, in no time, and those that had not ended continue.
Tune's own pickled state is never read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from pipelines.data.splits import TrainValSplit, choose_samples
from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.actors import connect, pool_size
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.signals import own_signals
from pipelines.runtime.tracking import Run, track
from pipelines.training.calibrate import EmbeddingCache
from pipelines.training.driver import check_masks
from pipelines.training.job import make_method
from pipelines.training.options import WORK, FitOptions
from pipelines.training.per_category import inputs_of, weights_digest
from pipelines.training.validation import PROGRESS
from pipelines.tuning.calibration_trials import (
    CadaCampaign,
    CalibratedPostprocessor,
    cache_outputs,
    recipe_options,
)
from pipelines.tuning.encodings import encode_once
from pipelines.tuning.memory_trials import MemoryCampaign, encoding_key, is_bank_option
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.options import fit_class, method_name, searched
from pipelines.tuning.population import STATE, PopulationCampaign, first_segments, next_segments
from pipelines.tuning.ray_tune import (
    SPENT,
    Budget,
    Halving,
    Recorder,
    TrialValues,
    surroundings,
    tree_parzen,
    tune_trial,
)
from pipelines.tuning.results import CampaignRun, TuneResult, per_category, write_results
from pipelines.tuning.space import (
    CADA,
    Choice,
    Dimension,
    Range,
    draw,
    grid,
    grid_size,
    key_of,
    read_value,
    settings_of,
    space_of,
    split_space,
)
from pipelines.tuning.trained_trials import TrainedCampaign
from pipelines.tuning.trial import (
    CARRIED,
    CRASHED,
    DONE,
    PLAN,
    RECORD,
    Campaign,
    PreparationLock,
    read_record,
    trial_id,
)
from unianom import __version__, files
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.methods import METHODS, MemoryMethod
from unianom.methods.trained import BatchSpec
from unianom.options import to_plain
from unianom.thresholds import smallest_supported_rate

NOT_IN_PLANS = ("shards", "output", "overwrite", "runtime", "max_failures", "checkpoint_every", "tracking", "folder")
"""Options of fitting that say where, how fast and how safely, not what."""

MOST_ENCODINGS = 64
"""Combinations of options that the network must run for, of a memory method."""


# ---------------------------------------------------------------------------------------------------------- the driver
def tune(options: Any) -> TuneResult:
    """Run a campaign, continue an interrupted one, or find it done.

    Args:
        options: one of `tune_options()`.

    Raises:
        DataError: no data to compare settings on, no campaign to resume, or every trial failed.
        ModelError: no model to calibrate.
        OptionError: a space that the method refuses, or a cluster that holds no trial.
    """
    name = method_name(options)
    shards = ShardSet.open(options.shards)
    groups = _groups(name, options, shards)  # a missing model shows first
    space = space_of(name, searched(options), options.space)
    needs = _prepare(name, options, shards)
    output = files.full_uri(options.output)
    if options.resume and not files.exists(files.join(output, outputs.PLAN)):
        raise DataError(f"{output} holds no campaign to resume; mend --output, or leave out --resume")
    plan, params = _plan(name, options, space, shards), {"method_name": name, **to_plain(options)}
    inputs = inputs_of(options.shards, searched(options)) if name != CADA else {"model": options.model}
    with (
        outputs.open_output(
            output, "campaign", plan, inputs={**inputs, "shards": options.shards}, overwrite=options.overwrite
        ) as digest,
        track(options.tracking, "tune", output, params, plan=digest) as run,
    ):
        campaigns = {}
        for group in groups:
            folder = files.join(output, "categories", files.safe_name(group[0])) if per_category(options) else output
            campaigns["+".join(group)] = make_driver(name, options, shards, group, folder, space, needs, run).run()
        return write_results(options, output, campaigns, run)


def _groups(name: str, options: Any, shards: ShardSet) -> list[list[str]]:
    """The categories of each campaign."""
    if name == CADA:
        model_set = ModelSet.open(options.model)
        if model_set.by_category:
            raise OptionError(
                f"{model_set.uri} holds a model for each category; give the folder of one of them as --model"
            )
        return [model_set.descriptions()[0]["categories"]]
    categories = list(options.categories) or shards.categories
    return [[category] for category in categories] if options.per_category else [categories]


def _prepare(name: str, options: Any, shards: ShardSet) -> BatchSpec:
    """Refuse what no trial could be made of; what the training of the method needs, if it is trained."""
    needs = BatchSpec()
    if name == CADA:
        return needs
    if not issubclass(METHODS[name], MemoryMethod):
        needs = make_method(name, options.method).batch_spec
        if needs.masks:
            check_masks(shards, list(options.categories) or shards.categories)
    elif getattr(options.method, "mask_scope", "image") == "batch":
        raise OptionError("with method.mask_scope=batch patches depend on what shares their batch; take image")
    shards.check(Selection(("train",), options.categories, (NORMAL,)))
    return needs


def _plan(name: str, options: Any, space: Sequence[Dimension], shards: ShardSet) -> dict[str, Any]:
    """What the trials depend on; not how many there are, so that a campaign can be made longer."""
    fitted = {f.name: to_plain(getattr(options, f.name)) for f in dataclasses.fields(fit_class(name))}
    config = searched(options)
    weights: str | None
    if name == CADA:
        weights = files.sha256_file(files.join(options.model, "model.json"))
    else:
        weights = weights_digest(config.backbone.weights)
    for option in NOT_IN_PLANS:
        fitted.pop(option, None)
    return {
        "tool": __version__,
        "method": name,
        "config": to_plain(config),
        "weights": weights,
        "shards": shards.digest,
        "space": to_plain(list(space)),
        "search": options.search,
        "settings": options.settings,
        "objective": options.objective,
        "validation": to_plain(options.validation),
        "early_stopping": to_plain(options.early_stopping),
        "population": to_plain(options.population) if options.search == "pbt" else None,
        "fit": fitted,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }


class Driver:
    """Runs the trials of one campaign.

    Args:
        campaign: the campaign.
        trial_space: what differs between trials.
        options: of the job.
        run: the MLflow run of the job.
    """

    def __init__(self, campaign: Campaign, trial_space: Sequence[Dimension], options: Any, run: Run) -> None:
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
        """Run what is missing; give every record."""
        planned = self._planned()
        before = self._records()
        have = {record["trial"] for record in before}
        if planned is None:
            wanted = int(min(self._count(), self._most()))
            missing = wanted - len(have)
        else:
            wanted = len(planned)
            missing = sum(trial_id(values) not in have for values in planned)
        budget = self._budget()
        fresh = missing > 0 and not budget.stop_all()
        if fresh:
            connect(self.options.runtime, dashboard=self.trains)
            self.prepare()
            self._tune(planned, before, budget)
            self._sweep()
        elif self.options.diagnose:
            connect(self.options.runtime)
            self.prepare()
        return self._ran(wanted, fresh)

    def _ran(self, wanted: int, fresh: bool) -> CampaignRun:
        """All records, once there is one of a trial that came to its end."""
        records = self._records(crashed=True)
        if not any(record["status"] == DONE for record in records):
            told = "; ".join(dict.fromkeys(record["error"] for record in records if record["error"]))
            raise DataError(
                f"no trial came to its end ({told or 'none was begun'}); mend the options, or raise the budget"
            )
        return CampaignRun(self.campaign, records, wanted, self._budget().spent()["seconds"], fresh)

    def _count(self) -> int:
        return self.options.trials or (8 if self.options.search == "pbt" else 24)

    def _most(self) -> float:
        """Trials that there can be."""
        finite = all(isinstance(dimension.domain, Choice) for dimension in self.trial_space)
        return grid_size(self.trial_space) if finite else math.inf

    def _default(self) -> dict[str, Any]:
        config = self.campaign.config_of({})
        return {dimension.name: read_value(config, dimension.name) for dimension in self.trial_space}

    def _planned(self) -> list[dict[str, Any]] | None:
        """Values of all trials, those given first; None if the search chooses them on its way."""
        default, options = self._default(), self.options
        if not self.trial_space:
            return [default]
        if options.search == "tpe":
            return None
        if options.search == "grid":
            rest = list(grid(self.trial_space))
        else:
            rest = draw(self.trial_space, self._count(), options.seed)
        planned = [default, *(values for values in rest if key_of(values) != key_of(default))]
        return planned if options.search == "grid" and options.trials is None else planned[: self._count()]

    def _records(self, crashed: bool = False) -> list[dict[str, Any]]:
        """Records of all trials that have one, in the order they were begun."""
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
        """Values of all trials that were ever begun, in that order."""
        trials = files.join(self.campaign.folder, "trials")
        plans = [files.join(trials, trial, PLAN) for trial in files.list_names(trials)]
        told = [files.read_json(path) for path in plans if files.exists(path)]
        return [plan["values"] for plan in sorted(told, key=lambda plan: plan["begun"])]

    def _budget(self) -> Budget:
        """What is left of the budget of time."""
        options, path = self.options, files.join(self.campaign.folder, SPENT)
        before = files.read_json(path) if files.exists(path) else {"seconds": 0.0, "trial_seconds": 0.0}
        gpus = options.runtime.gpus_per_worker * (options.runtime.workers or 1 if self.trains else 1)
        return Budget(options.hours, options.gpu_hours, gpus, before["seconds"], before["trial_seconds"])

    def _tune(self, planned: list[dict[str, Any]] | None, before: Sequence[Mapping[str, Any]], budget: Budget) -> None:
        """Ray Tune over all trials; those that have a record only tell it again, if a search or ASHA is to know."""
        options, runtime = self.options, self.options.runtime
        asha = self.trains and options.early_stopping.enabled and not options.pareto and options.search != "pbt"
        if planned is not None and not asha:
            planned = [values for values in planned if read_record(self.campaign.trial_folder(values)) is None]
        values = TrialValues(planned, tuple(self.trial_space))
        points = [] if planned is not None else values.points([self._default(), *self._begun()])
        count = len(planned) if planned is not None else max(self._count(), len(points))
        # a trial that trains needs nothing itself, its workers do; but Tune takes no empty request, so it gets one byte
        resources: dict[str, float] = {"memory": 1}
        if not self.trains:
            resources = {"cpu": runtime.cpus_per_worker, "gpu": self._trial_gpus()}
        progress = Progress("tune", count, "trials")
        best = max((record["objective"] for record in before if record["status"] == DONE), default=None)
        store = files.beside(options.output, "").rstrip("/")
        recorder = Recorder(self.campaign, values, options.tracking, store, self.tracking_run, budget, progress, best)
        search: SearchAlgorithm | Searcher | None = None
        if planned is None:
            search = tree_parzen(values, points, options.seed, options.pareto)
        scheduler: TrialScheduler | None = None
        if asha:
            stopping = options.early_stopping
            scheduler = Halving(
                partial(values.are, self._default()),
                time_attr=PROGRESS,
                max_t=101,  # a trial that reports 100 has ended by itself
                grace_period=round(100 * stopping.grace),
                reduction_factor=stopping.reduction,
            )
        goal: dict[str, Any] = {} if options.pareto else {"metric": OBJECTIVE, "mode": "max"}
        turn: Any = ray.remote(num_cpus=0)(PreparationLock).remote()
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(partial(tune_trial, self.campaign, values, turn), resources),
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
        recorder.tell_again(before)
        with surroundings(), recorder, own_signals():
            tuner.fit()
        progress.close()
        files.remove(files.join(self.campaign.folder, "_tune"))

    def _trial_gpus(self) -> float:
        """GPUs of a trial that does all by itself."""
        return 0.0

    def _sweep(self) -> None:
        """Remove what trials leave that were stopped: checkpoints of a training that will not go on."""
        for record in self._records():
            if record["status"] != DONE:
                files.remove(files.join(self.campaign.folder, "trials", record["trial"], WORK))

    def _concurrency(self, trials: int) -> int:
        runtime = self.options.runtime
        gpus = runtime.gpus_per_worker if self.trains else self._trial_gpus()
        fit = pool_size(dataclasses.replace(runtime, workers=None, gpus_per_worker=gpus), 1 << 30)
        workers = runtime.workers or 1 if self.trains else 1
        if fit < workers:
            raise OptionError(
                f"a trial of {workers} workers of {runtime.cpus_per_worker} CPUs and {runtime.gpus_per_worker:g} GPUs "
                f"does not fit this Ray; lower --runtime.workers"
            )
        return max(1, min(self.options.concurrency or fit // workers, trials))


class MemoryDriver(Driver):
    """Runs the network of a memory method for every combination of the options that it depends on, then the trials."""

    def prepare(self) -> None:
        campaign, method = self.campaign, METHODS[self.campaign.name]
        assert isinstance(campaign, MemoryCampaign)
        assert issubclass(method, MemoryMethod)
        own = [dimension for dimension in self.trial_space if not is_bank_option(method, dimension.name)]
        if any(isinstance(dimension.domain, Range) for dimension in own):
            raise OptionError(f"space: the network runs for every value of {own[0].name}; name single values")
        combinations = list(grid(own))
        default = {dimension.name: self._default()[dimension.name] for dimension in own}
        combinations += [default] if key_of(default) not in map(key_of, combinations) else []
        if len(combinations) > MOST_ENCODINGS:
            names = ", ".join(dimension.name for dimension in own)
            raise OptionError(
                f"space: {names} have {len(combinations)} combinations, for each of which the network would run; name "
                f"fewer values, {MOST_ENCODINGS} combinations at most"
            )
        masks = any(dimension.name == "mask" for dimension in self.trial_space)
        for values in combinations:
            config = campaign.config_of({**values, "mask": "binary"} if masks else values)
            validation_set = campaign.validation_set_of(method(config))
            ValidationSet(validation_set).check(campaign.objective)
            campaign.encodings[encoding_key(values, campaign.name)] = encode_once(
                campaign.name,
                config,
                campaign.options,
                campaign.shards,
                campaign.categories,
                campaign.chosen.learn,
                validation_set,
                files.join(campaign.folder, "encodings"),
            )


class PopulationDriver(Driver):
    """Trains a population segment by segment."""

    def run(self) -> CampaignRun:
        options, campaign = self.options, self.campaign
        default = self._default()
        drawn = draw(self.trial_space, self._count(), options.seed)
        others = [values for values in drawn if key_of(values) != key_of(default)]
        members = first_segments([default, *others][: self._count()], options.population.segments)
        fresh = False
        before: list[dict[str, Any]] = []
        for done in range(1, options.population.segments + 1):
            missing = [values for values in members if read_record(campaign.trial_folder(values)) is None]
            budget = self._budget()
            if missing and not budget.stop_all():
                connect(options.runtime, dashboard=True)
                self.prepare()
                self._tune(missing, before, budget)
                fresh = True
            records = [read_record(campaign.trial_folder(values)) for values in members]
            if not all(records):
                break  # out of budget, or crashed: the same command goes on
            for record in before:  # nobody goes on from them any more
                for name in (STATE, WORK):
                    files.remove(files.join(campaign.folder, "trials", record["trial"], name))
            before = [record for record in records if record is not None]
            if all(record["objective"] is None for record in before):
                break  # there is none to go on from
            if done < options.population.segments:
                objectives = [record["objective"] for record in before]
                changing = METHODS[campaign.name].schedulable_options  # type: ignore[attr-defined]
                members = next_segments(
                    members, objectives, done, self.trial_space, changing, options.population, options.seed
                )
        self._sweep()
        return self._ran(len(members), fresh)


class CadaDriver(Driver):
    """Runs the model once on the images that heads learn from and on those they are compared on, then the trials."""

    def prepare(self) -> None:
        campaign = self.campaign
        assert isinstance(campaign, CadaCampaign)
        assert campaign.kept is not None
        campaign.kept.fill(campaign.options)
        validation_set = campaign.validation_set_of(load_model(campaign.model, "cpu").method)
        ValidationSet(validation_set).check(campaign.objective)
        cached = cache_outputs(campaign, validation_set, files.join(campaign.folder, "seen"))
        self.campaign = dataclasses.replace(campaign, validation_set=validation_set, outputs=cached)

    def _trial_gpus(self) -> float:
        return self.options.runtime.gpus_per_worker


def _held_out(fit: FitOptions, count: int) -> FitOptions:
    """Options by which jobs/train.py holds out as few images as here, too: with the usual rate it would put them into
    the bank, as they support no threshold; with the lowest rate that they do support it does not."""
    rate = math.ceil(1000 * smallest_supported_rate(count, fit.threshold.confidence)) / 1000
    if rate >= 1:
        return fit  # not even a single false positive can be promised; the recipe's bank then has them
    return dataclasses.replace(fit, threshold=dataclasses.replace(fit.threshold, target_fpr=rate))


def make_driver(
    name: str,
    options: Any,
    shards: ShardSet,
    categories: list[str],
    folder: str,
    space: Sequence[Dimension],
    needs: BatchSpec,
    run: Run,
) -> Driver:
    """The driver of one campaign.

    Args:
        name, options, shards, space: as given.
        categories: of this campaign.
        folder: of this campaign.
        needs: of the method's training.
        run: the MLflow run of the job.

    Raises:
        DataError: there is no normal image to compare settings on.
    """
    reader: Any = CalibratedPostprocessor if name == CADA else METHODS[name]
    trial_space, reading_space = split_space(space, reader.postprocess_options)
    config = searched(options)
    own: dict[str, Any] = {}
    kind: type[Campaign]
    driver: type[Driver] = Driver
    fit: Any
    if name == CADA:
        kind, driver, fit = CadaCampaign, CadaDriver, recipe_options(options)
        kept = EmbeddingCache.of(files.full_uri(options.model), shards, fit)
        own = {"model": kept.model, "kept": kept}
        chosen, categories = TrainValSplit(kept.chosen, kept.held_out - kept.chosen), kept.categories
    else:
        memory = issubclass(METHODS[name], MemoryMethod)
        kind = MemoryCampaign if memory else TrainedCampaign
        driver = MemoryDriver if memory else Driver
        if options.search == "pbt":
            kind, driver = PopulationCampaign, PopulationDriver
            own = {"repeats": needs.repeats}
        base = fit_class(name)
        fit = base(**{f.name: getattr(options, f.name) for f in dataclasses.fields(base)})
        if options.pareto and not memory:  # a search for several goals takes no reports on the way
            fit = dataclasses.replace(fit, validate_every=0)
        chosen, notice = choose_samples(shards, categories, fit.split, validate=True, labels=needs.labels)
        if notice and memory and chosen.held_out:
            fit = _held_out(fit, len(chosen.held_out))
    if not chosen.held_out:
        raise DataError(
            f"no normal image of {', '.join(categories)} was held out, so there is none to compare settings on; raise "
            f"--threshold.validation_fraction" + (" of the model's training" if name == CADA else "")
        )
    default = {dimension.name: read_value(config, dimension.name) for dimension in reading_space}
    drawn = settings_of(reading_space, options.settings, options.seed)
    campaign = kind(
        name=name,
        config=to_plain(config),
        options=fit,
        shards=shards,
        categories=categories,
        chosen=chosen,
        settings=[default, *(values for values in drawn if key_of(values) != key_of(default))],
        validation=options.validation,
        objective=options.objective,
        folder=folder,
        keep_models=options.diagnose,
        **own,
    )
    return driver(campaign, trial_space, options, run)

"""What jobs/tune.py takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from pipelines.data.options import ValidationOptions, check_objective
from pipelines.runtime.options import TrackingOptions
from pipelines.training.options import CalibrateOptions, FitOptions, TrainingOptions
from pipelines.tuning.default_spaces import CADA, SPACES
from unianom.configs import all_configs, has_bank, method_of
from unianom.errors import OptionError
from unianom.options import AS_WRITTEN, AtLeastOne, OpenShare, Options, Positive, Share, hints_of
from unianom.written import plain_options


@dataclass(frozen=True)
class PopulationOptions(Options):
    """How a population is trained.

    Args:
        segments: parts of the training, after each of which the worst follow the best.
        share: of the population, that counts as the worst and as the best.
        resample: probability that an option is drawn anew and not changed a little.
        factor: numbers are multiplied or divided by it; a choice moves to one beside it.
    """

    segments: Annotated[int, Ge(2)] = 4
    share: Annotated[float, Interval(gt=0, le=0.5)] = 0.25
    resample: Share = 0.25
    factor: Annotated[float, Gt(1)] = 1.2


@dataclass(frozen=True)
class EarlyStopping(Options):
    """Asynchronous successive halving (ASHA) of trials that train.

    Args:
        enabled: whether trials are stopped early.
        grace: share of the training that every trial gets.
        reduction: at each rung, of which the next lies `reduction` times as far, one in `reduction` trials goes on.
    """

    enabled: bool = True
    grace: Annotated[float, Interval(ge=0.01, le=1)] = 0.2
    reduction: Annotated[float, Gt(1)] = 2.0


@dataclass(frozen=True)
class SearchOptions(Options):
    """How a campaign searches.

    Args:
        space: what is tried, by option, in place of the method's own space; a list of values, a range such as
            {low: 1e-4, high: 1e-2, log: true}, one value to fix it at, or null to leave the option alone.
        search: how trials are chosen; "tpe" is Optuna's, "pbt" is population-based training, for
            methods that are trained, whose options then change on the way.
        trials: how many; the one with the options as given is counted, null takes 24, the whole grid, or a population
            of 8.
        settings: of the postprocess options that are tried in each trial, at most; all combinations of single values
            where there are no more.
        objective: what is maximised; weights of image_auroc, image_ap, pixel_auroc, pixel_ap, each a mean over
            categories, and of the same of all categories as one, such as union_image_auroc.
        validation: the images settings are compared on.
        early_stopping: of trials that train, but not of a population.
        population: how that is trained.
        hours: after which no trial goes on; of each campaign with `per_category`, null for no limit. Time spent before
            an interruption counts.
        gpu_hours: the same in hours times the GPUs of a trial.
        concurrency: trials at a time; null takes as many as the cluster's CPUs, or GPUs, allow.
        pareto: let "tpe" look for accuracy, latency and memory at once.
        prefer: among trials within `tolerance` of the best objective, take the most accurate, the one of least
            "latency" or the one of least "memory".
        tolerance: how far below the best objective `prefer` may choose.
        threshold_rates: false-positive rates to choose the threshold's from, by balanced accuracy on the validation
            images; empty leaves it as it is.
        diagnose: when all is chosen, measure on the labelled test split how well the validation images ranked the
            settings. It changes nothing of the choice. Trained models are kept for it.
        resume: refuse where the output holds no campaign yet. An interrupted campaign continues anyway.
    """

    searched_group: ClassVar[str]
    """Name of the group whose options are searched."""

    space: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    search: Literal["random", "grid", "tpe", "pbt"] = "random"
    trials: AtLeastOne | None = None
    settings: AtLeastOne = 1000
    objective: dict[str, float] = field(default_factory=lambda: {"image_auroc": 1.0, "pixel_ap": 1.0})
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    population: PopulationOptions = field(default_factory=PopulationOptions)
    hours: Positive | None = None
    gpu_hours: Positive | None = None
    concurrency: AtLeastOne | None = None
    pareto: bool = False
    prefer: Literal["accuracy", "latency", "memory"] = "accuracy"
    tolerance: Share = 0.005
    threshold_rates: tuple[OpenShare, ...] = ()
    diagnose: bool = False
    resume: bool = False

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().resolve(given)
        if not isinstance(given.get("space"), dict):
            return given
        return {**given, "space": plain_options(given["space"], hints_of(cls)[cls.searched_group])}

    def check(self) -> None:
        super().check()
        check_objective(self.objective)
        if self.pareto and self.search != "tpe":
            raise OptionError("pareto is for --search tpe")


@dataclass(frozen=True)
class TuneMethod(SearchOptions, FitOptions):
    """What a campaign of a method takes; `tune_options` makes a class of it for each.

    Args:
        output: folder of the campaign; path or URI.
        overwrite: replace another campaign in the output. Files that no campaign wrote are never touched, nor is an
            output that holds anything else; without it anything there is an error, but for the same campaign, which is
            continued.
        tracking: where MLflow records the campaign and its trials.
        method: the method's own options, where nothing is searched.
    """

    usual = (
        "shards",
        "output",
        "per_category",
        "space",
        "search",
        "trials",
        "objective",
        "hours",
        "overwrite",
        "method",
        "runtime",
        "tracking",
    )

    searched_group = "method"

    shards: str  # not null: nothing else holds images to a campaign
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    method: Options = field(kw_only=True)

    def check(self) -> None:
        super().check()
        _check_budget(self)
        if self.search == "pbt" and not isinstance(self, TuneTraining):
            raise OptionError(
                f"search=pbt changes options while a method is trained, which {method_name(self)} is not; take random "
                f"or tpe"
            )
        if isinstance(self, TuneTraining) and self.phases:
            raise OptionError("phases are what --search pbt finds; leave them out")
        if self.category_options:
            raise OptionError("category_options are what a campaign with --per_category true finds; leave them out")


@dataclass(frozen=True)
class TuneTraining(TuneMethod, TrainingOptions):
    """What a campaign of a method takes that is trained."""


@dataclass(frozen=True)
class TuneCada(SearchOptions, CalibrateOptions):
    """Search how CADA calibrates a model: α, dropout and learning rate of the head, top of a map, pixels of the score.

    Args:
        output: folder of the campaign, to be given; path or URI. The model stays as it is.
        overwrite: as of the other campaigns: replace another campaign in the output, and nothing else.
        seed: of the search.
    """

    usual = (
        "model",
        "shards",
        "output",
        "space",
        "search",
        "trials",
        "objective",
        "hours",
        "overwrite",
        "calibration",
        "runtime",
        "tracking",
    )

    searched_group = "calibration"

    objective: dict[str, float] = field(default_factory=lambda: {"union_image_auroc": 1.0})
    seed: int = 0

    def check(self) -> None:
        super().check()
        _check_budget(self)
        if self.output is None:
            raise OptionError("give --output, a folder for the campaign")
        if self.calibration.variant not in ("cada", "classifier"):
            raise OptionError(f"calibration.variant={self.calibration.variant} has no head; take cada or classifier")
        if self.search == "pbt":
            raise OptionError("search=pbt is for methods that are trained, not for heads; take random or tpe")
        if self.threshold_rates:
            raise OptionError("threshold_rates are for campaigns of methods; choose the rate with jobs/decide.py")


TuneOptions = TuneMethod | TuneCada


def tune_options() -> dict[str, type[TuneMethod] | type[TuneCada]]:
    """Return the options class of every method: what fitting needs, how to search, and the method's own options."""
    classes: dict[str, type[TuneMethod] | type[TuneCada]] = {}
    for name, config in all_configs().items():
        base = TuneMethod if has_bank(name) else TuneTraining
        own: list[Any] = [("method", config, field(default_factory=config))]
        cls = dataclasses.make_dataclass(f"Tune_{name}", own, bases=(base,), frozen=True)
        space = (
            "; ".join(f"{dimension.name} ({dimension.why})" for dimension in SPACES.get(name, ()))
            or "none of its own, give --space"
        )
        cls.__doc__ = f"Search the options of {name}. Its space: {space}."
        classes[name] = cls
    return {**classes, CADA: TuneCada}


def fit_class(name: str) -> type[FitOptions] | type[CalibrateOptions]:
    """Return the options of fitting a method, or of calibrating a model."""
    if name == CADA:
        return CalibrateOptions
    return FitOptions if has_bank(name) else TrainingOptions


def _check_budget(options: TuneOptions) -> None:
    if options.gpu_hours is not None and not options.runtime.gpus_per_worker:
        raise OptionError("gpu_hours needs --runtime.gpus_per_worker; give --hours")


def method_name(options: TuneOptions) -> str:
    """Return the method that an options class of `tune_options` belongs to, or "cada"."""
    return CADA if isinstance(options, TuneCada) else method_of(options.method)


def searched(options: TuneOptions) -> Any:
    """Return the options that a campaign varies, as given."""
    return getattr(options, options.searched_group)


def per_category(options: TuneOptions) -> bool:
    """Return whether a job has a campaign for each category; one that calibrates a model has not."""
    return isinstance(options, TuneMethod) and options.per_category


def output_of(options: TuneOptions) -> str:
    """Return the folder of the job, which `TuneCada` is refused without."""
    return options.output or ""

"""What jobs/tune.py takes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from pipelines.data.options import ValidationOptions, check_objective
from pipelines.runtime.options import TrackingOptions
from pipelines.training.options import CalibrateOptions, FitOptions, TrainingOptions
from pipelines.tuning.space import (
    CADA,
    SPACES,
)
from unianom.configs import all_configs, has_bank, method_of
from unianom.errors import OptionError
from unianom.options import AS_WRITTEN, documented_arguments
from unianom.written import plain_options


@dataclass(frozen=True)
class PopulationOptions:
    """How a population is trained.

    Args:
        segments: parts of the training, after each of which the worst follow the best.
        share: of the population, that counts as the worst and as the best.
        resample: probability that an option is drawn anew and not changed a little.
        factor: numbers are multiplied or divided by it; a choice moves to one beside it.
    """

    segments: int = 4
    share: float = 0.25
    resample: float = 0.25
    factor: float = 1.2

    def __post_init__(self) -> None:
        if self.segments < 2 or not 0 < self.share <= 0.5 or not 0 <= self.resample <= 1 or not self.factor > 1:
            raise OptionError("population: segments >= 2, share in (0, 0.5], resample in [0, 1], factor > 1")


@dataclass(frozen=True)
class EarlyStopping:
    """Asynchronous successive halving (ASHA) of trials that train.

    Args:
        enabled: whether trials are stopped early.
        grace: share of the training that every trial gets.
        reduction: at each rung, of which the next lies `reduction` times as far, one in `reduction` trials goes on.
    """

    enabled: bool = True
    grace: float = 0.2
    reduction: float = 2.0

    def __post_init__(self) -> None:
        if not 0.01 <= self.grace <= 1 or not 1 < self.reduction < math.inf:
            raise OptionError("early_stopping: grace must be in [0.01, 1], reduction above 1")


@dataclass(frozen=True)
class SearchOptions:
    """How a campaign searches.

    Args:
        space: what is tried, by option, in place of the method's own space: a list of values, a range such as
            {low: 1e-4, high: 1e-2, log: true}, one value to fix it at, or null to leave the option alone.
        search: how trials are chosen: "random", "grid", "tpe" (Optuna), or "pbt", population-based training, for
            methods that are trained, whose options then change on the way.
        trials: how many, the one with the options as given counted; null takes 24, the whole grid, or a population of
            8.
        settings: of the reading options that each trial is finished with; all combinations of single values where there
            are no more.
        objective: what is maximised: weights of image_auroc, image_ap, pixel_auroc, pixel_ap, each a mean over
            categories, and of the same of all categories as one, such as union_image_auroc.
        validation: the images settings are compared on.
        early_stopping: of trials that train, but not of a population.
        population: how that is trained.
        hours: after which no trial goes on, of each campaign with `per_category`; null for no limit. Time spent before
            an interruption counts.
        gpu_hours: the same in hours times the GPUs of a trial.
        concurrency: trials at a time; null takes as many as the cluster's CPUs, or GPUs, allow.
        pareto: let "tpe" look for accuracy, latency and memory at once.
        prefer: among trials within `tolerance` of the best objective, take the most accurate, the one of least
            "latency" or the one of least "memory".
        tolerance: see there.
        threshold_rates: false-positive rates to choose the threshold's from, by balanced accuracy on the validation
            images; empty leaves it as it is.
        diagnose: when all is chosen, measure on the labelled test split how well the validation images ranked the
            settings. It changes nothing of the choice. Trained models are kept for it.
        resume: refuse where the output holds no campaign yet. An interrupted campaign continues anyway.
    """

    space: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    search: Literal["random", "grid", "tpe", "pbt"] = "random"
    trials: int | None = None
    settings: int = 1000
    objective: dict[str, float] = field(default_factory=lambda: {"image_auroc": 1.0, "pixel_ap": 1.0})
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    population: PopulationOptions = field(default_factory=PopulationOptions)
    hours: float | None = None
    gpu_hours: float | None = None
    concurrency: int | None = None
    pareto: bool = False
    prefer: Literal["accuracy", "latency", "memory"] = "accuracy"
    tolerance: float = 0.005
    threshold_rates: tuple[float, ...] = ()
    diagnose: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if hasattr(self, "method") or hasattr(self, "calibration"):  # the classes made for each method
            object.__setattr__(self, "space", plain_options(self.space, type(searched(self))))
        check_objective(self.objective)
        for name in ("trials", "settings", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1")
        for name in ("hours", "gpu_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name}={value} must be positive")
        if not 0 <= self.tolerance <= 1 or not all(0 < rate < 1 for rate in self.threshold_rates):
            raise OptionError("tolerance must be in [0, 1], threshold_rates in (0, 1)")
        if self.pareto and self.search != "tpe":
            raise OptionError("pareto is for --search tpe")


def tune_options() -> dict[str, type]:
    """The options class of every method: what fitting needs, how to search, and the method's own options."""
    classes: dict[str, type] = {}
    for name, config in all_configs().items():
        base = fit_class(name)
        fields: list[Any] = [
            ("tracking", TrackingOptions, field(default_factory=TrackingOptions)),
            ("method", config, field(default_factory=config)),
        ]
        cls = dataclasses.make_dataclass(
            f"Tune_{name}", fields, bases=(SearchOptions, base), frozen=True, namespace={"__post_init__": _check}
        )
        searched = "; ".join(f"{d.name} ({d.why})" for d in SPACES.get(name, ())) or "none of its own, give --space"
        summary = f"Search the options of {name}. Its space: {searched}."
        documented = documented_arguments(FitOptions, base, SearchOptions)
        cls.__doc__ = "\n".join([summary, "", "Args:", documented, OWN_ARGUMENTS])
        classes[name] = cls
    documented = documented_arguments(CalibrateOptions, SearchOptions)
    TuneCada.__doc__ = "\n".join([CADA_SUMMARY, "", "Args:", documented, CADA_ARGUMENTS])
    classes[CADA] = TuneCada
    for cls in classes.values():
        # the parser would look for the types' names here, but those of the parents' fields live where these do
        cls.__init__.__annotations__.update(get_type_hints(cls))  # type: ignore[misc]
    return classes


@dataclass(frozen=True)
class TuneCada(SearchOptions, CalibrateOptions):
    """The options of calibrating a model, and how to search; documented by `tune_options`."""

    objective: dict[str, float] = field(default_factory=lambda: {"union_image_auroc": 1.0})
    seed: int = 0

    def __post_init__(self) -> None:
        SearchOptions.__post_init__(self)
        CalibrateOptions.__post_init__(self)
        _check_budget(self)
        if self.output is None:
            raise OptionError("give --output, a folder for the campaign")
        if self.calibration.variant not in ("cada", "classifier"):
            raise OptionError(f"calibration.variant={self.calibration.variant} has no head; take cada or classifier")
        if self.search == "pbt":
            raise OptionError("search=pbt is for methods that are trained, not for heads; take random or tpe")
        if self.threshold_rates:
            raise OptionError("threshold_rates are for campaigns of methods; choose the rate with jobs/decide.py")


CADA_SUMMARY = (
    "Search how a model's scores are calibrated (CADA): α, dropout and learning rate of the head, what counts as the "
    "top of a map, the pixels whose mean is the score."
)
CADA_ARGUMENTS = """    seed: of the search."""

OWN_ARGUMENTS = """    tracking: where MLflow records the campaign and its trials.
    method: the method's own options, where nothing is searched."""


def fit_class(name: str) -> Any:
    """The options of fitting a method, or of calibrating a model."""
    if name == CADA:
        return CalibrateOptions
    return FitOptions if has_bank(name) else TrainingOptions


def _check(options: Any) -> None:
    name = method_name(options)
    SearchOptions.__post_init__(options)
    fit_class(name).__post_init__(options)
    _check_budget(options)
    if options.search == "pbt" and fit_class(name) is not TrainingOptions:
        raise OptionError(
            f"search=pbt changes options while a method is trained, which {name} is not; take random or tpe"
        )
    if getattr(options, "phases", ()):
        raise OptionError("phases are what --search pbt finds; leave them out")
    if options.category_options:
        raise OptionError("category_options are what a campaign with --per_category true finds; leave them out")


def _check_budget(options: Any) -> None:
    if options.gpu_hours is not None and not options.runtime.gpus_per_worker:
        raise OptionError("gpu_hours needs --runtime.gpus_per_worker; give --hours")


def method_name(options: Any) -> str:
    """The method that an options class of `tune_options` belongs to, or "cada"."""
    if isinstance(options, TuneCada):
        return CADA
    return method_of(options.method)


def searched(options: Any) -> Any:
    """The options that a campaign varies, as given."""
    return options.calibration if isinstance(options, TuneCada) else options.method

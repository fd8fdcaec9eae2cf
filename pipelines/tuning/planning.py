"""What a campaign is to do: the plan that names it, its categories, its settings, and the driver that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipelines.data.engine import choose_engine
from pipelines.data.image_source import SampleSource
from pipelines.data.splits import TrainValSplit, choose_samples
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model, make_memory_method
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.run_record import Run
from pipelines.training.calibration_images import EmbeddingCache
from pipelines.training.driver import check_masks
from pipelines.training.job import make_method
from pipelines.training.options import FitOptions
from pipelines.training.per_category import weights_digest
from pipelines.tuning.calibration_driver import CadaDriver
from pipelines.tuning.calibration_trials import CadaCampaign, CalibratedPostprocessor, recipe_options
from pipelines.tuning.dimensions import Dimension
from pipelines.tuning.driver import Driver
from pipelines.tuning.memory_driver import MemoryDriver
from pipelines.tuning.memory_trials import MemoryCampaign
from pipelines.tuning.options import TuneCada, TuneMethod, TuneOptions, fit_class, method_name, per_category, searched
from pipelines.tuning.population import PopulationCampaign
from pipelines.tuning.population_driver import PopulationDriver
from pipelines.tuning.space import key_of, read_value, settings_of, split_space
from pipelines.tuning.trained_trials import TrainedCampaign
from unianom import __version__, files
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.trained import BatchSpec
from unianom.options import to_plain

NOT_IN_PLANS = ("shards", "output", "overwrite", "runtime", "max_failures", "checkpoint_every", "tracking", "folder")
"""Options of fitting that say where, how fast and how safely, not what."""


def campaign_plan(options: TuneOptions, space: Sequence[Dimension], shards: ShardSet) -> dict[str, Any]:
    """Return what the trials depend on; not how many there are, so that a campaign can be made longer."""
    name, config = method_name(options), searched(options)
    fitted = {field.name: to_plain(getattr(options, field.name)) for field in dataclasses.fields(fit_class(name))}
    weights: str | None
    if isinstance(options, TuneCada):
        weights = files.sha256_file(files.join(options.model, "model.json"))
    else:
        weights = weights_digest(config.backbone.name, config.backbone.weights)
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
        **options.runtime.execution.plan,
        "threads": options.runtime.cpus_per_worker,
    }


def category_groups(options: TuneOptions, shards: ShardSet) -> list[list[str]]:
    """Return the categories of each campaign.

    Raises:
        ModelError: no model to calibrate.
        OptionError: there is a model for each category.
    """
    if isinstance(options, TuneCada):
        model_set = ModelSet.open(options.model)
        if model_set.by_category:
            raise OptionError(
                f"{model_set.uri} holds a model for each category; give the folder of one of them as --model"
            )
        return [model_set.descriptions()[0]["categories"]]
    categories = list(options.categories) or shards.categories
    return [[category] for category in categories] if options.per_category else [categories]


def check_method(options: TuneOptions, shards: ShardSet) -> BatchSpec:
    """Refuse what no trial could be made of; return what the training of the method needs, if it is trained."""
    needs = BatchSpec()
    if isinstance(options, TuneCada):
        return needs
    name = method_name(options)
    if not issubclass(METHODS[name], MemoryMethod):
        needs = make_method(name, options.method).batch_spec
        if needs.masks:
            check_masks(shards, list(options.categories) or shards.categories)
    elif getattr(options.method, "mask_scope", "image") == "batch":
        raise OptionError("with method.mask_scope=batch patches depend on what shares their batch; take image")
    else:
        make_memory_method(name, options.method)
    shards.check(Selection(("train",), options.categories, (NORMAL,)))
    return needs


def chosen_runtime(options: TuneOptions, shards: ShardSet) -> RuntimeOptions:
    """Return the campaign's options of running, with the engine that computes frozen encoders.

    Raises:
        EngineError: see `choose_engine`.
    """
    categories = () if isinstance(options, TuneCada) else options.categories
    source = SampleSource(shards, Selection(("train",), categories, (NORMAL,)), options.limits)

    def method() -> Method:
        if isinstance(options, TuneCada):
            return load_model(ModelSet.open(options.model).uri, CPU).method
        name = method_name(options)
        make = make_memory_method if issubclass(METHODS[name], MemoryMethod) else make_method
        return make(name, options.method)

    groups = len(categories or shards.categories) if per_category(options) else 1
    return choose_engine(options.runtime, source, source.count() // groups, method)


def make_driver(
    options: TuneOptions,
    shards: ShardSet,
    categories: list[str],
    folder: str,
    space: Sequence[Dimension],
    needs: BatchSpec,
    run: Run,
) -> Driver[Any]:
    """Return the driver of one campaign.

    Args:
        options, shards, space: of the job.
        categories: of this campaign.
        folder: of this campaign.
        needs: of the method's training.
        run: the MLflow run of the job.

    Raises:
        DataError: there is no normal image to compare settings on.
    """
    if isinstance(options, TuneCada):
        return _calibration_driver(options, shards, folder, space, run)
    method = METHODS[method_name(options)]
    fit_options = _fit_options(options)
    memory = issubclass(method, MemoryMethod)
    if options.pareto and not memory:  # a search for several goals takes no reports on the way
        fit_options = dataclasses.replace(fit_options, validate_every=0)
    split = fit_options.split
    chosen, _ = choose_samples(shards, categories, split, validate=True, labels=needs.labels)
    if memory:
        fit_options = _held_out(fit_options)
    _check_held_out(chosen, categories, "")
    trial_space, postprocess_space = split_space(space, method.postprocess_options)
    own = _campaign(options, shards, folder, postprocess_space)
    own |= {"options": fit_options, "categories": categories, "chosen": chosen}
    if issubclass(method, MemoryMethod):
        return MemoryDriver(method, MemoryCampaign(**own), trial_space, options, run)
    if options.search == "pbt":
        return PopulationDriver(PopulationCampaign(**own, repeats=needs.repeats), trial_space, options, run)
    return Driver(TrainedCampaign(**own), trial_space, options, run)


def _calibration_driver(
    options: TuneCada, shards: ShardSet, folder: str, space: Sequence[Dimension], run: Run
) -> CadaDriver:
    fit_options = recipe_options(options)
    cache = EmbeddingCache.of(files.full_uri(options.model), shards, fit_options)
    chosen = TrainValSplit(cache.chosen, cache.held_out - cache.chosen)
    _check_held_out(chosen, cache.categories, " of the model's training")
    trial_space, postprocess_space = split_space(space, CalibratedPostprocessor.postprocess_options)
    own = _campaign(options, shards, folder, postprocess_space)
    own |= {"options": fit_options, "categories": cache.categories, "chosen": chosen}
    return CadaDriver(cache, CadaCampaign(**own, model=cache.model, kept=cache), trial_space, options, run)


def _campaign(
    options: TuneOptions, shards: ShardSet, folder: str, postprocess_space: Sequence[Dimension]
) -> dict[str, Any]:
    """Return what a campaign of any kind is made of, but options of fitting, categories and the split."""
    config = searched(options)
    default = {dimension.name: read_value(config, dimension.name) for dimension in postprocess_space}
    drawn = settings_of(postprocess_space, options.settings, options.seed)
    return {
        "name": method_name(options),
        "config": to_plain(config),
        "shards": shards,
        "settings": [default, *(values for values in drawn if key_of(values) != key_of(default))],
        "validation": options.validation,
        "objective": options.objective,
        "folder": folder,
        "keep_models": options.diagnose,
    }


def _fit_options(options: TuneMethod) -> Any:
    """Return the options of fitting among those of a campaign."""
    base = fit_class(method_name(options))
    return base(**{field.name: getattr(options, field.name) for field in dataclasses.fields(base)})


def _held_out(fit: FitOptions) -> FitOptions:
    """Return options by which jobs/train.py holds out the images that the campaign does, too; unless told so, it may
    put them into the bank."""
    if fit.threshold.source != "auto":
        return fit
    return dataclasses.replace(fit, threshold=dataclasses.replace(fit.threshold, source="held_out"))


def _check_held_out(chosen: TrainValSplit, categories: Sequence[str], of: str) -> None:
    if not chosen.held_out:
        raise DataError(
            f"no normal image of {', '.join(categories)} was held out, so there is none to compare settings on; raise "
            f"--threshold.validation_fraction{of}"
        )

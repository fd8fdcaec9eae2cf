"""One model for all categories, or one for each: planned, claimed and fitted one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.data.splits import TrainValSplit
from pipelines.runtime import outputs
from pipelines.runtime.model_set import INDEX, write_index
from pipelines.training.options import FitOptions
from unianom import files
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.options import from_plain, merged, to_plain
from unianom.thresholds import Threshold
from unianom.weights import NAMED_WEIGHTS, PACKAGE, find_package


@dataclass(frozen=True)
class FitTask:
    """One model to fit.

    Attributes:
        config: the method's options.
        shards, categories: its images, of which `chosen` are learned from and held out.
        output: model folder.
        chosen, notice: see `choose_samples`.
        plan: all that the model's bytes depend on.
    """

    config: Any
    shards: ShardSet
    categories: list[str]
    output: str
    chosen: TrainValSplit
    notice: str
    plan: dict[str, Any]


@dataclass(frozen=True)
class FitResult:
    """One fitted model.

    Attributes:
        folder: its model folder.
        categories: those it was fitted on.
        fresh: whether this run wrote it.
        summary: what it was made of, in words.
        metrics: what it was made of, in numbers.
        threshold: the stored threshold of all categories together, or None.
        category_thresholds: those of single categories.
        notice: why the threshold promises less than is usual, or is not there, else "".
    """

    folder: str
    categories: list[str]
    fresh: bool
    summary: str
    metrics: dict[str, float]
    threshold: Threshold | None
    category_thresholds: dict[str, Threshold]
    notice: str

    def threshold_lines(self) -> list[str]:
        """Return the thresholds with what they promise, a line each."""
        if self.threshold is None:
            return []
        lines = [f"threshold {self.threshold.value:.6g}: {self.threshold.promise()}"]
        return lines + [
            f"threshold of {name} {own.value:.6g}: {own.promise()}"
            for name, own in sorted(self.category_thresholds.items())
        ]


def plan_fits(
    config: Any,
    options: FitOptions,
    describe: Callable[[Any, ShardSet, list[str]], tuple[TrainValSplit, str, dict[str, Any]]],
    labels: bool = False,
    shards: ShardSet | None = None,
) -> list[FitTask]:
    """Plan one model for all categories, or one each.

    Args:
        config: the method's options.
        options: data and output.
        describe: gives the images and the plan of one model, given its options, the shard set and its categories.
        labels: whether the method learns from anomalous training images, too.
        shards: the images; None opens those of the options.

    Raises:
        DataError: there is no such category, not a single normal training image, or, where anomalous ones are learned
            from, none of these for one of the models.
        OptionError: see `own_config`.
    """
    shards = open_shards(options) if shards is None else shards
    shards.check(Selection(("train",), options.categories, (NORMAL, ANOMALOUS) if labels else (NORMAL,)))
    categories = list(options.categories) or shards.categories
    groups = [[category] for category in categories] if options.per_category else [categories]
    configs = [own_config(config, group, options) for group in groups]
    for group in groups:
        if labels and not shards.count(Selection(("train",), tuple(group), (ANOMALOUS,))):
            raise DataError(
                f"{shards.uri} has no anomalous training image of {', '.join(group)} for a method that learns from "
                f"labels; ingest a data set whose train split holds some, or take a method or options without labels"
            )
    output = files.full_uri(options.output)
    tasks = []
    for own, group in zip(configs, groups, strict=True):
        chosen, notice, plan = describe(own, shards, group)
        folder = output
        if options.per_category:
            folder = files.join(output, files.safe_name(group[0], (INDEX, "model.json")))
        tasks.append(FitTask(own, shards, group, folder, chosen, notice, plan))
    return tasks


def open_shards(options: FitOptions) -> ShardSet:
    """Open the shard set that the options name."""
    assert options.shards is not None, "images that are listed are handed in"
    return ShardSet.open(options.shards)


def own_config(config: Any, categories: list[str], options: FitOptions) -> Any:
    """Return a method's options for the model of these categories.

    Raises:
        OptionError: one category's options are not the method's, or for a model of several categories.
    """
    if len(categories) > 1:
        if named := sorted(set(options.category_options) & set(categories)):
            raise OptionError(
                f"category_options of {', '.join(named)} are for models of one category; give --per_category true, or "
                f"leave them out"
            )
        return config
    changes = options.category_options.get(categories[0], {})
    if "preset" in changes:
        raise OptionError(f"category_options.{categories[0]}.preset: a preset is chosen for all categories")
    try:
        return from_plain(type(config), merged(to_plain(config), changes))
    except OptionError as error:
        raise OptionError(f"category_options.{categories[0]}: {error}") from error


@contextmanager
def open_models(tasks: Sequence[FitTask], options: FitOptions) -> Iterator[None]:
    """Claim the model folder, or with `per_category` that of all models, for the length of the block.

    Raises:
        OptionError, DataError: see `outputs.open_output`; of any of the models, before the first is fitted.
    """
    with ExitStack() as stack:
        if options.per_category:
            plan = {"models": {task.categories[0]: files.digest_of(task.plan) for task in tasks}}
            inputs = options.sources | inputs_of(tasks[0].config)
            output = files.full_uri(options.output)
            stack.enter_context(outputs.open_output(output, "models", plan, inputs=inputs, overwrite=options.overwrite))
            for task in tasks:
                outputs.check_output(task.output, "model", task.plan, overwrite=options.overwrite)
        else:
            stack.enter_context(open_model(tasks[0], options))
        yield


def open_model(task: FitTask, options: FitOptions) -> AbstractContextManager[str]:
    """Claim the folder of one model; gives the digest of its plan."""
    inputs = options.sources | inputs_of(task.config)
    return outputs.open_output(task.output, "model", task.plan, inputs=inputs, overwrite=options.overwrite)


def fit_all(tasks: Sequence[FitTask], options: FitOptions, fit: Callable[[FitTask, str], FitResult]) -> list[FitResult]:
    """Fit planned models one after another, and write which is of which category.

    Args:
        tasks: from `plan_fits`.
        options: data and output.
        fit: makes one model, given its task and the digest of its plan, or finds it made.
    """
    results = []
    for task in tasks:
        with open_model(task, options) as digest:
            results.append(fit(task, digest))
    if options.per_category:
        names = {task.categories[0]: task.output.rsplit("/", 1)[-1] for task in tasks}
        write_index(files.full_uri(options.output), names)
    return results


def inputs_of(config: Any) -> dict[str, str | None]:
    """Return what fitting a method reads besides its images, by the option that names it."""
    weights = config.backbone.weights
    synthesis = getattr(config, "synthesis", None)
    return {
        "method.backbone.weights": None if weights in NAMED_WEIGHTS else weights,
        "method.synthesis.textures": getattr(synthesis, "textures", None),
    }


def weights_digest(name: str, weights: str) -> str | None:
    """Return the checksum of the file that a backbone's weights come from, so that another file under the same name is
    another plan.

    Args:
        name, weights: of the `BackboneConfig`.
    """
    if weights == PACKAGE:
        package = find_package(name)
        return None if package is None else package.sha256  # the file is compared with it when it is read
    if weights in NAMED_WEIGHTS or not files.exists(weights):
        return None  # a missing file is told by the backbone, with the ways out
    return files.sha256_file(weights)

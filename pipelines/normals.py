"""What fitting any method begins and ends with: which images it learns from, and the threshold from the rest of the
normal ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.commandline import AS_WRITTEN
from pipelines.ingest import map_ahead
from pipelines.models import load_model, write_index
from pipelines.runtime import Progress, RuntimeOptions, run_units
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy, decode_mask, decode_prepared, normalise, prepare_mask
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot, hash_order, hold_out
from unianom.errors import DataError, ImageError, OptionError
from unianom.methods import Method
from unianom.model import Model
from unianom.serialise import from_plain, merged, to_plain
from unianom.thresholds import Threshold, fit_threshold, normals_needed, smallest_supported_rate
from unianom.written import plain_options

WORK = "_work"
"""Folder below the model folder where unfinished work lies."""

USUAL_FPR = 0.05


@dataclass(frozen=True)
class ThresholdOptions:
    """How the decision threshold is chosen, from normal images that are in no bank and no training batch.

    Args:
        target_fpr: highest share of normal images that may fail; null aims at 0.05 and leaves the model without a
            threshold, saying so, where the held-out normals cannot support that.
        confidence: probability that the promise holds.
        validation_fraction: share of each category's normal training images held out where the shards have no "val"
            split; 0 for none, and then no threshold.
    """

    target_fpr: float | None = None
    confidence: float = 0.95
    validation_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.target_fpr is not None and not 0 < self.target_fpr < 1:
            raise OptionError(f"threshold.target_fpr={self.target_fpr} must be in (0, 1)")
        if not 0 < self.confidence < 1:
            raise OptionError(f"threshold.confidence={self.confidence} must be in (0, 1)")
        if not 0 <= self.validation_fraction < 1:
            raise OptionError(f"threshold.validation_fraction={self.validation_fraction} must be in [0, 1)")


@dataclass(frozen=True)
class FitOptions:
    """What fitting any method needs besides the method's own options.

    Args:
        shards: shard set; path or URI.
        output: model folder to write; path or URI.
        categories: those to fit on; empty for all.
        per_category: one model for each category, in folders below `output`, instead of one for all.
        category_options: for the model of one category alone, options of the method that differ, by category, such as
            {screw: {temperature: 0.1}}; categories that are not fitted are passed over.
        few_shot: normal images per category, drawn with `seed`, and where a method learns from labels at most as many
            anomalous ones; null takes all.
        seed: of the held-out normals and the few-shot draw; coresets and training have their own, among the
            method's options.
        batch_size: images in one forward pass, of what is not a training step.
        overwrite: replace another model in the output.
        threshold: how the decision threshold is chosen.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
    """

    shards: str
    output: str
    categories: tuple[str, ...] = ()
    per_category: bool = False
    category_options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=AS_WRITTEN)
    few_shot: int | None = None
    seed: int = 0
    batch_size: int = 8
    overwrite: bool = False
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def __post_init__(self) -> None:
        method = getattr(self, "method", None)  # of the classes made for each method
        if method is not None:
            own = {name: plain_options(values, type(method)) for name, values in self.category_options.items()}
            object.__setattr__(self, "category_options", own)
        if self.batch_size < 1 or (self.few_shot is not None and self.few_shot < 1):
            raise OptionError("batch_size and few_shot must be positive")


@dataclass(frozen=True)
class FitResult:
    """One fitted model.

    Attributes:
        folder: its model folder.
        categories: those it was fitted on.
        fresh: whether this run wrote it.
        summary: what it was made of, in words.
        metrics: what it was made of, in numbers.
        threshold: the stored threshold, or None.
        notice: why there is no threshold, else "".
    """

    folder: str
    categories: list[str]
    fresh: bool
    summary: str
    metrics: dict[str, float]
    threshold: Threshold | None
    notice: str


def own_config(config: Any, categories: list[str], options: FitOptions) -> Any:
    """A method's options for the model of these categories.

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


@dataclass(frozen=True)
class Chosen:
    """Which samples a method learns from, and which are held out for validation and the threshold.

    Attributes:
        learn: sample_ids of all that is learned from.
        held_out: of normal images that are not.
        anomalous: which of `learn` are anomalous.
    """

    learn: frozenset[str]
    held_out: frozenset[str]
    anomalous: frozenset[str] = frozenset()


def choose_samples(
    shards: ShardSet, categories: list[str], options: FitOptions, validate: bool = False, labels: bool = False
) -> tuple[Chosen, str]:
    """Split the normal training images into those to learn from and held-out ones.

    Args:
        shards, categories, options: what to split, and how.
        validate: hold normals out even if they are too few for a threshold.
        labels: learn from the anomalous training images, too; a category may then be without normal ones.

    Returns:
        The split, and why there will be no threshold, or "".

    Raises:
        OptionError: the held-out normals cannot support an explicitly given target rate.
        DataError: a category has no training image, or no normal one where only these are learned from.
    """
    columns = ["sample_id", "category", "split"]
    normals = shards.table(Selection(("train", "val"), tuple(categories), (NORMAL,)), columns).to_pylist()
    train = [row for row in normals if row["split"] == "train"]
    labelled = []
    if labels:
        labelled = shards.table(Selection(("train",), tuple(categories), (ANOMALOUS,)), columns).to_pylist()
    empty = sorted(set(categories) - {row["category"] for row in [*train, *labelled]})
    if empty:
        kind = "labelled" if labels else "normal"
        raise DataError(f"{shards.uri} has no {kind} training image of category {', '.join(empty)}")
    held_out = frozenset(row["sample_id"] for row in normals if row["split"] == "val")
    if not held_out and options.threshold.validation_fraction:
        ids, groups = [row["sample_id"] for row in train], [row["category"] for row in train]
        held_out = frozenset(hold_out(ids, groups, options.threshold.validation_fraction, options.seed))
    rest = [row for row in train if row["sample_id"] not in held_out]
    learn = frozenset(row["sample_id"] for row in rest)
    if options.few_shot is not None:
        ids, groups = [row["sample_id"] for row in rest], [row["category"] for row in rest]
        learn = frozenset(few_shot(ids, groups, options.few_shot, options.seed))
    anomalous = _anomalous_shots(labelled, options)
    target, confidence = options.threshold.target_fpr, options.threshold.confidence
    needed = normals_needed(target or USUAL_FPR, confidence)
    notice = ""
    if len(held_out) < needed:
        best = f"they support {smallest_supported_rate(len(held_out), confidence):.3g} at best" if held_out else "none"
        shortage = (
            f"{len(held_out)} held-out normal images cannot support a false-positive rate of "
            f"{target or USUAL_FPR:g} at {100 * confidence:g} % confidence ({best}; {needed} are needed)"
        )
        if target is not None:
            raise OptionError(
                f"{shortage}; raise --threshold.target_fpr or --threshold.validation_fraction, or add normal images"
            )
        remedy = "ask for a higher --threshold.target_fpr" if held_out else "it takes normal images to hold out"
        notice = f"no threshold: {shortage}; {remedy}"
        if validate:
            return Chosen(learn | anomalous, held_out, anomalous), notice
        held_out = frozenset()
        if options.few_shot is None and not any(row["split"] == "val" for row in normals):
            learn = frozenset(row["sample_id"] for row in train)
    return Chosen(learn | anomalous, held_out, anomalous), notice


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
    chosen: Chosen
    notice: str
    plan: dict[str, Any]


def plan_fits(
    config: Any,
    options: FitOptions,
    describe: Callable[[Any, ShardSet, list[str]], tuple[Chosen, str, dict[str, Any]]],
    labels: bool = False,
) -> list[FitTask]:
    """Plan one model for all categories, or one each.

    Args:
        config: the method's options.
        options: data and output.
        describe: gives the images and the plan of one model, given its options, the shard set and its categories.
        labels: whether the method learns from anomalous training images, too.

    Raises:
        DataError: there is no such category, not a single normal training image, or, where anomalous ones are learned
            from, none of these for one of the models.
        OptionError: see `own_config`.
    """
    shards = ShardSet.open(options.shards)
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
        folder = files.join(output, files.safe_name(group[0])) if options.per_category else output
        tasks.append(FitTask(own, shards, group, folder, chosen, notice, plan))
    return tasks


@contextmanager
def open_models(tasks: Sequence[FitTask], options: FitOptions) -> Iterator[None]:
    """Claim the model folder, or with `per_category` that of all models, for the length of the block.

    Raises:
        OptionError, DataError: see `storage.open_output`; of any of the models, before the first is fitted.
    """
    with ExitStack() as stack:
        if options.per_category:
            plan = {"models": {task.categories[0]: files.digest_of(task.plan) for task in tasks}}
            inputs = inputs_of(options.shards, tasks[0].config)
            output = files.full_uri(options.output)
            stack.enter_context(storage.open_output(output, "models", plan, inputs=inputs, overwrite=options.overwrite))
            for task in tasks:
                storage.check_output(task.output, "model", task.plan, overwrite=options.overwrite)
        else:
            stack.enter_context(open_model(tasks[0], options))
        yield


def open_model(task: FitTask, options: FitOptions) -> AbstractContextManager[str]:
    """Claim the folder of one model; gives the digest of its plan."""
    inputs = inputs_of(options.shards, task.config)
    return storage.open_output(task.output, "model", task.plan, inputs=inputs, overwrite=options.overwrite)


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


def inputs_of(shards: str, config: Any) -> dict[str, str | None]:
    """Return what fitting a method reads, by the option that names it."""
    weights = config.backbone.weights
    synthesis = getattr(config, "synthesis", None)
    return {
        "shards": shards,
        "method.backbone.weights": None if weights in ("pretrained", "random") else weights,
        "method.synthesis.textures": getattr(synthesis, "textures", None),
    }


def held_out_record(shards: ShardSet, categories: list[str], options: FitOptions) -> dict[str, Any]:
    """What a model's provenance keeps of how `choose_samples` holds normals out, so that later jobs can tell which."""
    val = shards.count(Selection(("val",), tuple(categories), (NORMAL,)))
    return {
        "split": "val" if val else "train",
        "fraction": None if val else options.threshold.validation_fraction,
        "seed": options.seed,
    }


def held_out_normals(
    provenance: Mapping[str, Any], listed: Iterable[Mapping[str, Any]], name: str, fraction: float | None = None
) -> frozenset[str]:
    """Names of the normal images that a model's training held out, drawn again as it drew them.

    Args:
        provenance: the model's.
        listed: sample_id, category and split of all normal images of its training and validation splits.
        name: of the model, in errors.
        fraction: share of the normal training images held out, for models that do not record it.

    Raises:
        DataError: which they were cannot be told.
    """
    if provenance["held_out_normals"] == 0:
        return frozenset()
    unrecorded = {"split": "train", "fraction": fraction, "seed": provenance["seeds"]["split"]}
    record = provenance.get("held_out") or unrecorded
    own = [row for row in listed if row["split"] == record["split"]]
    names = frozenset(row["sample_id"] for row in own)
    found = f"there are {len(names)}"
    if record["split"] == "train":
        if record["fraction"] is None:
            raise DataError(
                f"{name} does not record which share of its normal images was held out; give it as --held_out_fraction "
                f"(jobs/train.py takes 0.2 unless told otherwise)"
            )
        ids, categories = [row["sample_id"] for row in own], [row["category"] for row in own]
        names = frozenset(hold_out(ids, categories, record["fraction"], record["seed"]))
        found = f"drawing {record['fraction']:g} of {len(own)} again gives {len(names)}"
    if len(names) != provenance["held_out_normals"]:
        raise DataError(
            f"{name} held out {provenance['held_out_normals']} normal images, but {found}; give the shards it was "
            f"trained on as --shards, or score all of their train split"
            + ("" if provenance.get("held_out") else ", and mend --held_out_fraction")
        )
    return names


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _anomalous_shots(rows: list[dict[str, Any]], options: FitOptions) -> frozenset[str]:
    """Names of the anomalous images to learn from: all, or of each category as many as of the normal ones at most."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row["sample_id"])
    return frozenset(name for names in groups.values() for name in hash_order(names, options.seed)[: options.few_shot])


def weights_digest(weights: str) -> str | None:
    """Checksum of a weights file, so that another file under the same name is another plan."""
    if weights in ("pretrained", "random") or not files.exists(weights):
        return None  # a missing file is told by the backbone, with the ways out
    return files.sha256_file(weights)


def decode_row(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """A sample's image as S×S×3 uint8 input.

    Raises:
        DataError: it cannot be read under these limits, though ingest could under its own; names the sample.
    """
    try:
        return decode_prepared(row["image"], policy, limits)
    except ImageError as error:
        raise DataError(f"{row['sample_id']}: {error}; give --limits as at ingest, or leave the image out") from error


def decode_row_mask(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """A sample's mask as S×S bool, where `decode_row` has its image; nothing is marked in a normal one.

    Raises:
        DataError: the sample is anomalous and has no mask, or it cannot be read under these limits; names the sample.
    """
    if row["label"] == NORMAL:
        return np.zeros((policy.side, policy.side), bool)
    if row["mask"] is None:
        raise DataError(missing_masks([row["sample_id"]]))
    try:
        return prepare_mask(decode_mask(row["mask"], limits=limits), policy)
    except ImageError as error:
        raise DataError(
            f"mask of {row['sample_id']}: {error}; give --limits as at ingest, or leave the image out"
        ) from error


def missing_masks(sample_ids: list[str]) -> str:
    """What to tell of anomalous training images that need a mask and have none."""
    more = f" (and {len(sample_ids) - 1} more)" if len(sample_ids) > 1 else ""
    return (
        f"{sample_ids[0]}{more} is anomalous but has no mask, which the method learns from; add the mask, or leave the "
        f"image out, and run jobs/ingest.py again"
    )


class NormalReader:
    """Reads chosen samples of a part as network input, decoded ahead. What all passes over normals share."""

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        threads: int,
    ) -> None:
        self._shards, self._selection, self._chosen = shards, selection, chosen
        self._batch_size, self._limits = batch_size, limits
        self._pool = ThreadPoolExecutor(threads)

    def batches(self, part: str, method: Method) -> Iterator[torch.Tensor]:
        """B×3×S×S batches of the chosen samples, in the order of the part."""

        def prepare(row: dict[str, Any]) -> np.ndarray:
            return decode_row(row, method.input, self._limits)

        waiting: list[np.ndarray] = []
        for pixels in map_ahead(self._pool, prepare, self._rows(part), 2 * self._batch_size):
            waiting.append(pixels)
            if len(waiting) == self._batch_size:
                yield normalise(waiting, method.input).to(method.device)
                waiting = []
        if waiting:
            yield normalise(waiting, method.input).to(method.device)

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        for batch in self._shards.read(part, self._selection, ["sample_id", "image"]):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._chosen)


class HeldOutScorer:
    """Scores the held-out normals of one part. A `UnitWorker`."""

    def __init__(
        self,
        model: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        device: str,
        threads: int,
    ) -> None:
        self._model = load_model(model, device)
        self._reader = NormalReader(shards, selection, chosen, batch_size, limits, threads)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Scores of one part's held-out images."""
        scores: list[float] = []
        for batch in self._reader.batches(unit["part"], self._model.method):
            scores += self._model.method.predict(batch).score.float().cpu().tolist()
        return {"scores": scores}


def score_held_out(
    model: str, shards: ShardSet, held_out: frozenset[str], categories: list[str], options: FitOptions
) -> list[float]:
    """Image scores of held-out normals by a model folder."""
    arguments = {
        "model": model,
        "shards": shards,
        "selection": Selection(("train", "val"), tuple(categories), (NORMAL,)),
        "chosen": held_out,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    progress = Progress("score held-out normals", len(held_out))
    scores: list[float] = []
    for result in run_units(HeldOutScorer, arguments, [{"part": part} for part in shards.parts], options.runtime):
        scores += result["scores"]
        progress.advance(len(result["scores"]))
    progress.close()
    return scores


def held_out_threshold(
    model: Model, folder: str, shards: ShardSet, held_out: frozenset[str], options: FitOptions
) -> Threshold | None:
    """The decision threshold of a model, from the scores of held-out normals; None if there are none.

    Args:
        model: fitted, without a threshold.
        folder: where its actors may load it from; written here.
        shards, held_out: the images.
        options: target rate and confidence, and the actors.
    """
    if not held_out:
        return None
    model.save(folder)
    scores = score_held_out(folder, shards, held_out, model.categories, options)
    return fit_threshold(scores, options.threshold.target_fpr or USUAL_FPR, options.threshold.confidence)

"""Which samples a method learns from, and which normal ones are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.options import SplitOptions
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot, hash_order, hold_out
from unianom.errors import DataError, OptionError
from unianom.thresholds import (
    HIGHEST_PROMISED,
    USUAL_FPR,
    Source,
    normals_needed,
    rounded_up,
    smallest_supported_rate,
    supported_rate,
)

LEFT_OUT: Source = "leave_one_out"
"""The source of thresholds for which nothing is held out."""


@dataclass(frozen=True)
class TrainValSplit:
    """Which samples a method learns from, and which are held out for validation and the threshold.

    Attributes:
        learn: sample_ids of all that is learned from.
        held_out: of normal images that are not.
        anomalous: which of `learn` are anomalous.
        source: which normal images the threshold is chosen from: `held_out`, or those of `learn`.
    """

    learn: frozenset[str]
    held_out: frozenset[str]
    anomalous: frozenset[str] = frozenset()
    source: Source = "held_out"


def choose_samples(
    shards: ShardSet, categories: list[str], options: SplitOptions, validate: bool = False, labels: bool = False
) -> tuple[TrainValSplit, str]:
    """Split the normal training images into those to learn from and held-out ones.

    Args:
        shards, categories, options: what to split, and how.
        validate: hold normals out whatever the source of the threshold, to validate with them.
        labels: learn from the anomalous training images, too; a category may then be without normal ones.

    Returns:
        The split, and why the threshold will promise less than is usual, or will not be there, or "".

    Raises:
        OptionError: the normals cannot support an explicitly given target rate.
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
    if not held_out and options.validation_fraction:
        ids, groups = [row["sample_id"] for row in train], [row["category"] for row in train]
        held_out = frozenset(hold_out(ids, groups, options.validation_fraction, options.seed))
    rest = [row for row in train if row["sample_id"] not in held_out]
    if options.few_shot is not None:
        ids, groups = [row["sample_id"] for row in rest], [row["category"] for row in rest]
        shots = few_shot(ids, groups, options.few_shot, options.seed)
        train = rest = [row for row in rest if row["sample_id"] in shots]
    source: Source = "held_out"
    if not validate:
        of_category = Counter(row["category"] for row in normals if row["sample_id"] in held_out)
        source = _source(of_category, train, any(row["split"] == "val" for row in normals), options)
    if source == LEFT_OUT:
        held_out, rest = frozenset(), train
    count = len(rest) if source == LEFT_OUT else len(held_out)
    notice = _shortage(count, source, len(train), options, validate)
    learn, anomalous = frozenset(row["sample_id"] for row in rest), _anomalous_shots(labelled, options)
    return TrainValSplit(learn | anomalous, held_out, anomalous, source), notice


def counted(count: int, noun: str) -> str:
    """Return a number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _source(
    held_out: Mapping[str, int], train: Sequence[Mapping[str, Any]], val: bool, options: SplitOptions
) -> Source:
    """Return which normal images the threshold of a memory bank is chosen from.

    Args:
        held_out: number of images held out, by category.
        train: rows of those that are in the bank where nothing is held out.
        val: whether the images held out are a "val" split.
        options: of the split.
    """
    if options.source != "auto":
        return options.source
    categories = {row["category"] for row in train}
    fewest = min(held_out.get(name, 0) for name in categories) if options.per_category else sum(held_out.values())
    if options.target_fpr is None:
        enough = supported_rate(fewest, options.confidence) == USUAL_FPR
    else:
        enough = fewest >= normals_needed(options.target_fpr, options.confidence)
    return "held_out" if enough or (val and sum(held_out.values()) >= len(train)) else LEFT_OUT


def _shortage(count: int, source: Source, train: int, options: SplitOptions, validate: bool) -> str:
    """Return what follows from the number of normal images a threshold is chosen from, or "" if they suffice.

    Args:
        count: that number.
        source: which images they are.
        train: number of normal images that leave-one-out would take.
        options: of the split.
        validate: see `choose_samples`.

    Raises:
        OptionError: they cannot support an explicitly given target rate.
    """
    target, confidence = options.target_fpr, options.confidence
    left_out = source == LEFT_OUT
    if left_out and count == 1:
        return "no threshold: by leave_one_out the bank needs a second normal image; add normal images"
    rate = supported_rate(count, confidence) if target is None else None
    needed = normals_needed(target or USUAL_FPR, confidence)
    if rate == USUAL_FPR or (target is not None and count >= needed):
        return ""
    named = counted(count, "normal image" if left_out else "held-out normal image")
    sure = f"at {100 * confidence:g} % confidence"
    if target is not None:
        best = f"they support {rounded_up(smallest_supported_rate(count, confidence)):g} at best, " if count else ""
        more = "" if left_out else " or --threshold.validation_fraction"
        if not left_out and not validate and train > count:
            more += f", take all {train} by --threshold.source {LEFT_OUT}"
        raise OptionError(
            f"{named} cannot support a false-positive rate of {target:g} {sure} ({best}{needed} are needed); leave "
            f"--threshold.target_fpr out for a threshold with the promise that they do support, raise it{more}, or add "
            f"normal images"
        )
    if not count:
        return (
            "no threshold: no normal image is held out to choose it from; raise --threshold.validation_fraction, or "
            "add normal images"
        )
    few = "is" if count == 1 else "are"
    if rate is None:
        enough = normals_needed(HIGHEST_PROMISED, confidence)
        return (
            f"the threshold promises nothing: {named} {few} too few, {enough} support a false-positive rate of "
            f"{HIGHEST_PROMISED:g} {sure}"
        )
    return (
        f"the threshold promises a false-positive rate of {rate:g}, since {named} {few} few; more of them support a "
        f"lower one, and --threshold.target_fpr asks for one, at a threshold at or near the highest of their scores"
    )


def held_out_record(shards: ShardSet, categories: list[str], options: SplitOptions) -> dict[str, Any]:
    """Return what a model's provenance keeps of how `choose_samples` holds normals out, so that later jobs can tell
    which."""
    val = shards.count(Selection(("val",), tuple(categories), (NORMAL,)))
    return {
        "split": "val" if val else "train",
        "fraction": None if val else options.validation_fraction,
        "seed": options.seed,
    }


def held_out_normals(
    provenance: Mapping[str, Any], listed: Iterable[Mapping[str, Any]], name: str, fraction: float | None = None
) -> frozenset[str]:
    """Return names of the normal images that a model's training held out, drawn again as it drew them.

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
    """Return the first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _anomalous_shots(rows: list[dict[str, Any]], options: SplitOptions) -> frozenset[str]:
    """Return names of the anomalous images to learn from: all, or of each category as many as of the normal ones at
    most."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row["sample_id"])
    return frozenset(name for names in groups.values() for name in hash_order(names, options.seed)[: options.few_shot])

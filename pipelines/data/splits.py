"""Which samples a method learns from, and which normal ones are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.options import SplitOptions
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot, hash_order, hold_out
from unianom.errors import DataError, OptionError
from unianom.thresholds import normals_needed, smallest_supported_rate

USUAL_FPR = 0.05


@dataclass(frozen=True)
class TrainValSplit:
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
    shards: ShardSet, categories: list[str], options: SplitOptions, validate: bool = False, labels: bool = False
) -> tuple[TrainValSplit, str]:
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
    if not held_out and options.validation_fraction:
        ids, groups = [row["sample_id"] for row in train], [row["category"] for row in train]
        held_out = frozenset(hold_out(ids, groups, options.validation_fraction, options.seed))
    rest = [row for row in train if row["sample_id"] not in held_out]
    learn = frozenset(row["sample_id"] for row in rest)
    if options.few_shot is not None:
        ids, groups = [row["sample_id"] for row in rest], [row["category"] for row in rest]
        learn = frozenset(few_shot(ids, groups, options.few_shot, options.seed))
    anomalous = _anomalous_shots(labelled, options)
    target, confidence = options.target_fpr, options.confidence
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
            return TrainValSplit(learn | anomalous, held_out, anomalous), notice
        held_out = frozenset()
        if options.few_shot is None and not any(row["split"] == "val" for row in normals):
            learn = frozenset(row["sample_id"] for row in train)
    return TrainValSplit(learn | anomalous, held_out, anomalous), notice


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

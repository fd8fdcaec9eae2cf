"""The images on which an exported file is compared with its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.image_source import SampleSource
from pipelines.data.splits import held_out_normals
from pipelines.runtime.stage_clock import StageClock
from pipelines.serving.options import GateOptions
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import hash_order
from unianom.data.synthesis import MIN_SIDE, cutpaste_patch, cutpaste_scar
from unianom.errors import DataError

UNSEEN, LEARNED = "held-out", "training"
LABELLED, SYNTHETIC = "labelled", "synthetic"


@dataclass(frozen=True)
class GateImages:
    """Prepared images, normal ones first.

    Attributes:
        pixels: N×S×S×3 uint8.
        label: N int8; 0 normal, 1 anomalous.
        category: N names.
        normals: which normal images these are: `UNSEEN`, or `LEARNED` where the model held none out.
        anomalies: `LABELLED`, of the "val" and "test" splits, or `SYNTHETIC` copies of the normal ones, by CutPaste.
    """

    pixels: np.ndarray
    label: np.ndarray
    category: list[str]
    normals: str
    anomalies: str

    def batches(self, size: int) -> Iterator[slice]:
        """Yield the images in batches, of which the first has a single one: a graph must take any number."""
        yield slice(0, 1)
        for start in range(1, len(self.pixels), size):
            yield slice(start, start + size)


def choose_gate_images(
    shards: ShardSet,
    description: Mapping[str, Any],
    policy: InputPolicy,
    options: GateOptions,
    limits: ImageLimits,
) -> GateImages:
    """Choose and read the images.

    Args:
        shards: where they lie.
        description: "categories" and "provenance" of the model.
        policy: how images become its input.
        options: how many.
        limits: what an image may cost.

    Raises:
        DataError: there is no normal image of the model's categories, or one cannot be read.
    """
    names, seen = normal_images(shards, description)
    normals = _read(shards, NORMAL, _even_shares(names, options.images, options.seed), policy, limits)
    categories = tuple(description["categories"])
    rows = shards.table(Selection(("val", "test"), categories, (ANOMALOUS,)), ["sample_id", "category"]).to_pylist()
    if rows:
        chosen = _even_shares(rows, options.images, options.seed)
        anomalies = _read(shards, ANOMALOUS, chosen, policy, limits)
    else:
        anomalies = [(_copy(pixels, number, options.seed), name) for number, (pixels, name) in enumerate(normals)]
    label = np.repeat(np.array([NORMAL, ANOMALOUS], np.int8), [len(normals), len(anomalies)])
    pixels, category = zip(*normals, *anomalies, strict=True)
    kinds = (LEARNED if seen else UNSEEN, LABELLED if rows else SYNTHETIC)
    return GateImages(np.stack(pixels), label, list(category), *kinds)


def choose_calibration_images(
    shards: ShardSet, description: Mapping[str, Any], policy: InputPolicy, options: GateOptions, limits: ImageLimits
) -> tuple[np.ndarray, list[str]]:
    """Choose and read normal images of the "train" split, N×S×S×3 uint8, with their categories: by them ranges of
    values are chosen, so they are others than those that are compared on, as far as the model held some out.

    Raises:
        DataError: as `choose_gate_images`.
    """
    rows = _normal_rows(shards, description, ("train",)) or _normal_rows(shards, description, ("val", "test"))
    chosen = _even_shares(rows, options.calibration_images, options.seed + 1)
    pixels, category = zip(*_read(shards, NORMAL, chosen, policy, limits), strict=True)
    return np.stack(pixels), list(category)


def normal_images(shards: ShardSet, description: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return sample_id and category of the normal images that a model has not learned from; all normal ones where it
    has learned from all, or where that cannot be told; and whether that is so.

    Raises:
        DataError: there is no normal image of its categories.
    """
    rows = _normal_rows(shards, description, ("train", "val", "test"))
    if not rows:
        raise DataError(
            f"{shards.uri} has no normal image of {', '.join(description['categories'])} to compare the file with the "
            f"model on; give the shards it was trained on"
        )
    made = description["provenance"]
    held_out: frozenset[str] = frozenset()
    own = (made.get("shards") or {}).get("digest") == shards.digest
    if own and made.get("held_out") and made["held_out"]["split"] == "train" and made.get("held_out_normals"):
        held_out = held_out_normals(made, [row for row in rows if row["split"] != "test"], "the model")
    unseen = [row for row in rows if row["split"] != "train" or row["sample_id"] in held_out]
    return unseen or rows, not unseen


def _normal_rows(shards: ShardSet, description: Mapping[str, Any], splits: tuple[str, ...]) -> list[dict[str, Any]]:
    selection = Selection(splits, tuple(description["categories"]), (NORMAL,))
    return shards.table(selection, ["sample_id", "category", "split"]).to_pylist()


def _even_shares(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> frozenset[str]:
    """Return names of an even share of every category, of at least one image each."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row["sample_id"])
    share = max(1, count // max(1, len(groups)))
    return frozenset(name for names in groups.values() for name in hash_order(names, seed)[:share])


def _read(
    shards: ShardSet, label: int, chosen: frozenset[str], policy: InputPolicy, limits: ImageLimits
) -> list[tuple[np.ndarray, str]]:
    """Read chosen images as S×S×3 uint8, each with its category."""
    source = SampleSource(shards, Selection(labels=(label,)), limits, chosen, ("category",))
    read, clock = source.open(batch_size=8, threads=1), StageClock()
    return [
        (sample.pixels, sample.row["category"])
        for within in source.ranges()
        for batch in read(within, policy, clock)
        for sample in batch
    ]


def _copy(pixels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return an anomalous copy of a normal image."""
    make = cutpaste_patch if number % 2 or len(pixels) < MIN_SIDE else cutpaste_scar
    return make(pixels, np.random.default_rng([seed, number])).image

"""The images that trainings are validated on and the settings of a campaign compared on, without test data: labelled
ones of the "val" split, or held-out normal images with synthetic anomalies.

Which setting is best on such images need not be best on real defects; how well the two agree is measured only after a
campaign has chosen (`jobs/tune.py --diagnose true`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.data.ahead import map_ahead
from pipelines.data.options import METRICS, AnomalyKind, ValidationOptions
from pipelines.data.reader import decode_row, refuse_row
from pipelines.data.timed_pool import TimedPool
from pipelines.runtime import outputs
from unianom import __version__, files
from unianom.configs.synthesis import SynthesisConfig
from unianom.data.image import ImageLimits, InputPolicy, decode_mask, prepare_mask
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import hash_order
from unianom.data.synthesis import Synthesiser, Synthetic, TextureSource, cutpaste_patch, cutpaste_scar, shade
from unianom.data.tensors import normalise
from unianom.errors import DataError
from unianom.metrics.curves import auroc, average_precision, operating_points
from unianom.options import to_plain

LABELLED, TESTED = "labelled", "test"
"""What takes a recipe's place where anomalous images are real, of the "val" or the test split."""

MOST_TEST_IMAGES = 4000
"""Images of the test split that a diagnosis looks at."""

ATTEMPTS = 10
"""How often a synthetic anomaly is made again that changed nothing."""


# ------------------------------------------------------------------------------------------------------------- building
@dataclass(frozen=True)
class ValidationImage:
    """An image to validate on.

    Attributes:
        sample_id: of the sample that it is, or is a copy of.
        category: its category.
        recipe: "normal", `LABELLED`, `TESTED`, or the kind of synthetic anomaly it was copied with.
        label: 0 normal, 1 anomalous.
        pixels: S×S×3 uint8.
        mask: S×S bool, true where it is anomalous; None where that is not known.
    """

    sample_id: str
    category: str
    recipe: str
    label: int
    pixels: np.ndarray
    mask: np.ndarray | None


AnomalyMaker = Callable[[np.ndarray, np.ndarray, np.random.Generator], Synthetic]
"""Makes an anomalous copy of a normal image, given another normal one and the generator that decides everything."""


def choose_validation_images(
    shards: ShardSet,
    categories: Sequence[str],
    held_out: frozenset[str],
    policy: InputPolicy,
    limits: ImageLimits,
    *,
    normals: int,
    anomalous: int | None,
    labelled: bool,
    makers: Mapping[str, AnomalyMaker],
    seed: int,
) -> list[ValidationImage]:
    """Choose held-out normal images, and anomalous ones: those of the "val" split, or synthetic copies of the normal
    ones. Training and campaigns validate on what this gives; no test image is read.

    Args:
        shards, categories: the corpus.
        held_out: sample_ids of normal images that nothing is learned from.
        policy: how images become input.
        limits: what an image may cost.
        normals: how many normal images, an even share of every category, but at least one of each.
        anomalous: how many labelled ones, likewise; None for all.
        labelled: whether anomalous images are those of the "val" split.
        makers: otherwise each makes a copy of every normal image, by the name of its kind.
        seed: of the choice and of the copies.

    Returns:
        The normal images in the order of the shards, then the anomalous ones. A copy in which nothing was changed is
        among them, labelled normal.

    Raises:
        DataError: an image cannot be read under these limits.
    """
    selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
    images = _read(shards, selection, _shares(shards, selection, held_out, normals, seed), "normal", policy, limits)
    if labelled:
        selection = Selection(("val",), tuple(categories), (ANOMALOUS,))
        chosen = None if anomalous is None else _shares(shards, selection, None, anomalous, seed)
        return images + _read(shards, selection, chosen, LABELLED, policy, limits)
    copies = []
    for kind, maker in makers.items():
        for number, image in enumerate(images):
            # names, not counts, decide, so that a kind more or less leaves the others as they are
            rng = np.random.default_rng([seed, number, *kind.encode()])
            made = maker(image.pixels, images[number - 1].pixels, rng)
            label = ANOMALOUS if made.mask.any() else NORMAL
            copies.append(ValidationImage(image.sample_id, image.category, kind, label, made.image, made.mask))
    return images + copies


def has_labelled(shards: ShardSet, categories: Sequence[str]) -> bool:
    """Return whether the "val" split holds anomalous images of these categories."""
    return shards.count(Selection(("val",), tuple(categories), (ANOMALOUS,))) > 0


def build_validation_set(
    shards: ShardSet,
    categories: Sequence[str],
    held_out: frozenset[str],
    policy: InputPolicy,
    options: ValidationOptions,
    limits: ImageLimits,
    folder: str,
) -> str:
    """Choose and make the images, or find them made.

    Args:
        shards, categories: the corpus.
        held_out: sample_ids of normal images that nothing is learned from.
        policy: how images become input.
        options: which images.
        limits: what an image may cost.
        folder: below which they are kept.

    Returns:
        URI of the set, for `ValidationSet`.

    Raises:
        DataError: there is nothing to compare on, an image cannot be read, or textures are missing.
    """
    labelled = options.labelled
    if labelled is None:
        labelled = has_labelled(shards, categories)
    elif labelled and not has_labelled(shards, categories):
        raise DataError(
            f'{shards.uri} has no anomalous image in a "val" split; leave out --validation.labelled, or ingest one'
        )
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "categories": list(categories),
        "held_out": sorted(held_out),
        "input": to_plain(policy),
        "options": {**to_plain(options), "labelled": labelled, "pixel_stride": None},
        "limits": to_plain(limits),
    }
    uri = files.join(folder, files.digest_of(plan)[:20])
    with outputs.open_cache(uri, "validation set", plan) as complete:
        if complete:
            return uri
        made = choose_validation_images(
            shards,
            categories,
            held_out,
            policy,
            limits,
            normals=options.normals,
            anomalous=None,
            labelled=labelled,
            makers={} if labelled else _makers(options, policy),
            seed=options.seed,
        )
        # a copy that changed nothing is no anomaly, and no further normal image either
        made = [image for image in made if image.label == ANOMALOUS or image.recipe == "normal"]
        for label, kind in ((NORMAL, "normal"), (ANOMALOUS, "anomalous")):
            missing = sorted(set(categories) - {image.category for image in made if image.label == label})
            if missing:
                raise DataError(
                    f"there is no {kind} image to compare settings on of category {', '.join(missing)}; leave the "
                    f"category out, raise --threshold.validation_fraction, or take --validation.labelled false"
                )
        _write(uri, made)
        return uri


def build_tests(
    shards: ShardSet, categories: Sequence[str], policy: InputPolicy, limits: ImageLimits, folder: str
) -> str:
    """Write the labelled test split in the form of validation images, for a diagnosis, and return its folder.

    Where the split has more than `MOST_TEST_IMAGES`, an even share of every category is taken.

    Args:
        shards, categories: the corpus.
        policy, limits, folder: as of `build_validation_set`.

    Raises:
        DataError: there are not both normal and anomalous test images.
    """
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "categories": list(categories),
        "input": to_plain(policy),
        "limits": to_plain(limits),
    }
    uri = files.join(folder, files.digest_of(plan)[:20])
    with outputs.open_cache(uri, "test set", plan) as complete:
        if complete:
            return uri
        made = []
        for label, kind in ((NORMAL, "normal"), (ANOMALOUS, TESTED)):
            selection = Selection(("test",), tuple(categories), (label,))
            if not shards.count(selection):
                raise DataError(
                    f"{shards.uri} has no {kind} image in a labelled test split, so nothing can be diagnosed"
                )
            chosen = _shares(shards, selection, None, MOST_TEST_IMAGES // 2, 0)
            made += _read(shards, selection, chosen, kind, policy, limits)
        _write(uri, made)
        return uri


def _shares(
    shards: ShardSet, selection: Selection, among: frozenset[str] | None, count: int, seed: int
) -> frozenset[str]:
    """Return names of selected samples, of those in `among`: an even share of every category, at least one of each."""
    groups: dict[str, list[str]] = {}
    for row in shards.table(selection, ["sample_id", "category"]).to_pylist():
        if among is None or row["sample_id"] in among:
            groups.setdefault(row["category"], []).append(row["sample_id"])
    share = max(1, count // max(1, len(groups)))
    return frozenset(name for names in groups.values() for name in hash_order(names, seed)[:share])


def _read(
    shards: ShardSet,
    selection: Selection,
    chosen: frozenset[str] | None,
    kind: str,
    policy: InputPolicy,
    limits: ImageLimits,
) -> list[ValidationImage]:
    """Read the images of one label, the chosen ones or all, with their masks; a normal image's mask marks nothing."""
    label = NORMAL if selection.labels == (NORMAL,) else ANOMALOUS

    def image(row: dict[str, Any]) -> ValidationImage:
        mask = None if label else np.zeros((policy.side, policy.side), bool)
        if label and row["mask"] is not None:
            mask = prepare_mask(decode_mask(row["mask"], limits=limits), policy)
            mask = mask if mask.any() else None  # the crop leaves the defect out
        pixels = decode_row(row, policy, limits)
        return ValidationImage(row["sample_id"], row["category"], kind, label, pixels, mask)

    rows = (
        row
        for part in shards.parts
        for batch in shards.read(part, selection, ["sample_id", "category", "image", "mask"])
        for row in batch.to_pylist()
        if chosen is None or row["sample_id"] in chosen
    )
    with TimedPool(1, limits) as pool:
        return list(map_ahead(pool, image, rows, 2, refuse_row))


def _makers(options: ValidationOptions, policy: InputPolicy) -> dict[str, AnomalyMaker]:
    """Return the makers of a campaign's synthetic anomalies, by kind."""
    try:
        textures = None if options.textures is None else TextureSource(options.textures, policy.side)
    except DataError as error:
        raise DataError(f"--validation.textures: {error}") from error
    draem = Synthesiser(SynthesisConfig(cutpaste_share=0, textures=options.textures, empty_retries=ATTEMPTS), textures)
    return {kind: partial(_copy, kind, draem) for kind in options.recipes}


def _copy(
    kind: AnomalyKind, draem: Synthesiser, pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator
) -> Synthetic:
    makers = {"cutpaste_patch": cutpaste_patch, "cutpaste_scar": cutpaste_scar, "shade": shade}
    for _ in range(ATTEMPTS):
        made = draem(pixels, rng, other) if kind == "texture" else makers[kind](pixels, rng)
        changed = (made.image != pixels).any(2)  # what is pasted may be what was there, such as black on black
        if changed.any():
            break
    return replace(made, mask=changed)


def _write(uri: str, images: Sequence[ValidationImage]) -> None:
    side = images[0].pixels.shape[0]
    files.write_array(files.join(uri, "pixels.npy"), np.stack([image.pixels for image in images]))
    nothing = np.zeros((side, side), bool)
    masks = np.stack([nothing if image.mask is None else image.mask for image in images])
    files.write_array(files.join(uri, "masks.npy"), masks)
    columns = ("sample_id", "category", "recipe", "label")
    rows = [{**{key: getattr(image, key) for key in columns}, "masked": image.mask is not None} for image in images]
    with files.open_atomic(files.join(uri, "images.parquet")) as handle:
        pq.write_table(pa.Table.from_pylist(rows), handle)
    kinds = [image.recipe for image in images]
    outputs.finish(uri, {"images": len(images), "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}})


# ------------------------------------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Measured:
    """How well a setting does.

    Attributes:
        objective: weighted mean of the metrics of the objective.
        metrics: each metric, a mean over recipes and categories; those of unions are of all categories as one.
        by_category: the objective for each category.
        by_recipe: the objective for each recipe.
    """

    objective: float
    metrics: dict[str, float]
    by_category: dict[str, float]
    by_recipe: dict[str, float]


Table = dict[tuple[str, str], dict[str, float]]
"""Metrics by category and recipe; the category of unions is ""."""


class ValidationSet:
    """A finished set of images.

    Args:
        uri: from `build_validation_set`.
        stride: see `ValidationOptions.pixel_stride`.

    Attributes:
        category, recipe: N text each.
        label: N int8.
        masked: N bool; whether it is known which pixels are anomalous.
    """

    def __init__(self, uri: str, stride: int = 1) -> None:
        table = pq.read_table(pa.BufferReader(files.read_bytes(files.join(uri, "images.parquet"))))
        self.uri, self.stride = uri, stride
        self.category = np.array(table["category"].to_pylist())
        self.recipe = np.array(table["recipe"].to_pylist())
        self.label = table["label"].to_numpy()
        self.masked = table["masked"].to_numpy()
        self.recipes = [name for name in dict.fromkeys(self.recipe.tolist()) if name != "normal"]
        self.categories = sorted(set(self.category.tolist()))

    def __len__(self) -> int:
        return len(self.category)

    @property
    def tells_pixels(self) -> bool:
        """Whether it is known of an anomalous image which of its pixels are."""
        return bool((self.masked & (self.label != NORMAL)).any())

    def check(self, objective: Mapping[str, float]) -> None:
        """Refuse an objective that these images cannot tell.

        Raises:
            DataError: it needs pixel metrics, and no anomalous image has a mask.
        """
        pixel = [name for name in objective if "pixel" in name]
        if pixel and not self.tells_pixels:
            raise DataError(
                f"the objective needs {pixel[0]}, but no anomalous validation image has a mask; choose another "
                f"--objective, or --validation.labelled false"
            )

    @cached_property
    def pixels(self) -> np.ndarray:
        """N×S×S×3 uint8."""
        return files.read_array(files.join(self.uri, "pixels.npy"))

    @cached_property
    def _masks(self) -> np.ndarray:
        """N×s×s bool, of every `stride`-th row and column."""
        return np.ascontiguousarray(self.thinned(files.read_array(files.join(self.uri, "masks.npy"))))

    def thinned(self, maps: np.ndarray) -> np.ndarray:
        """Return every `stride`-th row and column of N×S×S, beginning half a stride inside."""
        return maps[:, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]

    def batches(self, batch_size: int, policy: InputPolicy, device: torch.device) -> Iterator[torch.Tensor]:
        """Return B×3×S×S normalised images, in order."""
        for start in range(0, len(self), batch_size):
            yield normalise(list(self.pixels[start : start + batch_size]), policy).to(device)

    def image_table(self, scores: np.ndarray) -> Table:
        """Compute image AUROC and AP of N scores.

        Raises:
            DataError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} validation scores are not finite")
        table: Table = {}
        for category in ["", *self.categories]:
            for recipe in self.recipes:
                normal, anomalous = self._groups[category, recipe]
                if len(anomalous) and len(normal):
                    points = operating_points(scores[anomalous], np.sort(scores[normal]))
                    table[category, recipe] = {"image_auroc": auroc(points), "image_ap": average_precision(points)}
        return table

    def pixel_table(self, maps: np.ndarray, union: bool = False) -> Table:
        """Return pixel AUROC and AP of N×s×s maps, thinned like the masks; if `union`, of all categories as one too."""
        table: Table = {}
        for category in [*([""] if union else []), *self.categories]:
            for recipe in self.recipes:
                normal, anomalous = self._groups[category, recipe]
                rows = np.concatenate([normal, anomalous])
                rows = rows[self.masked[rows]]
                masks, values = self._masks[rows], maps[rows]
                if masks.any() and not masks.all():
                    points = operating_points(values[masks], np.sort(values[~masks]))
                    table[category, recipe] = {"pixel_auroc": auroc(points), "pixel_ap": average_precision(points)}
        return table

    @cached_property
    def _groups(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """Normal and anomalous images by category ("" for all) and recipe."""
        groups = {}
        for category in ["", *self.categories]:
            mine = np.ones(len(self), bool) if category == "" else self.category == category
            normal = np.flatnonzero(mine & (self.label == NORMAL))
            for recipe in self.recipes:
                groups[category, recipe] = (normal, np.flatnonzero(mine & (self.recipe == recipe)))
        return groups

    def resampled(self, rng: np.random.Generator) -> ValidationSet:
        """Return the same images with each kind of each category drawn anew, with replacement; for the tables."""
        drawn = copy.copy(self)
        groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for category in self.categories:
            normal = rng.choice(own, len(own)) if len(own := self._groups[category, self.recipes[0]][0]) else own
            for recipe in self.recipes:
                anomalous = self._groups[category, recipe][1]
                again = rng.choice(anomalous, len(anomalous)) if len(anomalous) else anomalous
                groups[category, recipe] = (normal, again)
        for recipe in self.recipes:
            parts = [groups[category, recipe] for category in self.categories]
            groups["", recipe] = (np.concatenate([n for n, _ in parts]), np.concatenate([a for _, a in parts]))
        drawn.__dict__["_groups"] = groups
        return drawn

    def measured(self, image: Table, pixel: Table, objective: Mapping[str, float]) -> Measured:
        """Return the value of the objective and its parts from both tables.

        Raises:
            DataError: a metric of the objective cannot be had from these images.
        """
        joined: Table = {}
        for key in [*image, *pixel]:
            joined[key] = {**image.get(key, {}), **pixel.get(key, {})}
        metrics = {}
        for name in METRICS:
            values = [row[name] for (category, _), row in joined.items() if category and name in row]
            if name.startswith("union_"):
                own = name.removeprefix("union_")
                values = [row[own] for (category, _), row in joined.items() if not category and own in row]
            if values:
                metrics[name] = float(np.mean(values))
        missing = [name for name in objective if name not in metrics]
        if missing:
            raise DataError(
                f"the objective needs {missing[0]}, which the validation images do not give (no anomalous image has a "
                f"mask); choose another --objective"
            )
        total = sum(objective.values())

        def weighted(rows: Sequence[Mapping[str, float]]) -> float | None:
            """Compute the objective over some rows, a union's metric as that of these rows; None if one is missing."""
            parts = []
            for name, weight in objective.items():
                values = [row[own] for row in rows if (own := name.removeprefix("union_")) in row]
                if not values:
                    return None
                parts.append(weight * float(np.mean(values)))
            return sum(parts) / total

        by_category = {
            c: value
            for c in self.categories
            if (value := weighted([row for (name, _), row in joined.items() if name == c])) is not None
        }
        by_recipe = {
            r: value
            for r in self.recipes
            if (value := weighted([row for (name, kind), row in joined.items() if name and kind == r])) is not None
        }
        value = sum(weight * metrics[name] for name, weight in objective.items()) / total
        return Measured(value, metrics, by_category, by_recipe)

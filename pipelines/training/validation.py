"""Validation during training: on held-out normals, and on the anomalous images of the "val" split or, where there are
none, on synthetic anomalies made of those normals. The test split is never read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from unianom.configs.synthesis import SynthesisConfig
from unianom.data.image import ImageLimits, decode_mask, decode_prepared, prepare_mask
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import hash_order
from unianom.data.synthesis import Synthesiser
from unianom.data.tensors import normalise
from unianom.methods import Method
from unianom.metrics.image import image_metrics
from unianom.metrics.pixel import pixel_metrics

PROGRESS, WORKERS = "progress", "workers"
"""What a training with a validator of its own reports besides its figures: the share of it that is done, in percent,
and the placement group of its workers."""


class Validator(Protocol):
    """Measures a method while it is trained."""

    def run(self) -> dict[str, float]:
        """Return figures of the method as it is now, by name."""

    def cache_outputs(self) -> None:
        """Keep what the trained method makes of the validation images, where anybody wants it."""


class ValidatorConfig(Protocol):
    """What a validator is made of in a training worker; pickled on the way there."""

    def make(self, method: Method, batch_size: int) -> Validator:
        """Return the validator of a method.

        Args:
            method: the method, on its device.
            batch_size: images in one forward pass.
        """


@dataclass(frozen=True)
class _Image:
    category: str
    pixels: np.ndarray
    label: int
    mask: np.ndarray | None


class Validation:
    """Scores validation images and compares with what is known of them.

    Args:
        shards, categories: the corpus.
        held_out: sample_ids of normal images that are not learned from.
        method: in whose input policy images come.
        synthesiser: makes anomalies where no labelled ones are at hand; None takes self-textures.
        count: images, half of them normal, an even share of every category, but at least one of each.
        batch_size: images in one forward pass.
        limits: what an image may cost.
        seed: of the choice of images and of the synthetic anomalies.
    """

    def __init__(
        self,
        shards: ShardSet,
        categories: list[str],
        held_out: frozenset[str],
        method: Method,
        synthesiser: Synthesiser | None,
        count: int,
        batch_size: int,
        limits: ImageLimits,
        seed: int,
    ) -> None:
        self._shards, self._categories, self._held_out = shards, categories, held_out
        self._method, self._synthesiser = method, synthesiser or Synthesiser(SynthesisConfig())
        self._count, self._batch_size, self._limits, self._seed = count, batch_size, limits, seed
        self._images: list[_Image] | None = None

    def cache_outputs(self) -> None:
        """Keep nothing: these images are for this training alone."""

    def run(self) -> dict[str, float]:
        """Image AUROC where there are both normal and anomalous images, and pixel AUROC and AP where there are masks,
        each a mean over categories; empty where nothing can be told."""
        if self._images is None:
            self._images = self._load()
        scores, maps = self._predict(self._images)
        rows = []
        for category in self._categories:
            mine = [n for n, image in enumerate(self._images) if image.category == category]
            labels = [self._images[n].label for n in mine]
            row: dict[str, float] = {}
            if len(set(labels)) == 2:
                row["image_auroc"] = image_metrics(scores[mine], labels)["image_auroc"]
            masks = {n: mask for n in mine if (mask := self._images[n].mask) is not None}
            if any(mask.any() for mask in masks.values()):
                pixel = pixel_metrics([maps[n] for n in masks], list(masks.values()))
                row |= {"pixel_auroc": pixel.auroc, "pixel_ap": pixel.ap}
            rows.append(row)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}

    def _predict(self, images: list[_Image]) -> tuple[np.ndarray, list[np.ndarray]]:
        scores: list[float] = []
        maps: list[np.ndarray] = []
        for start in range(0, len(images), self._batch_size):
            pixels = [image.pixels for image in images[start : start + self._batch_size]]
            with torch.inference_mode():
                prediction = self._method.predict(normalise(pixels, self._method.input).to(self._method.device))
            scores += prediction.score.float().cpu().tolist()
            maps += list(prediction.anomaly_map.float().cpu().numpy())
        return np.array(scores), maps

    def _load(self) -> list[_Image]:
        normals = Selection(("train", "val"), tuple(self._categories), (NORMAL,))
        images = self._read(normals, self._chosen(normals, self._held_out))
        anomalous = Selection(("val",), tuple(self._categories), (ANOMALOUS,))
        if self._shards.count(anomalous):
            return images + self._read(anomalous, self._chosen(anomalous, None))
        return images + [self._anomalous(image, number) for number, image in enumerate(images)]

    def _chosen(self, selection: Selection, among: frozenset[str] | None) -> set[str]:
        """Names of half the images: an even share of every category."""
        groups: dict[str, list[str]] = {}
        for row in self._shards.table(selection, ["sample_id", "category"]).to_pylist():
            if among is None or row["sample_id"] in among:
                groups.setdefault(row["category"], []).append(row["sample_id"])
        share = max(1, self._count // 2 // max(1, len(groups)))
        return {name for names in groups.values() for name in hash_order(names, self._seed)[:share]}

    def _read(self, selection: Selection, chosen: set[str]) -> list[_Image]:
        images = []
        policy = self._method.input
        for part in self._shards.parts:
            for batch in self._shards.read(part, selection, ["sample_id", "category", "label", "image", "mask"]):
                for row in batch.to_pylist():
                    if row["sample_id"] not in chosen:
                        continue
                    pixels = decode_prepared(row["image"], policy, self._limits)
                    mask = None if row["label"] else np.zeros((policy.side, policy.side), bool)
                    if row["mask"] is not None:
                        mask = prepare_mask(decode_mask(row["mask"], limits=self._limits), policy)
                        if row["label"] and not mask.any():
                            mask = None  # the crop leaves the defect out
                    images.append(_Image(row["category"], pixels, row["label"], mask))
        return images

    def _anomalous(self, image: _Image, number: int) -> _Image:
        rng = np.random.default_rng([self._seed, number])
        made = self._synthesiser(image.pixels, rng, image.pixels)
        return _Image(image.category, made.image, int(made.mask.any()), made.mask)

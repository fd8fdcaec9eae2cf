"""Validation during training: on held-out normals, and on the anomalous images of the "val" split or, where there are
none, on synthetic anomalies made of those normals. The test split is never read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from pipelines.data.validation_set import ValidationImage, choose_validation_images, has_labelled
from unianom.configs.synthesis import SynthesisConfig
from unianom.data.image import ImageLimits
from unianom.data.shards import ShardSet
from unianom.data.synthesis import Synthesiser, Synthetic
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
        self._images: list[ValidationImage] | None = None

    def cache_outputs(self) -> None:
        """Keep nothing: these images are for this training alone."""

    def run(self) -> dict[str, float]:
        """Compute the metrics, each a mean over categories; empty where nothing can be told.

        These are image AUROC where there are both normal and anomalous images, and pixel AUROC and AP where there are
        masks.
        """
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

    def _predict(self, images: list[ValidationImage]) -> tuple[np.ndarray, list[np.ndarray]]:
        scores: list[float] = []
        maps: list[np.ndarray] = []
        for start in range(0, len(images), self._batch_size):
            pixels = [image.pixels for image in images[start : start + self._batch_size]]
            with torch.inference_mode():
                prediction = self._method.predict(normalise(pixels, self._method.input).to(self._method.device))
            scores += prediction.score.float().cpu().tolist()
            maps += list(prediction.anomaly_map.float().cpu().numpy())
        return np.array(scores), maps

    def _load(self) -> list[ValidationImage]:
        labelled = has_labelled(self._shards, self._categories)
        return choose_validation_images(
            self._shards,
            self._categories,
            self._held_out,
            self._method.input,
            self._limits,
            normals=self._count // 2,
            anomalous=self._count // 2,
            labelled=labelled,
            makers={"": self._synthesise},
            seed=self._seed,
        )

    def _synthesise(self, pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Synthetic:
        return self._synthesiser(pixels, rng, pixels)  # its own texture

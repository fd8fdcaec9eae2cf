"""What trainings cache of the images they learn from: prepared pixels, masks, frozen features.

Rows are the images of `learnable`, in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.data.extractors import Arrays, BatchFunction, Extractor, ImageBatch, finite
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.runtime.models import input_policy, trained_method
from pipelines.runtime.options import RuntimeOptions
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.methods import Method
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.options import to_plain

PIXELS = "pixels"
"""Name of the array of prepared images, N×S×S×3 uint8."""

MASKS = "masks"
"""Name of the array of prepared masks beside the pixels, N×S×S bool."""

DESCRIPTOR = "descriptor"
"""Name of the array of descriptors, N×D float32: every frozen feature, averaged over its places."""


def normals(categories: list[str]) -> Selection:
    """Return the images that are prepared for methods that learn from normal images."""
    return Selection(("train", "val"), tuple(categories), (NORMAL,))


def learnable(categories: list[str], labels: bool) -> Selection:
    """Return the images that are prepared.

    Args:
        categories: of the model.
        labels: whether the method learns from anomalous images, too; only the "train" split has any to learn from.
    """
    return Selection(("train",), tuple(categories), (NORMAL, ANOMALOUS)) if labels else normals(categories)


@dataclass(frozen=True)
class PreparedPixels:
    """Images as input of a method. An `Extractor`.

    Attributes:
        input: how images become input.
        masks: whether masks are kept beside the pixels.
    """

    input: InputPolicy
    masks: bool = False

    def policy(self) -> InputPolicy:
        return self.input

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        def arrays(batch: ImageBatch, _: Arrays) -> Arrays:
            kept = {PIXELS: batch.pixels}
            if self.masks and batch.masks is not None:
                kept[MASKS] = batch.masks
            return kept

        return BatchFunction(self.input, arrays)


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of the frozen encoder of a trained method, and their descriptors. An `Extractor`.

    Attributes:
        model: folder of the method.
        half: keep features as float16 instead of float32.
    """

    model: str
    half: bool

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = trained_method(load(self.model))
        kind = "half precision; use --data.feature_precision full" if self.half else "float32; check weights"

        def network(images: Tensor) -> dict[str, Tensor]:
            features = method.frozen_features(images)
            means = [value.flatten(2).mean(2) for value in features.values()]  # each B C
            kept = {name: value.half() if self.half else value.float() for name, value in features.items()}
            return {DESCRIPTOR: torch.cat(means, dim=1).float(), **kept}

        def arrays(batch: ImageBatch, found: Arrays) -> Arrays:
            for name, values in found.items():
                if name != DESCRIPTOR:
                    finite(values, f"frozen features of {batch.part} are not finite in {kind}")
            return found

        return BatchFunction(method.input, arrays, network, method.device)


def prepare_pixels(
    shards: ShardSet,
    selection: Selection,
    policy: InputPolicy,
    folder: str,
    limits: ImageLimits,
    runtime: RuntimeOptions,
    masks: bool = False,
) -> CachedFeatures:
    """Prepare images, or find them prepared.

    Args:
        shards, selection: whose images; see `learnable`.
        policy: how images become input.
        folder: below which caches lie.
        limits: what an image may cost.
        runtime: actors.
        masks: keep masks beside the pixels.

    Raises:
        DataError: an image or mask cannot be read, or an anomalous image has no mask.
    """
    images = {"": SampleSource(shards, selection, limits, masks=masks)}
    cache = FeatureCache.below(folder, "features", images, {"input": to_plain(policy), "masks": masks})
    extractor: Extractor = PreparedPixels(policy, masks)
    cache.fill({"": extractor}, DECODED_AT_ONCE, runtime, "prepare images")
    return cache.open()


DECODED_AT_ONCE = 8
"""Images that are decoded and written at once where no network runs."""


def prepare_features(
    shards: ShardSet,
    categories: list[str],
    selection: Selection,
    method: TrainedMethod,
    weights: str | None,
    half: bool,
    folder: str,
    limits: ImageLimits,
    runtime: RuntimeOptions,
    batch_size: int,
) -> CachedFeatures:
    """Compute what the frozen encoder of a method makes of images, or find it computed.

    Args:
        shards, selection: whose images; see `learnable`.
        categories: of the model.
        method: whose features.
        weights: checksum of the file of its weights.
        half: keep them as float16 instead of float32.
        folder, limits, runtime: as of `prepare_pixels`.
        batch_size: images in one forward pass.

    Raises:
        DataError: features are not finite in the chosen precision, or an image cannot be read.
    """
    images = {"": SampleSource(shards, selection, limits)}
    computed: dict[str, Any] = {
        "input": to_plain(method.input),
        "encoder": {**method.feature_key(), "weights": weights},
        "half": half,
    }
    cache = FeatureCache.below(folder, "features", images, computed, runtime, batch_size)
    extractor: Extractor = FrozenFeatures(cache.encoder, half)
    cache.fill({"": extractor}, batch_size, runtime, "frozen features", lambda: Model(method, categories))
    files.remove(cache.encoder)  # as large as the method, and nothing reads it any more
    return cache.open()


def feature_names(features: CachedFeatures) -> tuple[str, ...]:
    """Return the names of the features among cached arrays; descriptors are none."""
    return tuple(name for name in features.manifest()["names"] if name != DESCRIPTOR)

"""Training batches: which images a step takes, and how they reach the network.

The order of images is a pure function of seed, epoch and number of workers, and whatever is random in making an image
(its prompt, flips and turns, synthetic anomaly) of seed, epoch and image. So a run continues at any step as if it had
not been interrupted, and neither the number of loading processes nor their timing changes a batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.data.feature_cache import CachedFeatures
from pipelines.data.reader import decode_row, decode_row_mask, refuse_row
from pipelines.data.timed_pool import TimedPool
from pipelines.training.augment import flip_and_turn
from pipelines.training.prepared import DESCRIPTOR, MASKS, PIXELS, learnable
from pipelines.training.sampler import EpochIndex, ReferenceSampler
from pipelines.training.samples import TrainingImages
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.shards import ShardSet
from unianom.data.synthesis import Synthesiser
from unianom.errors import ImageError, OptionError
from unianom.methods.trained import BatchSpec, TrainingBatch

# One for all shard images, so that they can be pickled: a batch is made ahead while validation asks for others.
_shared_lock = threading.Lock()

Decode = Callable[[dict[str, Any], InputPolicy, ImageLimits], np.ndarray]
"""Decodes an image or a mask of a row."""


# ---------------------------------------------------------------------------------------------------------- images
class ShardImages:
    """Prepared images decoded from the shards as they are asked for, a few row groups kept at a time.

    Args:
        shards, categories: where they lie.
        images: which.
        policy: how they become input.
        limits: what an image may cost.
        keep: row groups kept, encoded.
        labels: whether anomalous images are among them.
        masks: whether masks are asked for.
    """

    def __init__(
        self,
        shards: ShardSet,
        categories: list[str],
        images: TrainingImages,
        policy: InputPolicy,
        limits: ImageLimits,
        keep: int,
        labels: bool = False,
        masks: bool = False,
    ) -> None:
        self._shards, self._selection = shards, learnable(categories, labels)
        self._images, self._policy, self._limits, self._keep = images, policy, limits, keep
        self._columns = ["image", "sample_id", *(["mask", "label"] if masks else [])]
        self._pool: TimedPool | None = None
        self._first: dict[tuple[int, int], int] = {}
        self._groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def pixels(self, index: int) -> np.ndarray:
        """Return an image's pixels, S×S×3 uint8.

        Raises:
            DataError: it cannot be read, or takes too long; names the sample.
        """
        return self._decoded(decode_row, index)

    def mask(self, index: int) -> np.ndarray:
        """Return an image's mask, S×S bool; raises as `pixels`."""
        return self._decoded(decode_row_mask, index)

    def _decoded(self, decode: Decode, index: int) -> np.ndarray:
        row = self._row(index)
        with _shared_lock:
            if self._pool is None:
                self._pool = TimedPool(1, self._limits)
        try:
            return self._pool.submit(decode, row, self._policy, self._limits).result()
        except ImageError as error:
            refuse_row(row, error)

    def _row(self, index: int) -> dict[str, Any]:
        part, group = int(self._images.part[index]), int(self._images.group[index])
        with _shared_lock:
            rows = self._group(part, group)  # fills _first
        return rows[int(self._images.row[index]) - self._first[part, group]]

    def _group(self, part: int, group: int) -> list[dict[str, Any]]:
        if (part, group) not in self._groups:
            name = self._shards.parts[part]
            for before in range(group + 1):
                if (part, before) not in self._first:
                    ended = self._shards.read_group(name, before - 1, self._selection, ["sample_id"]) if before else []
                    self._first[part, before] = self._first.get((part, before - 1), 0) + len(ended)
            self._groups[part, group] = self._shards.read_group(name, group, self._selection, self._columns).to_pylist()
            while len(self._groups) > self._keep:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return self._groups[part, group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_pool": None}


class PreparedImages:
    """Prepared images from a cache."""

    def __init__(self, cached: CachedFeatures, images: TrainingImages) -> None:
        self._cached, self._images = cached, images

    def pixels(self, index: int) -> np.ndarray:
        """Return an image's pixels, S×S×3 uint8."""
        return self._cached.row(PIXELS, int(self._images.number[index]))

    def mask(self, index: int) -> np.ndarray:
        """Return an image's mask, S×S bool."""
        return self._cached.row(MASKS, int(self._images.number[index]))


class PreparedFeatures:
    """Frozen features from a cache.

    Args:
        cached: the cache.
        names: of the features.
        images: whose features.
    """

    def __init__(self, cached: CachedFeatures, names: Sequence[str], images: TrainingImages) -> None:
        self._cached, self._names, self._images = cached, names, images

    def features(self, index: int) -> dict[str, np.ndarray]:
        """Return the features of one image, by name."""
        number = int(self._images.number[index])
        return {name: self._cached.row(name, number) for name in self._names}


# --------------------------------------------------------------------------------------------------------- batches
class TrainingSet(Dataset[TrainingBatch]):
    """Makes batches from lists of places.

    Args:
        images: which images there are.
        categories: their names.
        needs: what the method's batches hold besides images.
        pixels: where prepared images come from; None where frozen features stand for them all.
        features: frozen features; None where they are not kept.
        references: for prompts and textures; None where no image needs one.
        synthesiser: makes synthetic anomalies; None for none.
        seed: of all that is random in making an image.

    Raises:
        ValueError: prompts or synthetic anomalies beside labels; both are made of normal images.
    """

    def __init__(
        self,
        images: TrainingImages,
        categories: list[str],
        needs: BatchSpec,
        pixels: ShardImages | PreparedImages | None,
        features: PreparedFeatures | None,
        references: ReferenceSampler | None,
        synthesiser: Synthesiser | None,
        seed: int,
    ) -> None:
        if needs.labels and (needs.prompts or needs.synthetic):
            raise ValueError("a method that needs labels can have neither prompts nor synthetic anomalies")
        self._images, self._categories, self._needs = images, categories, needs
        self._pixels, self._features = pixels, features
        self._references, self._synthesiser, self._seed = references, synthesiser, seed

    def __getitem__(self, places: Sequence[EpochIndex]) -> TrainingBatch:
        return self.batch(places)

    def batch(self, places: Sequence[EpochIndex], augment: bool = True) -> TrainingBatch:
        """Return the images at these places, with all that belongs to them; images are uint8 until `to_input`."""
        columns: dict[str, list[Any]] = defaultdict(list)
        for epoch, index in places:
            # the epoch of fixed batches is −1, which a seed may not be
            rng = np.random.default_rng([self._seed, epoch + 1, index, 1])
            for name, value in self._sample(index, rng, augment).items():
                columns[name].append(value)
        values: dict[str, Any] = {}
        for name, column in columns.items():
            if isinstance(column[0], int):
                values[name] = torch.tensor(column)
            elif isinstance(column[0], dict):
                values[name] = {key: torch.from_numpy(np.stack([row[key] for row in column])) for key in column[0]}
            else:
                values[name] = torch.from_numpy(np.stack(column))
        return TrainingBatch(**values)

    def _sample(self, index: int, rng: np.random.Generator, augment: bool) -> dict[str, Any]:
        sample: dict[str, Any] = {"category": int(self._images.category[index])}
        if self._needs.labels:
            sample["label"] = int(self._images.label[index])
        pixels = mask = None
        if self._pixels is not None:
            pixels = self._pixels.pixels(index)
            mask = self._pixels.mask(index) if self._needs.masks else None
            augmentation = self._needs.augmentation
            if augment and augmentation.active:
                pixels, mask = flip_and_turn(pixels, mask, self._categories[sample["category"]], augmentation, rng)
        if self._features is not None:
            sample["features"] = self._features.features(index)
        if pixels is not None and (self._features is None or self._needs.images):
            sample["images"] = _channels_first(pixels)
        if mask is not None:
            sample["mask"] = mask[None].astype(np.float32)
        if self._references is not None and self._needs.prompts is not None:
            prompt = self._references.prompt(index, rng)
            if self._features is not None:
                sample["prompt_features"] = self._features.features(prompt)
            elif self._pixels is not None:
                sample["prompt_images"] = _channels_first(self._pixels.pixels(prompt))
        synthesiser, references = self._synthesiser, self._references
        if synthesiser is not None and references is not None and self._pixels is not None and pixels is not None:
            other = self._pixels.pixels(references.other(index, rng))
            made = synthesiser(np.ascontiguousarray(pixels), rng, other)
            sample["synthetic_images"] = _channels_first(made.image)
            sample["synthetic_mask"] = made.mask[None].astype(np.float32)
        return sample


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def descriptors(cached: CachedFeatures, images: TrainingImages) -> np.ndarray:
    """Return N×D descriptors of images, from their cached frozen features."""
    return np.stack([cached.row(DESCRIPTOR, number) for number in images.number.tolist()])


def to_input(batch: TrainingBatch, device: torch.device, policy: InputPolicy) -> TrainingBatch:
    """Return a batch on its device, with images normalised and features in float32.

    Raises:
        OptionError: the policy has no mean and std.
    """
    if policy.mean is None or policy.std is None:
        raise OptionError("input.mean and input.std are not set; a method fills them in from its backbone")
    mean = torch.tensor(policy.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(policy.std, device=device).view(1, 3, 1, 1)

    def ready(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            return tensor.float().div_(255).sub_(mean).div_(std)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return batch.map(ready)

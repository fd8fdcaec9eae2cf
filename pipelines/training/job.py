"""One training as its workers get it: plain data, from which each makes the same method and batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.data.feature_cache import CachedFeatures
from pipelines.runtime.models import trained_method
from pipelines.training.dataset import PreparedFeatures, PreparedImages, ShardImages, TrainingSet, descriptors
from pipelines.training.options import TrainingOptions
from pipelines.training.sampler import ReferenceSampler
from pipelines.training.samples import TrainingImages
from pipelines.training.trainer import phase_configs
from pipelines.training.validation import ValidatorConfig
from unianom.data.shards import ShardSet
from unianom.data.synthesis import Synthesiser, TextureSource
from unianom.errors import DataError
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS
from unianom.methods.trained import BatchSpec, TrainedMethod
from unianom.options import from_plain


@dataclass(frozen=True)
class Segment:
    """A part of a training run.

    Attributes:
        start: file of the state that it goes on from; None for the beginning.
        end: step that it ends at.
        state: file for the state there.
    """

    start: str | None
    end: int
    state: str


@dataclass(frozen=True)
class Job:
    """Everything a worker is told; plain data, but for the shard set.

    Attributes:
        name, config: the method, and its options as plain data.
        shards, categories: the corpus.
        images: URI of the `TrainingImages`.
        held_out: sample_ids for validation.
        pixels, features: URIs of caches, or None.
        feature_names: arrays of the latter.
        iterations: of the run.
        output: where the trained model goes.
        options: the rest.
        validator: in a trial of a campaign, what it is compared on with others; None in other runs.
        segment: of population-based training, the part of the run to do; None for all.
    """

    name: str
    config: dict[str, Any]
    shards: ShardSet
    categories: list[str]
    images: str
    held_out: frozenset[str]
    pixels: str | None
    features: str | None
    feature_names: tuple[str, ...]
    iterations: int
    output: str
    options: TrainingOptions
    validator: ValidatorConfig | None = None
    segment: Segment | None = None

    @property
    def end(self) -> int:
        """The step to train up to."""
        return self.iterations if self.segment is None else self.segment.end

    def phases(self) -> list[tuple[int, Any]]:
        """Return the steps at which the method gets other options, and these options.

        Raises:
            OptionError: they cannot change while it is trained, or the method refuses them.
        """
        return phase_configs(self.make().config, self.options.phases, METHODS[self.name], self.iterations)

    def make(self) -> TrainedMethod:
        """Make the method with its initial weights, the same in every process."""
        return make_method(self.name, from_plain(METHODS[self.name].Config, self.config))

    def streams(self, method: TrainedMethod) -> bool:
        """Return whether images are decoded anew in every epoch."""
        return self.pixels is None and wants_pixels(method.batch_spec, self.features is not None)

    def data(self, method: TrainedMethod, copies: Path) -> tuple[TrainingSet, TrainingImages]:
        """Return the data set that makes the batches, and the training images in it."""
        images = TrainingImages.load(self.images)
        needs, options = method.batch_spec, self.options
        pixels: ShardImages | PreparedImages | None = None
        if self.pixels is not None:
            pixels = PreparedImages(CachedFeatures(self.pixels, copies), images)
        elif self.streams(method):
            pixels = ShardImages(
                self.shards,
                self.categories,
                images,
                method.input,
                options.limits,
                2 * options.data.window,
                needs.labels,
                needs.masks,
            )
        features = near = None
        if self.features is not None:
            cached = CachedFeatures(self.features, copies)
            features = PreparedFeatures(cached, self.feature_names, images)
            near = descriptors(cached, images) if needs.prompts == "nearest" else None
        references = None
        if needs.prompts or needs.synthetic:
            references = ReferenceSampler(images, isinstance(pixels, ShardImages), near)
        synthesiser = synthesiser_of(method)
        seed = method.config.training.seed
        return (
            TrainingSet(images, self.categories, needs, pixels, features, references, synthesiser, seed),
            images,
        )


def make_method(name: str, config: Any) -> TrainedMethod:
    """Make a trained method with its initial weights, the same in every process."""
    method_class = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        with memory_limit(f"--method: {name}"):
            method = method_class(config)
    return trained_method(method)


def wants_pixels(needs: BatchSpec, features: bool) -> bool:
    """Return whether batches need more than frozen features, or these are not kept."""
    return not features or needs.images or needs.masks or needs.synthetic is not None


def synthesiser_of(method: TrainedMethod) -> Synthesiser | None:
    """Return what makes a method's synthetic anomalies; None if it needs none.

    Raises:
        DataError: the folder of textures is missing or holds no image.
    """
    config = method.batch_spec.synthetic
    if config is None or config.textures is None:
        return None if config is None else Synthesiser(config)
    try:
        return Synthesiser(config, TextureSource(config.textures, method.input.side))
    except DataError as error:
        raise DataError(f"--method.synthesis.textures: {error}") from error

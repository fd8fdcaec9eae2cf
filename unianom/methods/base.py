"""What every method is: one interface, one kind of result, one registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from unianom import host
from unianom.backbones import weight_statistics
from unianom.configs import CONFIGS
from unianom.configs.backbone import BackboneConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.execution import CPU, Execution


class Prediction(NamedTuple):
    """The result of a method for B images.

    Attributes:
        anomaly_map: B×S×S float32 at input resolution; higher is more anomalous; on the method's own scale.
        score: B float32; the image score, on the method's own scale.
        raw_map: B×S×S float32; the anomaly map before its final smoothing; the map itself where nothing smooths it.
        embedding: B×C×h×w; the method's own embedding of the images, φ(x) in CADA. Each method says what it is.
    """

    anomaly_map: Tensor
    score: Tensor
    raw_map: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class ScoredImages:
    """The scores of B images, whose maps are computed only where they are wanted.

    Attributes:
        score: B float32; the image score, equal to the bit to that of `Prediction`.
        embedding: B×C×h×w, as in `Prediction`.
        predict_rows: the prediction of some of these images, by their numbers (int64, on the method's device).
    """

    score: Tensor
    embedding: Tensor
    predict_rows: Callable[[Tensor], Prediction]

    @classmethod
    def of(cls, prediction: Prediction) -> ScoredImages:
        """Return the scores of images that are predicted already."""
        return cls(
            prediction.score, prediction.embedding, lambda rows: Prediction(*(value[rows] for value in prediction))
        )


class RawOutputs(NamedTuple):
    """The output of a network for B images, before any option comes in that is cheap to choose otherwise.

    Attributes:
        tensors: by name, each B×… float32 or int64; small, grids and levels rather than maps of the input's size.
            Each method says which.
        embedding: B×C×h×w, as in `Prediction`.
    """

    tensors: dict[str, Tensor]
    embedding: Tensor


class MethodConfig(Protocol):
    """The options that every method has. Its config is a frozen dataclass, see `unianom.options.Options`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def input(self) -> InputPolicy:
        """How images become its input."""
        ...

    @property
    def backbone(self) -> BackboneConfig:
        """Its encoder."""
        ...


C = TypeVar("C", bound=MethodConfig)


class Method(nn.Module, Generic[C]):
    """A visual anomaly detection method.

    Subclasses set `name` and `Config`, and take one `Config` in their constructor.

    What comes after the network is apart from it, so that these options can be varied without running it again:
    `forward` runs it, `anomaly_maps` and `image_scores` make maps and scores of its raw outputs.

    Attributes:
        config: the frozen options, all resolved (no value left to a preset or a backbone).
        execution: how it is run.
        postprocess_options: dotted names of the options that act in `anomaly_maps` and `image_scores` and nowhere else.
        map_options: those of them that change the maps, and so maybe the score; the others change the score alone.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    postprocess_options: ClassVar[tuple[str, ...]] = ()
    map_options: ClassVar[tuple[str, ...]] = ()
    config: C
    execution: Execution = CPU

    @property
    def input(self) -> InputPolicy:
        """How images become this method's input."""
        return self.config.input

    @property
    def device(self) -> torch.device:
        """Where the method's parameters lie."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> RawOutputs:
        """Run the network on B×3×S×S normalised images that were checked."""
        raise NotImplementedError

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: C | None = None) -> tuple[Tensor, Tensor]:
        """Make anomaly maps of raw outputs, on the device they lie on.

        Args:
            tensors: raw outputs by name, see `RawOutputs`.
            config: options that differ from the method's own in `postprocess_options` only; None takes its own.

        Returns:
            `anomaly_map` and `raw_map` of `Prediction`.

        Raises:
            OptionError: the raw outputs do not suffice for these options.
        """
        raise NotImplementedError

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: C | None = None) -> Tensor:
        """Compute image scores, B.

        Args:
            tensors, config: as of `anomaly_maps`.
            anomaly_map: B×S×S, the first of what `anomaly_maps` returns for these raw outputs; the same for all options
                that are no `map_options`.

        Raises:
            OptionError: as `anomaly_maps`.
        """
        raise NotImplementedError

    def postprocess(self, raw_outputs: RawOutputs, config: C | None = None) -> Prediction:
        """Make the prediction of raw outputs; `config` and errors as of `anomaly_maps`."""
        anomaly_map, raw_map = self.anomaly_maps(raw_outputs.tensors, config)
        score = self.image_scores(raw_outputs.tensors, anomaly_map, config)
        return Prediction(anomaly_map, score, raw_map, raw_outputs.embedding)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """Predict B×3×S×S normalised images. The result does not depend on which images share a batch.

        An image that holds NaN or infinity is refused on the CPU. On other devices, where the host would have to wait
        to know of it, its score is NaN; `check_finite` tells once scores are fetched.

        Raises:
            OptionError: not a batch of this method's input.
            ModelError: the method is not fitted.
        """
        self.check_images(images)
        prediction = self.postprocess(self.forward(images))
        return prediction._replace(score=nan_where_not_finite(prediction.score, images))

    @torch.inference_mode()
    def score_images(self, images: Tensor) -> ScoredImages:
        """Score B×3×S×S normalised images: what `predict` gives, but maps only of images that are asked for.

        Raises:
            OptionError, ModelError: as `predict`.
        """
        return ScoredImages.of(self.predict(images))

    def size_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Give buffers whose size training decides the size they have in `state`, before that is loaded."""

    def check_images(self, images: Tensor) -> None:
        """Refuse what is not a batch of this method's input.

        Raises:
            OptionError: wrong shape or type, or, on the CPU, a value that is not finite.
        """
        side = self.input.side
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or images.dtype != torch.float32:
            given = f"{tuple(images.shape)} {images.dtype}"
            raise OptionError(f"{self.name} takes images of shape B×3×{side}×{side} float32, got {given}")
        if host.reads_at_once(images):
            self.check_finite(images)

    def check_finite(self, images: Tensor) -> None:
        """Refuse images with a value that is not finite. Reads from their device, for which the host waits.

        Raises:
            OptionError: there is such a value.
        """
        if not torch.isfinite(images.sum()):  # one pass; any NaN or infinity reaches the sum
            raise OptionError(f"{self.name} got images with NaN or infinite values; check decoding and mean/std")


def nan_where_not_finite(score: Tensor, images: Tensor) -> Tensor:
    """Return scores, B, with NaN for every image that holds NaN or infinity, whatever the network made of it; on the
    CPU, where `Method.check_images` refuses such images, the scores themselves."""
    if host.reads_at_once(images):
        return score
    return torch.where(images.sum((1, 2, 3)).isfinite(), score, torch.nan)


METHODS: dict[str, type[Method[Any]]] = {}
"""Every method by the name used on the command line and in model folders."""

M = TypeVar("M", bound=type[Method[Any]])


def register_method(name: str) -> Callable[[M], M]:
    """Make a method and its options known by `name`; a class decorator."""

    def register(cls: M) -> M:
        if name in METHODS:
            raise ValueError(f"two methods are named {name}")
        cls.name = name
        METHODS[name] = cls
        CONFIGS.setdefault(name, cls.Config)
        return cls

    return register


def with_statistics(config: C) -> C:
    """Return the config with the input's mean and std filled in from the backbone where they are null."""
    if config.input.mean is not None and config.input.std is not None:
        return config
    mean, std = weight_statistics(config.backbone)
    policy = dataclasses.replace(config.input, mean=config.input.mean or mean, std=config.input.std or std)
    return dataclasses.replace(config, input=policy)

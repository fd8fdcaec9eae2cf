"""What every method is: one interface, one registry."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from unianom.backbones import weight_statistics
from unianom.data.image import InputPolicy
from unianom.errors import ModelError, OptionError
from unianom.memory.index import MemoryBank


class Prediction(NamedTuple):
    """What a method says of B images.

    Attributes:
        anomaly_map: B×H×W float32 at input resolution; higher is more anomalous; raw, on the method's own scale.
        score: B float32; the image score, raw.
    """

    anomaly_map: Tensor
    score: Tensor


class Inspection(NamedTuple):
    """All that a method finds out about B images; what calibration needs besides the prediction.

    Attributes:
        anomaly_map, score: as in `Prediction`.
        unsmoothed: B×S×S float32; the anomaly map before its final smoothing; the map itself where nothing smooths it.
        features: B×C×h×w; the method's own embedding of the images, φ(x) in CADA. Each method says what it is.
    """

    anomaly_map: Tensor
    score: Tensor
    unsmoothed: Tensor
    features: Tensor


class Embedding(NamedTuple):
    """What a memory method makes of B images.

    Attributes:
        patches: B×N×D float32, row-major over the patch grid.
        keep: B×N bool; patches that enter the bank and count in scores.
    """

    patches: Tensor
    keep: Tensor


class Method(nn.Module):
    """A visual anomaly detection method.

    Subclasses set `name` and `Config`, and take one `Config` in their constructor.

    Attributes:
        config: the frozen options, all resolved (no value left to a preset or a backbone).
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    config: Any

    @property
    def input(self) -> InputPolicy:
        """How images become this method's input."""
        return self.config.input

    @property
    def device(self) -> torch.device:
        """Where the method's parameters lie."""
        return next(self.parameters()).device

    def inspect(self, images: Tensor) -> Inspection:
        """Maps, scores and embeddings of B×3×S×S normalised images that were checked. The result does not depend on
        which images share a batch."""
        raise NotImplementedError

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """Anomaly maps and image scores of B×3×S×S normalised images. The result does not depend on which images share
        a batch.

        Raises:
            OptionError: not a batch of this method's input.
            ModelError: the method is not fitted.
        """
        self.check_images(images)
        found = self.inspect(images)
        return Prediction(found.anomaly_map, found.score)

    def size_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Before weights are loaded: give buffers whose size training decides the size they have in `state`."""

    def check_images(self, images: Tensor) -> None:
        """Refuse what is not a batch of this method's input.

        Raises:
            OptionError: wrong shape or type, or a value that is not finite.
        """
        side = self.input.side
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or images.dtype != torch.float32:
            given = f"{tuple(images.shape)} {images.dtype}"
            raise OptionError(f"{self.name} takes images of shape B×3×{side}×{side} float32, got {given}")
        if not torch.isfinite(images.sum()):  # one pass; any NaN or infinity reaches the sum
            raise OptionError(f"{self.name} got images with NaN or infinite values; check decoding and mean/std")


class MemoryMethod(Method):
    """A training-free method: it embeds images, and fitting it is building a bank of normal patches."""

    bank: MemoryBank | None = None

    def embed(self, images: Tensor) -> Embedding:
        """Patches of B×3×H×W normalised images, and which of them count."""
        raise NotImplementedError

    def embed_for_bank(self, images: Tensor) -> Embedding:
        """As `embed`, for images that go into the bank; methods whose published code treats them otherwise override."""
        return self.embed(images)

    def score_patches(self, embedding: Embedding) -> Inspection:
        """Maps and scores from patches: search in the bank, then the method's own scoring."""
        raise NotImplementedError

    def patch_distances(self, embedding: Embedding) -> Tensor:
        """Mean squared distance of each patch to its `neighbours` nearest vectors of the bank, B×N float32; 0 where the
        patch is not kept.

        Raises:
            ModelError: there is no bank.
        """
        distances = torch.zeros(embedding.keep.shape, device=embedding.keep.device)
        queries = embedding.patches[embedding.keep]  # M D
        if len(queries):
            found, _ = self.require_bank().search(queries.float().cpu().numpy(), self.config.neighbours)  # M k
            distances[embedding.keep] = torch.from_numpy(found).mean(1).to(distances.device)
        return distances

    def inspect(self, images: Tensor) -> Inspection:
        return self.score_patches(self.embed(images))

    def require_bank(self) -> MemoryBank:
        """The bank, or an error that says how to get one."""
        if self.bank is None:
            raise ModelError(f"{self.name} has no memory bank yet; fit it with jobs/train.py {self.name}")
        return self.bank


METHODS: dict[str, type[Method]] = {}
"""Every method by the name used on the command line and in model folders."""

M = TypeVar("M", bound=type[Method])


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by `name`."""

    def register(cls: M) -> M:
        if name in METHODS:
            raise ValueError(f"two methods are named {name}")
        cls.name = name
        METHODS[name] = cls
        return cls

    return register


def resolve_preset(config: Any, presets: dict[str, dict[str, Any]]) -> None:
    """Fill the fields of a frozen config that are None with the values of its preset, once the types and choices of
    all options are checked; called in `__post_init__`.

    Raises:
        OptionError: a value of another type than its option's, or not among its choices.
    """
    check_values(config)
    for field in dataclasses.fields(config):
        if getattr(config, field.name) is None and field.name in presets[config.preset]:
            object.__setattr__(config, field.name, presets[config.preset][field.name])


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse values that are not of their option's type or among its choices, in nested configs too.

    Raises:
        OptionError: there is one; names it.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise OptionError(f"{prefix}{field.name}={value!r} must be {_in_words(hint)}")
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{field.name}.")


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if kind is Literal:
        return value in inner
    if kind is tuple:
        each = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint in (int, float):  # a bool is an int to Python, and an int will do for a float
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def with_statistics(config: Any) -> Any:
    """The config with the input's mean and std filled in from the backbone where they are null."""
    if config.input.mean is not None and config.input.std is not None:
        return config
    mean, std = weight_statistics(config.backbone)
    policy = dataclasses.replace(config.input, mean=config.input.mean or mean, std=config.input.std or std)
    return dataclasses.replace(config, input=policy)

"""What every trained method is: its batches, its losses, its optimisers.

The training pipeline knows a method only through this file, so a training loop of one's own needs no more:

    method.train()
    for batch in batches:
        loss = method.training_loss(batch)["loss"]
        …
    method.finalize(some_batches, categories)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from unianom.configs.synthesis import SynthesisConfig
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.methods.base import Method, MethodConfig
from unianom.options import to_plain

LOSS = "loss"
"""Key of the total among the losses of `training_loss`."""

FeatureMaps = dict[str, Tensor]
"""Frozen features by name, each B×…; what they are is the method's own business."""


@dataclass(frozen=True)
class BatchSpec:
    """What the training pipeline has to put into a method's batches besides its images.

    Attributes:
        synthetic: makes one pseudo-anomalous copy of every image; None for none.
        prompts: another normal image for every image: a random one of its "category", or, where categories are not
            known, one of those with the "nearest" frozen features; None for none.
        augmentation: flips and turns.
        images: whether images come along even where frozen features are kept.
        labels: whether anomalous images of the "train" split are learned from, too; the batch tells which they are.
        masks: whether masks come along; they need `labels`.
        repeats: successive steps that take the same batch.
    """

    synthetic: SynthesisConfig | None = None
    prompts: Literal["category", "nearest"] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    images: bool = False
    labels: bool = False
    masks: bool = False
    repeats: int = 1


@dataclass
class TrainingBatch:
    """One worker's share of a step.

    Attributes:
        category: B int64, index into the model's categories.
        images: B×3×S×S normalised images, normal ones unless the method needs labels; None where `features` stand for
            them.
        features: the frozen features of `images`, computed earlier; None where they were not kept.
        synthetic_images: B×3×S×S, the pseudo-anomalous copies; None where the method needs none.
        synthetic_mask: B×1×S×S float32 of 0 and 1; 1 where the copy was changed.
        prompt_images, prompt_features: as `images` and `features`, of the prompts.
        label: B int64, 0 normal, 1 anomalous; None where the method needs no labels.
        mask: B×1×S×S float32 of 0 and 1; 1 where `images` are anomalous; None where the method needs no masks.
    """

    category: Tensor
    images: Tensor | None = None
    features: FeatureMaps | None = None
    synthetic_images: Tensor | None = None
    synthetic_mask: Tensor | None = None
    prompt_images: Tensor | None = None
    prompt_features: FeatureMaps | None = None
    label: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.category)

    def required(self, name: str) -> Tensor:
        """Return the tensor of this name.

        Raises:
            ValueError: the batch has none, though the method asks for it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the batch has no {name}; the method's batch_spec says what its batches hold")
        return value

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainingBatch:
        """Return the batch with a function applied to every tensor."""
        values: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, dict):
                values[one.name] = {key: function(tensor) for key, tensor in value.items()}
            elif value is not None:
                values[one.name] = function(value)
        return TrainingBatch(**values)

    def pin_memory(self) -> TrainingBatch:
        """Return the batch in page-locked memory, from which GPUs copy faster."""
        return self.map(lambda tensor: tensor.pin_memory())

    def split(self, parts: int) -> Sequence[TrainingBatch]:
        """Split the batch into so many parts, as even as can be."""
        bounds = [len(self) * part // parts for part in range(parts + 1)]
        return [self.map(partial(_slice, start, end)) for start, end in pairwise(bounds) if end > start]


def _slice(start: int, end: int, tensor: Tensor) -> Tensor:
    return tensor[start:end]


@dataclass(frozen=True)
class ScheduledOptimizer:
    """An optimiser with its schedule, stepped together once per iteration.

    Attributes:
        optimiser: over some of the method's parameters.
        schedule: its learning rate by iteration.
        period: iterations of a period; None for none.
        forget: whether every period but the first begins with the optimiser's moments at zero.
        rest: iterations at the beginning of every period but the first in which its parameters stay as they are.
    """

    optimiser: Optimizer
    schedule: LRScheduler
    period: int | None = None
    forget: bool = False
    rest: int = 0

    def step(self, number: int) -> None:
        """Take step `number`, counted from 0, with the gradients that its parameters hold."""
        inside = None if self.period is None or number < self.period else number % self.period
        if self.forget and inside == 0:
            self.optimiser.state.clear()
        if inside is None or inside >= self.rest:
            self.optimiser.step()
        self.schedule.step()


class TrainedConfig(MethodConfig, Protocol):
    """The options that every trained method has."""

    @property
    def training(self) -> TrainingConfig:
        """Length, batches and optimiser."""
        ...


T = TypeVar("T", bound=TrainedConfig)


class TrainedMethod(Method[T]):
    """A method whose networks learn from batches of normal images."""

    schedulable_options: ClassVar[tuple[str, ...]] = ("training.learning_rate", "training.weight_decay")
    """Dotted names of the options that may change while it is trained: what optimisers and losses read at every
    step."""

    finish_images: ClassVar[int] = 0
    """How many training images `finalize` wants to see; 0 where it is not needed."""

    @property
    def batch_spec(self) -> BatchSpec:
        """Contents of its batches."""
        return BatchSpec()

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Compute what does not change during training: the frozen encoder's features of B×3×S×S normalised images,
        float32, without gradients."""
        raise NotImplementedError

    def feature_key(self) -> dict[str, Any]:
        """Return everything `frozen_features` depends on, weights files by name, as plain data; methods with equal keys
        share kept features. As it is here, the config also has `taps`."""
        config: Any = self.config
        return {"method": self.name, "backbone": to_plain(config.backbone), "taps": list(config.taps)}

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return scalar losses of a batch, each a mean over its images; the one to minimise under "loss"."""
        raise NotImplementedError

    def on_step_start(self, step: int, iterations: int) -> None:
        """Prepare for training step `step`, counted from 0, of so many: the place of what follows a schedule besides
        the learning rate."""

    def optimizers(self, iterations: int) -> list[ScheduledOptimizer]:
        """Make the optimisers of a run of so many iterations: one over all that learns, with stepped decay."""
        return [self.optimisation([p for p in self.parameters() if p.requires_grad], iterations)]

    def optimisation(self, parameters: Iterable[Any], iterations: int, **periods: Any) -> ScheduledOptimizer:
        """Make an optimiser as `config.training` has it, with stepped decay.

        Args:
            parameters: parameters, or groups of them with learning rates of their own.
            iterations: of the whole run.
            periods: see `ScheduledOptimizer`.
        """
        training = self.config.training
        kind = AdamW if training.optimiser == "adamw" else Adam
        optimiser = kind(
            parameters,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.eps,
            weight_decay=training.weight_decay,
            amsgrad=training.amsgrad,
        )
        milestones = [round(share * iterations) for share in training.decay_at]
        return ScheduledOptimizer(optimiser, MultiStepLR(optimiser, milestones, training.decay), **periods)

    def finalize(self, batches: Iterable[TrainingBatch], categories: Sequence[str]) -> None:
        """Fix what prediction needs besides weights, from `finish_images` training images, as many of every category
        as can be; called before each validation and after the last step, in evaluation mode.

        Args:
            batches: as for training, but not augmented; the same ones at every call.
            categories: names of what `TrainingBatch.category` counts.
        """

    def features_of(self, batch: TrainingBatch) -> FeatureMaps:
        """Return the frozen features of a batch, computed now unless they were kept."""
        return self.frozen_features(batch.required("images")) if batch.features is None else batch.features

    def prompt_features_of(self, batch: TrainingBatch) -> FeatureMaps:
        """Return the frozen features of a batch's prompts, computed now unless they were kept."""
        if batch.prompt_features is not None:
            return batch.prompt_features
        return self.frozen_features(batch.required("prompt_images"))

"""Length, batches, optimiser and augmentation of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from unianom.options import (
    AtLeastOne,
    NotNegative,
    OpenShare,
    Options,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    ValueRefused,
)


@dataclass(frozen=True)
class Augmentation(Options):
    """Random flips and turns of training images and their masks, by category.

    Args:
        horizontal, vertical: categories whose images are mirrored; "*" for all.
        turns: categories whose images are turned by 0, 90, 180 or 270 degrees; "*" for all.
        probability: of each mirroring.
        rotation: degrees; every image is turned about its centre by an angle drawn evenly between minus and plus this,
            and filled with black.
    """

    horizontal: tuple[str, ...] = ()
    vertical: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    probability: Share = 0.3
    rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0

    @property
    def active(self) -> bool:
        """Whether any image is ever changed; if so, frozen features cannot be kept."""
        return bool(self.horizontal or self.vertical or self.turns or self.rotation)


@dataclass(frozen=True)
class TrainingConfig(Options):
    """Length, batches and optimiser of a training run.

    Args:
        epochs: passes over the training images; converted to iterations.
        iterations: steps; takes the place of `epochs` if given.
        batch_size: images of a step, over all workers together.
        optimiser: "adamw", or "adam", whose weight decay is an L2 penalty.
        learning_rate, weight_decay, betas, eps, amsgrad: of the optimiser.
        decay_at: shares of the run after which the learning rate is multiplied by `decay`.
        decay: that factor.
        clip_norm: largest gradient norm; null for no clipping.
        seed: of initial weights, order of images, dropout, noise and synthetic anomalies.
    """

    usual: ClassVar[tuple[str, ...] | None] = ("epochs", "batch_size", "learning_rate")

    epochs: Positive = 1000
    iterations: AtLeastOne | None = None
    batch_size: AtLeastOne = 64
    optimiser: Literal["adamw", "adam"] = "adamw"
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 1e-4
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    amsgrad: bool = False
    decay_at: tuple[OpenShare, ...] = (0.8,)
    decay: PositiveShare = 0.1
    clip_norm: Positive | None = 0.1
    seed: int = 133

    def check(self) -> None:
        if list(self.decay_at) != sorted(self.decay_at):
            raise ValueRefused(f"decay_at={self.decay_at} must be in ascending order")

    def steps(self, images: int, repeats: int = 1) -> int:
        """Return the iterations of the whole run on so many training images; each batch serves for `repeats` steps."""
        return self.iterations or max(1, round(self.epochs * images / self.batch_size) * repeats)

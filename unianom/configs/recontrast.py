"""Options of ReContrast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig, check_side
from unianom.configs.training import TrainingConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.options import (
    AtLeastOne,
    AtLeastZero,
    NotNegative,
    OpenShare,
    Options,
    Positive,
    Share,
    ValueRefused,
)


@dataclass(frozen=True)
class ReContrastTraining(TrainingConfig):
    """Length, batches and optimisers: one for the encoder, one for bottleneck and decoder.

    Args:
        epochs: passes over the training images; they count where `iterations` is null.
        iterations: steps; they take the place of `epochs`, published are 2000 (MVTec AD).
        batch_size: images of a step, over all workers together.
        optimiser: "adamw", or "adam", whose weight decay is an L2 penalty.
        learning_rate: of bottleneck and decoder.
        weight_decay, betas, eps, amsgrad: of both optimisers.
        decay_at: shares of the run after which the learning rates are multiplied by `decay`.
        decay: that factor.
        clip_norm: largest gradient norm; null for no clipping.
        seed: of initial weights, order of images and all else that is drawn.
        encoder_learning_rate: of the trained encoder.
        reset_every: iterations after which the optimiser of bottleneck and decoder forgets its moments, again and
            again; 0 for never. Published for the stable variant: 500.
        encoder_rest: iterations after each such reset in which the encoder's weights stay as they are; 100.
    """

    usual = ("iterations", "batch_size", "learning_rate")

    iterations: AtLeastOne | None = 2000
    batch_size: AtLeastOne = 16
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 1e-5
    decay_at: tuple[OpenShare, ...] = ()
    clip_norm: Positive | None = None
    seed: int = 111
    encoder_learning_rate: NotNegative = 1e-5
    reset_every: AtLeastZero = 0
    encoder_rest: AtLeastZero = 0

    def check(self) -> None:
        super().check()
        if self.encoder_rest > self.reset_every:
            raise ValueRefused(f"encoder_rest={self.encoder_rest} must be at most reset_every={self.reset_every}")


@dataclass(frozen=True)
class ReContrastConfig(Options):
    """Reverse distillation whose encoder learns, too (ReContrast); the defaults are the published ones for a model for
    each category of MVTec AD.

    Args:
        preset: "paper" or "reference" (the released code); text and released code do not differ. What the
            code has besides, for stability and for a model for all categories, is options that the recipes set.
        backbone: a timm ResNet, whose blocks bottleneck and decoder mirror; published: Wide-ResNet-50-2 with
            torchvision's first weights. Any other pyramid gets those of a ResNet-18 with its own channels.
        input: published: stretched to 256 pixels, a multiple of 32; its code has mask_resize "bilinear_any".
        training: length, batches, optimisers.
        encoder_norm: batch norm of the trained encoder takes a batch's statistics in training ("train") or keeps those
            of its weights ("eval"); published: "eval" for some categories and for a model for all.
        norm_guard: where a channel's variance in a batch is below this and below that of the weights, the trained
            encoder's batch norm takes the smaller of these two; 0 for never. Stable variant: 0.0005.
        norm_eps: of the trained encoder's batch norm; 0 leaves it as it is. Stable variant: 0.000001.
        activation: of the decoder: "relu", or "gelu" (a model for all categories).
        mining: a at the start and at the end. A position is learned from where its distance is at least the mean plus
            a standard deviations of those of the batch.
        mining_ramp: share of the run in which a goes from one to the other. Stable variant: 0.2.
        map: from distances to map and score; published for a model for all categories: mean, box, 0.01.
    """

    usual = ("preset", "backbone", "input", "training")

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("wide_resnet50_2.tv_in1k"))
    input: InputPolicy = field(default_factory=lambda: InputPolicy(resize="stretch", size=256, crop=None))
    training: ReContrastTraining = field(default_factory=ReContrastTraining)
    encoder_norm: Literal["train", "eval"] = "train"
    norm_guard: NotNegative = 0.0
    norm_eps: NotNegative = 0.0
    activation: Literal["relu", "gelu"] = "relu"
    mining: tuple[float, float] = (-3.0, 1.0)
    mining_ramp: Share = 0.1
    map: DistanceMapConfig = field(default_factory=DistanceMapConfig)

    def check(self) -> None:
        check_side(self.input.side)
        if self.norm_guard and self.encoder_norm == "eval":
            raise OptionError("norm_guard is for a batch's statistics; set encoder_norm=train, or norm_guard=0")

"""Options of RevDist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig, check_side
from unianom.configs.training import TrainingConfig
from unianom.data.image import InputPolicy
from unianom.options import Options

PRESETS: dict[str, dict[str, Any]] = {"paper": {"loss": "positions"}, "reference": {"loss": "flattened"}}
"""Where text and released code differ.

- loss: the text averages distances over the positions of a level (eqs. 1 and 2); the code takes a whole level of an
  image for one vector, as ReContrast and CADA say of it, too.
"""


def one_class_training() -> TrainingConfig:
    """Return the published training options of one model for each category."""
    return TrainingConfig(
        epochs=200,
        batch_size=16,
        optimiser="adam",
        learning_rate=5e-3,
        weight_decay=0.0,
        betas=(0.5, 0.999),
        decay_at=(),
        clip_norm=None,
        seed=111,
    )


@dataclass(frozen=True)
class RevDistConfig(Options):
    """Reverse distillation from a frozen encoder (RevDist, known as RD4AD); the defaults are the published ones for a
    model for each category.

    Args:
        preset: "paper" or "reference" (the released code); fills what is left null below.
        backbone: a timm ResNet, whose blocks bottleneck and decoder mirror; published: Wide-ResNet-50-2 with
            torchvision's first weights. Any other pyramid gets those of a ResNet-18 with its own channels.
        input: published: stretched to 256 pixels, a multiple of 32; its code has mask_resize "bilinear_half".
        training: length, batches, optimiser. A model for all categories learns as CADA says, which the recipes set.
        activation: of the decoder: "relu", or "gelu" (CADA, a model for all categories).
        loss: distance of two levels: mean over "positions", or of levels "flattened" to one vector.
        map: from distances to map and score; published for a model for all categories: mean, box, 0.01.
    """

    usual = ("preset", "backbone", "input", "training")

    presets = PRESETS

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("wide_resnet50_2.tv_in1k"))
    input: InputPolicy = field(default_factory=lambda: InputPolicy(resize="stretch", size=256, crop=None))
    training: TrainingConfig = field(default_factory=one_class_training)
    activation: Literal["relu", "gelu"] = "relu"
    loss: Literal["positions", "flattened"] = "positions"
    map: DistanceMapConfig = field(default_factory=DistanceMapConfig)

    def check(self) -> None:
        check_side(self.input.side)

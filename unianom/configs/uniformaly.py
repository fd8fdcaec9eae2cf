"""Options of UniFormaly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig, BlurSigma
from unianom.data.image import InputPolicy
from unianom.options import AtLeastOne, Odd, Options, PositiveShare, ShareBelowOne

PRESETS = {
    "paper": {"attention_block": -1, "mask_scope": "image"},
    "reference": {"attention_block": 9, "mask_scope": "batch"},
}
"""Where text and released code differ. The text masks by the last block's attention; the code by block 9 (the last
one it taps), normalised by the maximum over the batch (its one-class scripts run batches of one, where that is the
image). Batch scope makes a score depend on what shares its batch, so only "reference" has it."""


@dataclass(frozen=True)
class UniFormalyConfig(Options):
    """A memory bank of vision transformer patches (UniFormaly); the defaults are the published ones.

    Args:
        preset: "paper" or "reference" (the released code); fills what is left null below.
        backbone: a vision transformer; published: DINO ViT-B/8, iBOT ViT-B/16.
        input: published: shorter side 256, centre crop 224; for CIFAR stretch to 112 and pad to 224.
        bank: coreset and index; published ratios: 0.1 (MVTec AD, BTAD, tiles, castings one-class), 0.05 (MVTec
            multi-class, CIFAR), 0.01 (ImageNet-30, Species-60).
        blocks: 0-based transformer blocks whose outputs are patches (no final norm).
        aggregation: "mean" over blocks, or "concat".
        attention: "cls" attention, or "rollout" for supervised transformers.
        attention_block: block of the CLS attention; negative counts from the last.
        mask: "binary" back-patch masking, "soft" weighting of patches by their attention (an ablation), or "off".
        mask_kernel: smoothing window of the attention in patches (eq. 1); odd, 1 leaves it raw.
        mask_threshold: attention above this share of its maximum keeps a patch.
        mask_scope: maximum over the "image", or over the "batch".
        neighbours: bank vectors averaged in a patch's distance.
        k_ratio: share of an image's patches whose mean distance is its score (eq. 2).
        blur_sigma: Gaussian blur of the anomaly map, in pixels.
    """

    usual = ("preset", "backbone", "input", "bank")

    presets = PRESETS

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("vit_base_patch8_224.dino"))
    input: InputPolicy = field(default_factory=InputPolicy)
    bank: BankConfig = field(default_factory=BankConfig)
    blocks: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
    aggregation: Literal["mean", "concat"] = "mean"
    attention: Literal["cls", "rollout"] = "cls"
    attention_block: int = -1
    mask: Literal["binary", "soft", "off"] = "binary"
    mask_kernel: Odd = 7
    mask_threshold: ShareBelowOne = 0.1
    mask_scope: Literal["image", "batch"] = "image"
    neighbours: AtLeastOne = 1
    k_ratio: PositiveShare = 0.05
    blur_sigma: BlurSigma = 4.0

"""UniFormaly: a training-free memory bank on self-supervised vision transformers (arXiv 2307.12540).

Patches are the mean of mid-level block outputs; back-patch masking drops background by the CLS attention; the bank
is a coreset of normal patches; the image score is the mean of the top k-ratio patch distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unianom.backbones import BackboneConfig, VitBackbone
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.memory.index import MemoryBank
from unianom.memory.masking import back_patch_mask, soft_mask
from unianom.methods.base import (
    MaskedPatches,
    MemoryMethod,
    PatchFeatures,
    mean_distances,
    register_method,
    with_statistics,
)
from unianom.methods.layers.bank import BankConfig, BlurSigma
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
    """UniFormaly's options; the defaults are the published ones.

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


@register_method("uniformaly")
class UniFormaly(MemoryMethod):
    """UniFormaly with its bank, once fitted.

    Args:
        config: options.
        bank: the memory bank, where there is one already.
    """

    Config = UniFormalyConfig
    postprocess_options = ("neighbours", "k_ratio", "blur_sigma")
    bank_options = ("bank", "mask", "mask_kernel", "mask_threshold", "mask_scope")

    def __init__(self, config: UniFormalyConfig, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.config: UniFormalyConfig = with_statistics(config)
        self.bank = bank
        self.encoder = VitBackbone(
            config.backbone,
            config.input.side,
            config.blocks,
            attention_block=None if config.mask == "off" else config.attention_block,
            rollout=config.attention == "rollout",
        )
        self.grid = self.encoder.grid

    def encode(self, images: Tensor) -> PatchFeatures:
        """Patches B×N×D and the attention B×h×w of B×3×S×S normalised images."""
        features = self.encoder(images)
        if self.config.aggregation == "mean":
            patches = torch.stack(features.tokens).mean(0)  # B N D
        else:
            patches = torch.cat(features.tokens, dim=-1)  # B N L·D
        return PatchFeatures(patches, features.attention)

    def mask_patches(self, encoded: PatchFeatures, config: UniFormalyConfig | None = None) -> MaskedPatches:
        """Patches B×N×D and the back-patch mask B×N.

        Raises:
            OptionError: `config` masks, but the method was made with mask=off and has no attention.
        """
        config = config or self.config
        if config.mask == "off":
            return super().mask_patches(encoded)
        if encoded.attention is None:
            raise OptionError(f"mask={config.mask} needs the attention, which uniformaly made with mask=off has not")
        scope = config.mask_scope or "image"
        if config.mask == "soft":
            weights = soft_mask(encoded.attention, config.mask_kernel, scope)  # B h w
            return super().mask_patches(encoded._replace(patches=encoded.patches * weights.flatten(1).unsqueeze(-1)))
        mask = back_patch_mask(encoded.attention, config.mask_kernel, config.mask_threshold, scope)  # B h w
        return MaskedPatches(encoded.patches, mask.flatten(1))

    def mask_bank_patches(self, encoded: PatchFeatures, config: UniFormalyConfig | None = None) -> MaskedPatches:
        """Patches for the bank. In batch scope, as the released code has it, every position that survives in any
        image of the batch is kept in all of them, and patches masked in their own image enter as zeros."""
        config = config or self.config
        embedding = self.mask_patches(encoded, config)
        if config.mask_scope != "batch" or config.mask != "binary":
            return embedding
        patches = embedding.patches * embedding.keep.unsqueeze(-1)
        return MaskedPatches(patches, embedding.keep.any(0).expand_as(embedding.keep))

    def image_scores(
        self, raw_outputs: Mapping[str, Tensor], anomaly_map: Tensor, config: UniFormalyConfig | None = None
    ) -> Tensor:
        """Top-k-ratio mean of the patches' distances (eq. 2), masked ones zero."""
        config = config or self.config
        distances = mean_distances(raw_outputs["distances"], config.neighbours)  # B N
        top = max(1, round(config.k_ratio * distances.shape[1]))  # masked patches count in N
        return distances.topk(top, dim=1).values.mean(1)

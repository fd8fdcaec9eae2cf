"""UniFormaly: a training-free memory bank on self-supervised vision transformers (arXiv 2307.12540).

Patches are the mean of mid-level block outputs; back-patch masking drops background by the CLS attention; the bank
is a coreset of normal patches; the image score is the mean of the top k-ratio patch distances.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unianom import host
from unianom.backbones import VitBackbone
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.errors import OptionError
from unianom.memory.index import MemoryBank
from unianom.memory.masking import back_patch_mask, soft_mask
from unianom.memory.patch_distances import mean_distances
from unianom.methods.base import register_method, with_statistics
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures


@register_method("uniformaly")
class UniFormaly(MemoryMethod[UniFormalyConfig]):
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
        self.config = with_statistics(config)
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
        """Return patches B×N×D and the attention B×h×w of B×3×S×S normalised images."""
        features = self.encoder(images)
        if self.config.aggregation == "mean":
            patches = torch.stack(features.tokens).mean(0)  # B N D
        else:
            patches = torch.cat(features.tokens, dim=-1)  # B N L·D
        return PatchFeatures(patches, features.attention)

    def mask_patches(self, encoded: PatchFeatures, config: UniFormalyConfig | None = None) -> MaskedPatches:
        """Return patches B×N×D and the back-patch mask B×N.

        Raises:
            OptionError: `config` masks, but the method was made with mask=off and has no attention.
        """
        config = config or self.config
        if config.mask == "off":
            return super().mask_patches(encoded)
        if encoded.attention is None:
            raise OptionError(f"mask={config.mask} needs the attention, which uniformaly made with mask=off has not")
        if config.mask == "soft":
            weights = soft_mask(encoded.attention, config.mask_kernel, config.mask_scope)  # B h w
            return super().mask_patches(encoded._replace(patches=encoded.patches * weights.flatten(1).unsqueeze(-1)))
        mask = back_patch_mask(encoded.attention, config.mask_kernel, config.mask_threshold, config.mask_scope)  # B h w
        patches = encoded.patches
        if not host.reads_at_once(patches):  # attention that is not finite is not refused, but shows in the score
            weights = soft_mask(encoded.attention, config.mask_kernel, config.mask_scope)  # B h w
            patches = torch.where(weights.isnan().flatten(1)[:, :, None], torch.nan, patches)
        return MaskedPatches(patches, mask.flatten(1))

    def mask_bank_patches(self, encoded: PatchFeatures, config: UniFormalyConfig | None = None) -> MaskedPatches:
        """Mask the patches of images for the bank.

        In batch scope, as the released code has it, every position that survives in any image of the batch is kept in
        all of them, and patches masked in their own image enter as zeros.
        """
        config = config or self.config
        embedding = self.mask_patches(encoded, config)
        if config.mask_scope != "batch" or config.mask != "binary":
            return embedding
        patches = embedding.patches * embedding.keep.unsqueeze(-1)
        return MaskedPatches(patches, embedding.keep.any(0).expand_as(embedding.keep))

    @property
    def masks_bank_otherwise(self) -> bool:
        """Whether images of the bank are masked batch by batch."""
        return self.config.mask_scope == "batch" and self.config.mask == "binary"

    def deciding_patches(self, config: UniFormalyConfig | None = None) -> int:
        """The top k-ratio of the patches; masked ones count in N."""
        return max(1, round((config or self.config).k_ratio * self.grid[0] * self.grid[1]))

    def patch_scores(self, tensors: Mapping[str, Tensor], config: UniFormalyConfig | None = None) -> Tensor:
        """Average the top k-ratio of the patches' distances (eq. 2), masked ones zero; B."""
        config = config or self.config
        distances = mean_distances(tensors["distances"], config.neighbours)  # B N
        return distances.topk(self.deciding_patches(config), dim=1).values.mean(1)

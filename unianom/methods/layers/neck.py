"""One feature map out of a pyramid: what reconstruction methods learn to reconstruct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unianom.backbones import CnnBackbone
from unianom.configs.backbone import BackboneConfig


class FeatureNeck(nn.Module):
    """A frozen encoder whose taps are resized to one grid and stacked along channels, fine to coarse, without any
    normalisation (the multi-scale feature concatenation of UniAD and OneNIP).

    Reductions 2, 4, 8, 16 of EfficientNet-B4 give 24 + 32 + 56 + 160 = 272 channels on a 14×14 grid at 224 pixels.

    Args:
        backbone: encoder and weights.
        taps: reductions of its maps, fine to coarse, as of `CnnBackbone`.
        grid_reduction: the one of the taps whose grid the others take.
        side: height and width of the images in pixels.

    Attributes:
        channels: C, the sum over taps.
        grid: h and w.

    Raises:
        OptionError, WeightsError: as `CnnBackbone`.
    """

    def __init__(self, backbone: BackboneConfig, taps: Sequence[int], grid_reduction: int, side: int) -> None:
        super().__init__()
        self.encoder = CnnBackbone(backbone, taps)
        self.channels = sum(self.encoder.channels)
        level = list(taps).index(grid_reduction)
        with torch.no_grad():
            height, width = self.encoder(torch.zeros(1, 3, side, side))[level].shape[2:]
        self.grid: tuple[int, int] = (height, width)

    def forward(self, images: Tensor) -> Tensor:
        """B×3×S×S normalised images to B×C×h×w float32, without gradients."""
        with torch.no_grad():
            maps = self.encoder(images)
            return torch.cat([self._resize(feature_map) for feature_map in maps], dim=1)

    def _resize(self, feature_map: Tensor) -> Tensor:
        if feature_map.shape[2:] == self.grid:
            return feature_map
        return interpolate(feature_map, size=self.grid, mode="bilinear", align_corners=True)

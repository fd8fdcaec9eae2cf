"""The first query of UniAS's decoder: learned, and reweighted by what the image looks like (sample-aware)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unianom.methods.layers.gated_cnn import MultiGranularityCnn


class CbamWeights(nn.Module):
    """Channel and spatial weights of a map (Woo et al., CBAM, ECCV 2018; layer sizes as released for UniAS).

    Args:
        dim: channels of the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        narrow = dim // 2
        self.layers = nn.Sequential(
            nn.Linear(dim, narrow), nn.ReLU(), nn.Linear(narrow, narrow), nn.ReLU(), nn.Linear(narrow, dim)
        )
        self.convolution = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def channel(self, features: Tensor) -> Tensor:
        """Weights B×C×1×1 in (0, 1) of the channels of B×C×h×w."""
        mean, largest = features.mean((2, 3)), features.amax((2, 3))  # B C
        return (self.layers(mean) + self.layers(largest)).sigmoid()[:, :, None, None]

    def spatial(self, features: Tensor) -> Tensor:
        """Weights B×1×h×w in (0, 1) of the cells of B×C×h×w."""
        pooled = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], dim=1)  # B 2 h w
        return self.convolution(pooled).sigmoid()


class ProductQuery(nn.Module):
    """A learned query times the CBAM weights of the coarsest patches h_K (UniAS, sec. 3.4).

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(dim, *grid))
        self.weights = CbamWeights(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Query B×C×h×w from the coarsest patches B×C×h×w."""
        channel = self.weights.channel(patches)
        spatial = self.weights.spatial(channel * patches)  # in CBAM the second attention sees the first one's result
        return self.query * channel * spatial


class CombinedQuery(nn.Module):
    """Two learned queries, each the sum of a channel-weighted and a spatially weighted copy, mixed by an MGG-CNN (the
    released form of UniAS).

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(dim, 2, *grid))
        self.reference = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.weights = CbamWeights(dim)
        self.mix = MultiGranularityCnn(2 * dim, dim)

    def forward(self, decoded: Tensor) -> Tensor:
        """Query B×C×h×w from the pixel decoder's coarsest map B×C×h×w."""
        reference = self.reference(decoded)
        weight = self.weights.channel(reference) + self.weights.spatial(reference)  # B C h w
        return self.mix((self.queries * weight[:, :, None]).flatten(1, 2))  # channel by channel, both queries in turn


class PlainQuery(nn.Module):
    """A learned query, the same for all images.

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(dim, *grid))

    def forward(self, patches: Tensor) -> Tensor:
        """The query for each image of B×C×h×w."""
        return self.query.expand(len(patches), -1, -1, -1)

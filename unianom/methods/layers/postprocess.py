"""From what a network finds to anomaly maps and image scores: upsampling, blurs and reductions, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad


# ------------------------------------------------------------------------------------------------------ maps of levels
def numbered(distances: Iterable[Tensor]) -> dict[str, Tensor]:
    """Name the distance maps of several levels as raw outputs: "distance_0", "distance_1", …"""
    return {f"distance_{index}": each for index, each in enumerate(distances)}


def in_order(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the distance maps among raw outputs, in the order in which they were numbered."""
    count = sum(name.startswith("distance_") for name in tensors)
    return [tensors[f"distance_{index}"] for index in range(count)]


# ---------------------------------------------------------------------------------------------------------- upsampling
def upsample(grid: Tensor, side: int, align_corners: bool) -> Tensor:
    """Upsample B×h×w bilinearly to B×side×side.

    Args:
        grid: B×h×w.
        side: height and width of the result in pixels.
        align_corners: whether the centres of the corners' cells lie on each other, or the corners of the whole maps.
    """
    return interpolate(grid[:, None], size=side, mode="bilinear", align_corners=align_corners)[:, 0]


def upsample_levels(levels: Sequence[Tensor], side: int) -> Tensor:
    """Upsample L maps B×h×w, each of a size of its own, with corners aligned; L×B×side×side."""
    return torch.stack([upsample(level, side, align_corners=True) for level in levels])


def upsample_and_blur(grid: Tensor, side: int, sigma: float) -> Tensor:
    """Upsample a grid bilinearly (corners not aligned), then blur it as `gaussian_blur` does.

    Both act on rows and columns separately and linearly, so they are one small matrix product on either side:
    map = R · grid · Cᵀ.

    Args:
        grid: B×h×w.
        side: height and width of the map in pixels.
        sigma: standard deviation of the blur in pixels; 0 for none.

    Returns:
        B×side×side.
    """
    rows, columns = (_upsample_and_blur_matrix(cells, side, sigma, grid.device) for cells in grid.shape[1:])
    return rows @ grid @ columns.T


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must be an ordinary tensor, also if the caller is in inference mode
def _upsample_and_blur_matrix(short: int, long: int, sigma: float, device: torch.device) -> Tensor:
    """Return the matrix of one axis, long×short; the last few are kept."""
    identity = torch.eye(short, dtype=torch.float64)[None]  # 1 channels=short, positions=short
    matrix = interpolate(identity, size=long, mode="linear", align_corners=False)[0].T.numpy()
    if sigma > 0:
        from scipy.ndimage import gaussian_filter1d  # slow to import, and only needed once

        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32)).to(device)


# --------------------------------------------------------------------------------------------------------------- blurs
def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur square maps B×S×S by a Gaussian of `sigma` pixels (SciPy's: cut at four sigma, reflecting border)."""
    return upsample_and_blur(maps, maps.shape[2], sigma)


def gaussian_filter(maps: Tensor, size: int, sigma: float, padding: Literal["reflect", "zeros"] = "reflect") -> Tensor:
    """Filter the last two dimensions with a small size×size Gaussian.

    Sums of shifted maps and no convolution, so that autocast leaves the precision as it is.

    Args:
        maps: B×C×H×W, of more than ⌊size/2⌋ rows and columns.
        size: of the kernel; odd.
        sigma: standard deviation in cells.
        padding: the border reflects, its own cells not repeated, or there are zeros beyond it.
    """
    reach = size // 2
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    weights = [weight / sum(kernel) for weight in kernel]
    padded = pad(maps, [reach] * 4, mode="reflect" if padding == "reflect" else "constant")
    return _weighted_sum(_weighted_sum(padded, weights, dim=-1), weights, dim=-2)


def _weighted_sum(maps: Tensor, weights: list[float], dim: int) -> Tensor:
    """Sum neighbours along one dimension by their weights; it gets shorter by one less than there are weights."""
    length = maps.shape[dim] - len(weights) + 1
    total = weights[0] * maps.narrow(dim, 0, length)
    for shift, weight in enumerate(weights[1:], start=1):
        total = total.add(maps.narrow(dim, shift, length), alpha=weight)
    return total


# -------------------------------------------------------------------------------------------------------- image scores
def top_mean(maps: Tensor, share: float) -> Tensor:
    """Average the largest share of each map's pixels, at least one; B×S×S to B."""
    pixels = maps.flatten(1)
    count = max(1, int(share * pixels.shape[1]))
    return pixels.mean(1) if count == pixels.shape[1] else pixels.topk(count, dim=1).values.mean(1)


def pooled_maximum(maps: Tensor, window: int) -> Tensor:
    """Return the largest mean over any window×window pixels of each B×S×S map; B."""
    # a mean over a square is one over columns of one over rows, in far fewer additions
    means = avg_pool2d(maps[:, None], (window, 1), stride=1)
    return avg_pool2d(means, (1, window), stride=1).amax((1, 2, 3))


def standard_deviation(maps: Tensor) -> Tensor:
    """Return the standard deviation of the pixels of each B×S×S map (without Bessel's correction); B."""
    return maps.flatten(1).std(1, correction=0)

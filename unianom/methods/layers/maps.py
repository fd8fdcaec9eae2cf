"""From a score on the patch grid to an anomaly map in pixels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

MAX_CELLS = 8
"""Cells a side of a memory method's embedding at most; as many as the bottleneck of RevDist has."""


def grid_to_map(grid: Tensor, size: int, sigma: float) -> Tensor:
    """Bilinear upsampling (corners not aligned) of a patch grid, then a Gaussian blur (SciPy's: cut at four sigma,
    reflecting border).

    Both act on rows and columns separately and linearly, so they are one small matrix product on either side:
    map = R · grid · Cᵀ.

    Args:
        grid: B×h×w.
        size: height and width of the map in pixels.
        sigma: standard deviation of the blur in pixels; 0 for none.

    Returns:
        B×size×size.
    """
    rows, columns = (_upsample_and_blur(cells, size, sigma, grid.device) for cells in grid.shape[1:])
    return rows @ grid @ columns.T


def upsampled_grid(grid: Tensor, size: int) -> Tensor:
    """As `grid_to_map`, without the blur."""
    return interpolate(grid[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur (SciPy's: cut at four sigma, reflecting border) of square maps B×S×S; sigma in pixels. A matrix
    product on either side."""
    return grid_to_map(maps, maps.shape[2], sigma)


def pooled_embedding(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches B×N×D, row-major over their grid, as feature maps B×D×h×w, averaged so that none has more than
    8 × 8 cells: what a memory method gives as its embedding."""
    cells = patches.transpose(1, 2).unflatten(2, grid)
    return adaptive_avg_pool2d(cells, (min(grid[0], MAX_CELLS), min(grid[1], MAX_CELLS)))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must be an ordinary tensor, also if the caller is in inference mode
def _upsample_and_blur(short: int, long: int, sigma: float, device: torch.device) -> Tensor:
    """The matrix, long×short; the last few are kept."""
    identity = torch.eye(short, dtype=torch.float64)[None]  # 1 channels=short, positions=short
    matrix = nn.functional.interpolate(identity, size=long, mode="linear", align_corners=False)[0].T.numpy()
    if sigma > 0:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32)).to(device)

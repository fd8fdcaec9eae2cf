"""From a score on the patch grid to an anomaly map in pixels."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

MAX_CELLS = 8
"""Cells a side of a memory method's embedding at most; as many as the bottleneck of RevDist has."""


class GridToMap(nn.Module):
    """Bilinear upsampling (corners not aligned) of a patch grid, then a Gaussian blur (SciPy's: cut at four sigma,
    reflecting border).

    Both act on rows and columns separately and linearly, so they are one small matrix product on either side:
    map = R · grid · Cᵀ.

    Args:
        grid: height and width of the patch grid.
        size: height and width of the map in pixels.
        sigma: standard deviation of the blur in pixels; 0 for none.
    """

    def __init__(self, grid: tuple[int, int], size: int, sigma: float) -> None:
        super().__init__()
        self.size = size
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", _upsample_and_blur(grid[0], size, sigma), persistent=False)  # H h
        self.register_buffer("columns", _upsample_and_blur(grid[1], size, sigma), persistent=False)  # W w

    def forward(self, grid: Tensor) -> Tensor:
        """B×h×w to B×H×W."""
        return self.rows @ grid @ self.columns.T

    def unsmoothed(self, grid: Tensor) -> Tensor:
        """As `forward`, without the blur."""
        return interpolate(grid[:, None], size=self.size, mode="bilinear", align_corners=False)[:, 0]


def pooled_embedding(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches B×N×D, row-major over their grid, as feature maps B×D×h×w, averaged so that none has more than
    8 × 8 cells: what a memory method gives as its embedding."""
    cells = patches.transpose(1, 2).unflatten(2, grid)
    return adaptive_avg_pool2d(cells, (min(grid[0], MAX_CELLS), min(grid[1], MAX_CELLS)))


class GaussianBlur(nn.Module):
    """A Gaussian blur (SciPy's: cut at four sigma, reflecting border) of square maps: a matrix product on either side.

    Args:
        size: height and width of the maps in pixels.
        sigma: standard deviation in pixels; 0 for none.
    """

    def __init__(self, size: int, sigma: float) -> None:
        super().__init__()
        self.matrix: Tensor
        self.register_buffer("matrix", _upsample_and_blur(size, size, sigma), persistent=False)  # S S

    def forward(self, maps: Tensor) -> Tensor:
        """B×S×S to B×S×S."""
        return self.matrix @ maps @ self.matrix.T


def _upsample_and_blur(short: int, long: int, sigma: float) -> Tensor:
    identity = torch.eye(short, dtype=torch.float64)[None]  # 1 channels=short, positions=short
    matrix = nn.functional.interpolate(identity, size=long, mode="linear", align_corners=False)[0].T.numpy()
    if sigma > 0:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))

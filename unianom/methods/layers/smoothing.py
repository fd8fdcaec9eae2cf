"""Small Gaussian filters over feature maps and anomaly maps."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn


def gaussian_filter(maps: Tensor, size: int, sigma: float, padding: Literal["reflect", "zeros"] = "reflect") -> Tensor:
    """Filter the last two dimensions with a size×size Gaussian.

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
    padded = nn.functional.pad(maps, [reach] * 4, mode="reflect" if padding == "reflect" else "constant")
    return _filter(_filter(padded, weights, dim=-1), weights, dim=-2)


def _filter(maps: Tensor, weights: list[float], dim: int) -> Tensor:
    """Weighted sums of neighbours along one dimension, which gets shorter by one less than there are weights."""
    length = maps.shape[dim] - len(weights) + 1
    total = weights[0] * maps.narrow(dim, 0, length)
    for shift, weight in enumerate(weights[1:], start=1):
        total = total.add(maps.narrow(dim, shift, length), alpha=weight)
    return total

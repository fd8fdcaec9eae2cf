"""From levels to distances, maps and scores in NumPy loops, for the tests of the student–teacher methods."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import correlate, gaussian_filter

from tests.methods.plain_reconstruction import Array, enlarged
from unianom.configs.distance_map import DistanceMapConfig


def distance(one: Array, other: Array) -> float:
    """1 − cosine of two arrays, each taken as one vector."""
    one, other = one.ravel(), other.ravel()
    return 1 - (one @ other) / math.sqrt((one @ one) * (other @ other))


def position_distances(teacher: Array, student: Array) -> Array:
    """h×w of C×h×w."""
    rows, columns = range(teacher.shape[1]), range(teacher.shape[2])
    return np.array([[distance(teacher[:, r, c], student[:, r, c]) for c in columns] for r in rows])


def map_and_score(distances: list[Array], config: DistanceMapConfig, side: int) -> tuple[Array, float]:
    """S×S of distances h×w of every level, and the image score."""
    fused = sum(enlarged(each, side) for each in distances)
    if config.fuse == "mean":
        fused = fused / len(distances)
    if config.blur == "gaussian":
        fused = gaussian_filter(fused, sigma=4)
    elif config.blur == "box":
        offsets = np.arange(-2, 3)
        kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 4.0**2))
        fused = correlate(fused, kernel / kernel.sum(), mode="constant")
    count = max(1, int(config.score_share * side * side))
    return fused, np.sort(fused.ravel())[-count:].mean()

"""Coresets without one of their images: which rows take the place of that image's chosen ones.

A coreset covers every row within its radius. Without what was chosen of an image, some rows of others are left farther
away than that, which no coreset of these other images would leave. Rows of them are added, farthest first as a coreset
is chosen, until all are covered again. Only rows that a missing one was nearest to can be uncovered, so this takes the
time of one search for the nearest chosen row of each, not of a coreset for each image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unianom.memory.coreset import Float32, Int64, row_distances
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins


def cover_without_images(
    features: Float32, chosen: Int64, images: NDArray[np.int32], count: int, radius: float
) -> list[Int64]:
    """Choose what covers the rows of all other images again where what was chosen of one image is taken away.

    Args:
        features: shape (N, D), as the coreset was chosen in.
        chosen: its row numbers, ascending.
        images: shape (N,), the number of each row's image.
        count: number of images.
        radius: cover radius of the coreset.

    Returns:
        For each image the row numbers of other images that are added, in the order of choice; at most as many as were
        chosen of it. None where all rows were chosen, or all chosen ones are of one image.
    """
    added: list[Int64] = [np.empty(0, np.int64) for _ in range(count)]
    origins = Origins(tuple(str(number) for number in range(count)), images[chosen])
    if len(chosen) == len(features) or np.ptp(origins.rows) == 0:
        return added
    bank = MemoryBank.build(features[chosen], origins=origins)
    nearest = origins.rows[bank.search(features)[1][:, 0]]  # (N,) image of each row's nearest chosen one
    away = np.flatnonzero(nearest != images)
    away = away[np.argsort(nearest[away], kind="stable")]
    edges = np.searchsorted(nearest[away], np.arange(count + 1))
    for image in np.unique(nearest[away]):
        rows = away[edges[image] : edges[image + 1]]
        squared, _ = bank.without_image(int(image)).search(features[rows])
        most = int((origins.rows == image).sum())
        added[image] = rows[_cover(features[rows], np.sqrt(squared[:, 0].astype(np.float64)), most, radius)]
    return added


def _cover(features: Float32, distances: NDArray[np.float64], most: int, radius: float) -> Int64:
    """Pick rows farthest-first, at most so many, until none is farther than the radius from its nearest one."""
    picks: list[int] = []
    while len(picks) < most:
        farthest = int(distances.argmax())
        if distances[farthest] <= radius:
            break
        picks.append(farthest)
        distances = np.minimum(distances, row_distances(features, features[farthest]))
    return np.array(picks, np.int64)

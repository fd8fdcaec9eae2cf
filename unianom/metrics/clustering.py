"""Clustering metrics: how well clusters of images agree with their defect types.

All rest on the contingency table, clusters × types: how many images of each type every cluster holds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from unianom.errors import DataError

Int64 = NDArray[np.int64]


def contingency(clusters: ArrayLike, types: ArrayLike) -> tuple[Int64, NDArray, NDArray]:
    """Count images by cluster and type.

    Args:
        clusters: (n,) cluster of each image.
        types: (n,) true type of each image.

    Returns:
        C×T counts, the clusters of its rows and the types of its columns, both sorted.

    Raises:
        DataError: there is no image, or not one cluster and one type for each.
    """
    found, truth = np.asarray(clusters), np.asarray(types)
    if found.ndim != 1 or found.shape != truth.shape or not len(found):
        raise DataError(
            f"clusters have shape {found.shape} and types {truth.shape}; give one cluster and one type an image"
        )
    rows, row = np.unique(found, return_inverse=True)
    columns, column = np.unique(truth, return_inverse=True)
    table = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(table, (row, column), 1)
    return table, rows, columns


def match_clusters(table: Int64) -> list[tuple[int, int]]:
    """Pair clusters with types one to one so that the most images lie in the cluster of their type (Hungarian method).

    Args:
        table: C×T counts, as `contingency` gives them.

    Returns:
        min(C, T) pairs of row and column.
    """
    rows, columns = linear_sum_assignment(table, maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def normalised_mutual_information(table: Int64) -> float:
    """Mutual information of clusters and types over the mean of their entropies (arithmetic normalisation), 0…1.

    1 if both are constant, as they then agree.
    """
    share = table / table.sum()  # C T
    row, column = share.sum(1), share.sum(0)
    entropies = _entropy(row) + _entropy(column)
    if entropies == 0:
        return 1.0
    filled = share > 0
    ratio = share[filled] / np.outer(row, column)[filled]
    return max(0.0, 2 * math.fsum(share[filled] * np.log(ratio)) / entropies)


def _entropy(share: NDArray[np.float64]) -> float:
    """−Σ p ln p of shares that sum to one."""
    filled = share[share > 0]
    return -math.fsum(filled * np.log(filled)) if len(filled) > 1 else 0.0


def adjusted_rand_index(table: Int64) -> float:
    """Share of pairs of images on which clusters and types agree, corrected for chance (Hubert and Arabie, 1985):
    (Σ_ij C(n_ij) − E) / (½(Σ_i C(a_i) + Σ_j C(b_j)) − E) with C(m) = m(m−1)/2 and E = Σ_i C(a_i) Σ_j C(b_j) / C(n).

    1 for equal partitions, 0 on average for chance, below 0 for less agreement than that. 1 where the fraction is 0/0:
    both put all images into one group, or each into its own.
    """
    together, of_clusters, of_types = _pairs(table), _pairs(table.sum(1)), _pairs(table.sum(0))
    every = _pairs(np.array([table.sum()]))
    # both sides times 2·C(n), so that all of it is whole numbers
    above = 2 * (together * every - of_clusters * of_types)
    below = (of_clusters + of_types) * every - 2 * of_clusters * of_types
    return 1.0 if below == 0 else above / below


def _pairs(counts: Int64) -> int:
    """How many pairs lie within groups of these sizes."""
    return sum(count * (count - 1) // 2 for count in counts.ravel().tolist())


def clustering_metrics(clusters: ArrayLike, types: ArrayLike) -> dict[str, float]:
    """Agreement of clusters with types.

    Args:
        clusters: (n,) cluster of each image; their names do not matter.
        types: (n,) true type of each image.

    Returns:
        - nmi: see `normalised_mutual_information`.
        - ari: see `adjusted_rand_index`.
        - accuracy: share of images in the cluster that is matched with their type (see `match_clusters`). With one
          answer an image this is the micro-averaged F1, which UniFormaly reports as "F1".
        - f1_macro: F1 of each type against its matched cluster, averaged over the types; 0 for types without one.
        - n_images, n_clusters, n_types: counts.

    Raises:
        DataError: as `contingency`.
    """
    table, rows, columns = contingency(clusters, types)
    pairs = match_clusters(table)
    sizes, members = table.sum(1), table.sum(0)
    f1 = [2 * table[row, column] / (sizes[row] + members[column]) for row, column in pairs]
    return {
        "nmi": normalised_mutual_information(table),
        "ari": adjusted_rand_index(table),
        "accuracy": float(sum(table[pair] for pair in pairs) / table.sum()),
        "f1_macro": math.fsum(f1) / len(columns),
        "n_images": int(table.sum()),
        "n_clusters": len(rows),
        "n_types": len(columns),
    }

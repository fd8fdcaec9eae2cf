"""Clustering metrics: how well clusters of images agree with their defect types."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

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


def clustering_metrics(clusters: ArrayLike, types: ArrayLike) -> dict[str, float]:
    """Measure how well clusters agree with types.

    Args:
        clusters: (n,) cluster of each image; their names do not matter.
        types: (n,) true type of each image.

    Returns:
        - nmi: mutual information of clusters and types over the mean of their entropies, 0…1; 1 if both are constant.
        - ari: adjusted Rand index (Hubert and Arabie, 1985), the share of pairs of images on which clusters and types
          agree, corrected for chance; 1 for equal partitions, 0 on average for chance.
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
        "nmi": float(normalized_mutual_info_score(np.asarray(types), np.asarray(clusters))),
        "ari": float(adjusted_rand_score(np.asarray(types), np.asarray(clusters))),
        "accuracy": float(sum(table[pair] for pair in pairs) / table.sum()),
        "f1_macro": math.fsum(f1) / len(columns),
        "n_images": int(table.sum()),
        "n_clusters": len(rows),
        "n_types": len(columns),
    }

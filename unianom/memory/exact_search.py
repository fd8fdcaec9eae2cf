"""Exact nearest neighbours from FAISS's proposals: distances are taken from their definition.

FAISS compares a batch of queries by |x|² + |y|² − 2x·y in float32. That is fast, but its last bits depend on how
queries and bank are cut into blocks, so neighbours at nearly the same distance could swap, and scores change, with the
number of shards or the batch size. Here FAISS only proposes neighbours; the answer is made of distances taken from
their definition, Σ(x−y)², and is the same, bit for bit, however bank and queries are divided (see `Shard.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unianom.errors import OptionError
from unianom.memory.faiss_indexes import Bool, Float32, Int64, lengths

SPARE = 8
"""Neighbours asked of FAISS beyond the k wanted, so that near ties can be told apart."""

CANDIDATES_AT_ONCE = 1 << 22
"""Most proposed neighbours held in memory at a time."""

PAIRS_AT_ONCE = 1024
"""Exact distances computed at a time, so that they stay in cache."""


def nearest_centroids(quantizer: Any, longest: float, vectors: Float32, count: int) -> tuple[Float32, Int64]:
    """Find the nearest centroids of vectors, by (squared distance, centroid).

    Args:
        quantizer: flat index of the centroids.
        longest: length of the longest of them.
        vectors: shape (N, D).
        count: how many to find for each.

    Returns:
        Squared distances and centroids, both of shape (N, count).
    """

    def search(some: Float32, width: int, _block: Int64) -> tuple[Float32, Int64]:
        return quantizer.search(some, width)

    return exact_nearest(search, quantizer, longest, vectors, count)


def exact_nearest(
    search: Callable[[Float32, int, Int64], tuple[Float32, Int64]],
    index: Any,
    longest: float,
    queries: Float32,
    k: int,
    excluded: Bool | None = None,
) -> tuple[Float32, Int64]:
    """Find the k nearest rows of an index by (distance, row), from proposals whose distances are nearly right.

    Args:
        search: (some queries, how many neighbours, which queries these are) -> FAISS's distances and rows, ascending.
        index: the FAISS index, to read proposed rows from.
        longest: length of its longest row.
        queries: shape (Q, D).
        k: at most the rows of the index.
        excluded: which rows of the index do not count; where fewer than k are left, distances end with infinity and
            rows with −1.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    # A float32 dot product of D terms is wrong by at most D·u·|x||y|, in any order of summation (Higham, "Accuracy and
    # Stability of Numerical Algorithms", §3.1); 16u more cover the squares, the sums and rounding the result.
    unit_error = (queries.shape[1] + 16) * np.finfo(np.float32).eps / 2
    error = unit_error * (lengths(queries) + longest) ** 2 + np.finfo(np.float32).tiny
    pending, width = np.arange(len(queries)), min(k + SPARE, index.ntotal)
    while pending.size:
        unsettled = []
        step = max(1, CANDIDATES_AT_ONCE // width)
        for block in (pending[start : start + step] for start in range(0, len(pending), step)):
            near, proposed = search(queries[block], width, block)
            counted, kth = proposed >= 0, near[:, k - 1]
            if excluded is not None:
                counted &= ~excluded[proposed]
                kth = np.partition(np.where(counted, near, np.inf), k - 1, axis=1)[:, k - 1]  # infinite: ask for more
            # The true k-th distance is at most kth + error, any row not proposed at least near[-1] - error.
            limit = kth + 2 * error[block]
            settled = (near[:, -1] > limit) | (proposed[:, -1] < 0) | (width == index.ntotal)
            done = block[settled]
            candidates = counted & (near <= limit[:, None])
            distances[done], rows[done] = _ranked(index, queries, done, proposed[settled], candidates[settled], k)
            unsettled.append(block[~settled])
        pending, width = np.concatenate(unsettled), min(4 * width, index.ntotal)
    return distances, rows


def _ranked(
    index: Any, queries: Float32, which: Int64, proposed: Int64, candidates: Bool, k: int
) -> tuple[Float32, Int64]:
    """Return, for some of the queries, the k nearest of the candidates among the proposed rows, by (distance, row)."""
    query, column = np.nonzero(candidates)
    row = proposed[query, column]
    squared = np.empty(len(row), dtype=np.float32)
    for start in range(0, len(row), PAIRS_AT_ONCE):
        pairs = slice(start, start + PAIRS_AT_ONCE)
        difference = queries[which[query[pairs]]].astype(np.float64)
        difference -= index.reconstruct_batch(row[pairs])
        squared[pairs] = np.einsum("nd,nd->n", difference, difference)
    distances = np.full(proposed.shape, np.inf, dtype=np.float32)
    distances[query, column] = squared
    proposed = np.where(candidates, proposed, -1)  # where there are fewer than k candidates, others fill up
    order = np.lexsort((proposed, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(proposed, order, axis=1)


def merge_results(parts: Sequence[tuple[Float32, Int64]], k: int) -> tuple[Float32, Int64]:
    """Join what the shards of a bank answered to the same queries.

    Args:
        parts: (squared distances, row numbers) of each shard, in any order, see `Shard.search`.
        k: how many neighbours to keep.

    Returns:
        Squared distances, shape (Q, k), ascending, and row numbers, shape (Q, k).

    Raises:
        OptionError: a query has fewer than k neighbours.
    """
    distances = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    distances, rows = np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)
    if rows.shape[1] < k or (rows < 0).any():
        raise OptionError(f"a query has fewer than {k} neighbours; lower k, or raise nprobe of an 'ivf_flat' bank")
    return distances, rows

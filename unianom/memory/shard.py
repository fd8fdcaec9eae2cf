"""A shard of a memory bank: consecutive rows in one FAISS index, searched exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unianom.errors import OptionError
from unianom.memory.exact_search import exact_nearest, nearest_centroids
from unianom.memory.faiss_indexes import Bool, Float32, Int64, checked_vectors, load_faiss, longest_row


class Shard:
    """Consecutive rows of a bank in one FAISS index, searched on its own, e.g. on a machine of its own.

    Attributes:
        index: FAISS index of the rows (IndexFlatL2, or IndexIVFFlat with a direct map).
        first_row: number of its first row in the bank.
        longest: length of its longest row.
    """

    def __init__(self, index: Any, first_row: int) -> None:
        self.index = index
        self.first_row = first_row
        self.longest = longest_row(index)
        self._quantizer: Any = None
        if hasattr(index, "quantizer"):
            self._quantizer = load_faiss().downcast_index(index.quantizer)
            self._longest_centroid = longest_row(self._quantizer)

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    def vectors(self) -> Float32:
        """Return all rows, shape (rows, dimension), exactly as they were put in."""
        return self.index.reconstruct_batch(np.arange(self.rows))

    def search(self, queries: Float32, k: int, excluded: Bool | None = None) -> tuple[Float32, Int64]:
        """Find the k nearest rows of this shard, by (squared distance, row).

        A distance is Σ(x−y)² summed in float64 and rounded to float32. The result is exact, near ties and duplicates
        included: FAISS's float32 distances are wrong by at most e = (D+16)·2⁻²⁴·(|x|+|y|)²; rows within 2e of the
        k-th proposed one are ranked by their own distance, and where proposals end within 2e, more are asked for.
        With "ivf_flat" the same holds within the `nprobe` lists whose centroids are nearest to the query.

        Args:
            queries: shape (Q, D).
            k: how many, at least 1.
            excluded: shape (rows,), which rows of this shard are passed over as if it did not hold them.

        Returns:
            Squared distances, shape (Q, min(k, rows)), ascending, and row numbers of the bank. Where fewer rows are
            left, or fewer lie in the probed lists of "ivf_flat", distances end with infinity and row numbers with −1.

        Raises:
            OptionError: k is below 1.
            DataError: queries have another dimension or hold NaN or infinity.
        """
        queries = checked_vectors(queries, "queries", self.dimension)
        if k < 1:
            raise OptionError(f"k must be at least 1, got {k}")
        k = min(k, self.rows)
        if self._quantizer is None:
            distances, rows = exact_nearest(self._search_flat, self.index, self.longest, queries, k, excluded)
        else:
            distances, rows = self._search_lists(queries, k, excluded)
        rows[rows >= 0] += self.first_row
        return distances, rows

    def _search_flat(self, queries: Float32, width: int, _block: Int64) -> tuple[Float32, Int64]:
        return self.index.search(queries, width)

    def _search_lists(self, queries: Float32, k: int, excluded: Bool | None) -> tuple[Float32, Int64]:
        centroid_distances, lists = nearest_centroids(
            self._quantizer, self._longest_centroid, queries, self.index.nprobe
        )

        def search(some: Float32, width: int, block: Int64) -> tuple[Float32, Int64]:
            return self.index.search_preassigned(some, width, lists[block], centroid_distances[block])

        return exact_nearest(search, self.index, self.longest, queries, k, excluded)


def all_vectors(shards: Sequence[Shard]) -> Float32:
    """Return the rows of all shards, exactly as they were put in."""
    return np.concatenate([shard.vectors() for shard in shards])


def vectors_at(shards: Sequence[Shard], rows: Int64) -> Float32:
    """Return the vectors of given row numbers, all in these shards: shape rows.shape + (dimension,)."""
    if len(shards) == 1:
        return (
            shards[0]
            .index.reconstruct_batch(rows.ravel() - shards[0].first_row)
            .reshape(*rows.shape, shards[0].dimension)
        )
    vectors = np.empty((*rows.shape, shards[0].dimension), dtype=np.float32)
    for shard in shards:
        here = (rows >= shard.first_row) & (rows < shard.first_row + shard.rows)
        vectors[here] = shard.index.reconstruct_batch(rows[here] - shard.first_row)
    return vectors

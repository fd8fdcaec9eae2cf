"""Proposals: rows of a bank that probably lie near a query, found in a small part of the time of a search.

The rows are spread over lists by the nearest of some centroids, as in an inverted file; the lists hold row numbers
only, so no vector is kept twice. Whatever is proposed is a row of the bank, so the distance to it bounds that to the
nearest one from above. How good proposals are decides how much time they save, never what is found.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from unianom import files
from unianom.errors import ModelError
from unianom.memory.exact_search import nearest_centroids
from unianom.memory.faiss_indexes import Float32, Int64, flat_index, longest_row

PROPOSALS = "proposals.safetensors"
"""File in a bank's folder: `centroids`, L×D float32, and `lists`, the list of each row, int32."""

LISTS_PER_ROOT = 4
"""Lists for each √N of a bank's N rows, where centroids cost about as much as the rows of a list."""

SAMPLE_PER_LIST, STEPS = 32, 5
"""Rows for each list that centroids are made of, and steps of k-means. Both were enough on real patches."""

WIDEST_LIST = 3
"""Rows of a list, in mean lengths of a list, that are proposed at most."""


class Proposals:
    """Lists of rows of a bank, by nearest centroid.

    Args:
        centroids: shape (L, D).
        lists: shape (N,), the list of each row of the bank.
    """

    def __init__(self, centroids: Float32, lists: NDArray[np.int32]) -> None:
        self.centroids, self.lists = centroids, lists
        self._quantizer = flat_index(centroids)
        lengths = np.bincount(lists, minlength=len(centroids))
        width = min(int(lengths.max()), WIDEST_LIST * -(-len(lists) // len(centroids)))
        order = np.argsort(lists, kind="stable")
        place = np.arange(len(lists)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of a row in its list
        within = place < width
        self._rows = np.full((len(centroids), width), -1, dtype=np.int32)
        self._rows[lists[order[within]], place[within]] = order[within]

    @classmethod
    def build(cls, vectors: Float32, seed: int) -> Self:
        """Make the lists of a bank; the same, bit for bit, whatever the number of threads.

        Args:
            vectors: shape (N, D), all rows of the bank.
            seed: chooses the rows that centroids are made of.
        """
        count = min(len(vectors), round(LISTS_PER_ROOT * len(vectors) ** 0.5))
        drawn = np.random.default_rng(seed).permutation(len(vectors))[: SAMPLE_PER_LIST * count]
        sample, centroids = vectors[drawn], vectors[drawn[:count]]
        for _ in range(STEPS):
            centroids = _means(sample, _nearest(centroids, sample), centroids)
        return cls(centroids, _nearest(centroids, vectors).astype(np.int32))

    def near(self, queries: Float32, probes: int) -> Int64:
        """Propose rows of the lists whose centroids are nearest to each query.

        Args:
            queries: shape (Q, D), checked.
            probes: how many lists.

        Returns:
            Different row numbers, shape (Q, R); −1 fills up.
        """
        _, lists = self._quantizer.search(queries, min(probes, len(self.centroids)))
        return self._rows[lists].reshape(len(queries), -1).astype(np.int64)

    def save(self, uri: str) -> str:
        """Write the file into a bank's folder; return its SHA-256."""
        content = safetensors.numpy.save({"centroids": self.centroids, "lists": self.lists})
        files.write_bytes(files.join(uri, PROPOSALS), content)
        return files.sha256_of(content)

    @classmethod
    def load(cls, uri: str, sha256: str, rows: int, dimension: int) -> Self:
        """Read the file from a bank's folder.

        Args:
            uri: that folder.
            sha256: of the file, as the bank's manifest has it.
            rows, dimension: of the bank.

        Raises:
            ModelError: it is missing or damaged, or of another bank.
        """
        path = files.join(uri, PROPOSALS)
        try:
            content = files.read_bytes(path)
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing from the memory bank; copy the whole folder again") from error
        if files.sha256_of(content) != sha256:
            raise ModelError(f"{path} is damaged: its SHA-256 is not the one in the bank's manifest; copy it again")
        try:
            tensors = safetensors.numpy.load(content)
            centroids, lists = tensors["centroids"], tensors["lists"]
        except (SafetensorError, KeyError) as error:
            raise ModelError(f"{path} cannot be read: {error}; fit the model again") from error
        if (
            (centroids.dtype, lists.dtype) != (np.float32, np.int32)
            or (centroids.ndim, centroids.shape[1:], lists.shape) != (2, (dimension,), (rows,))
            or not (lists.min() >= 0 and lists.max() < len(centroids))
        ):
            raise ModelError(f"{path} does not spread the {rows} rows of the bank over lists; copy it again")
        return cls(np.ascontiguousarray(centroids), lists)


def _nearest(centroids: Float32, vectors: Float32) -> Int64:
    """Return the nearest centroid of each vector; exact, so that no rounding of a matrix product plays a part."""
    index = flat_index(centroids)
    return nearest_centroids(index, longest_row(index), vectors, 1)[1][:, 0]


def _means(vectors: Float32, groups: Int64, empty: Float32) -> Float32:
    """Return the mean of the vectors of each group; of those without vectors what is given in `empty`."""
    order = np.argsort(groups, kind="stable")
    found, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    means = empty.copy()
    for group, start, count in zip(found, first, counts, strict=True):
        means[group] = vectors[order[start : start + count]].mean(axis=0, dtype=np.float64)
    return means

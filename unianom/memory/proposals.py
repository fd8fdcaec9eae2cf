"""Proposals: rows of a bank that probably lie near a query, found in a small part of the time of a search.

The rows are spread over lists by the nearest of some centroids, and those of the nearest lists compared, as in any
inverted file; since they are compared roughly, two bytes for each value (bfloat16) do, and they are read in half of the
time. Whatever is proposed is a row of the bank, so the distance to it bounds that to the nearest one from above. How
good proposals are decides how much time they save, never what is found.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from unianom import files
from unianom.errors import ModelError
from unianom.memory.bank_files import read_verified
from unianom.memory.exact_search import nearest_centroids
from unianom.memory.faiss_indexes import Bool, Float32, Int64, flat_index, load_faiss, longest_row

PROPOSALS = "proposals.safetensors"
"""File in a bank's folder: `centroids`, L×D float32, and `lists`, the list of each row, int32."""

LISTS_PER_ROOT = 4
"""Lists for each √N of a bank's N rows, where centroids cost about as much as the rows of a list."""

SAMPLE_PER_LIST, STEPS = 32, 5
"""Rows for each list that centroids are made of, and steps of k-means. Both were enough on real patches."""


class Proposals:
    """An inverted file of the rows of a bank, of which only centroids and lists are stored.

    Args:
        centroids: shape (L, D).
        lists: shape (N,), the list of each row of the bank.
        vectors: shape (N, D), all rows of the bank.
    """

    def __init__(self, centroids: Float32, lists: NDArray[np.int32], vectors: Float32) -> None:
        faiss = load_faiss()
        self.centroids, self.lists = centroids, lists
        self._index = faiss.IndexIVFScalarQuantizer(
            flat_index(centroids),
            centroids.shape[1],
            len(centroids),
            faiss.ScalarQuantizer.QT_bf16,
            faiss.METRIC_L2,
            False,  # vectors themselves, not what centroids leave of them
        )
        self._index.train(vectors[:1])  # nothing is learnt of vectors for bfloat16
        wide = lists.astype(np.int64)
        self._index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(wide))

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
        return cls(centroids, _nearest(centroids, vectors).astype(np.int32), vectors)

    def near(self, queries: Float32, count: int, probes: int, excluded: Bool | None = None) -> Int64:
        """Propose rows that lie near queries.

        Args:
            queries: shape (Q, D), checked.
            count: how many for each.
            probes: how many lists to look into, those of the nearest centroids.
            excluded: shape (N,), which rows are passed over.

        Returns:
            Different row numbers, shape (Q, count); −1 where the lists hold fewer.
        """
        faiss = load_faiss()
        parameters = faiss.SearchParametersIVF(nprobe=min(probes, len(self.centroids)))
        if excluded is not None:
            counted = np.packbits(~excluded, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(counted)
        return self._index.search(queries, count, params=parameters)[1]

    def save(self, uri: str) -> str:
        """Write the file into a bank's folder; return its SHA-256."""
        content = safetensors.numpy.save({"centroids": self.centroids, "lists": self.lists})
        files.write_bytes(files.join(uri, PROPOSALS), content)
        return files.sha256_of(content)

    @classmethod
    def load(cls, uri: str, sha256: str, vectors: Float32) -> Self:
        """Read the file from a bank's folder.

        Args:
            uri: that folder.
            sha256: of the file, as the bank's manifest has it.
            vectors: shape (N, D), all rows of the bank.

        Raises:
            ModelError: it is missing or damaged, or of another bank.
        """
        path = files.join(uri, PROPOSALS)
        content = read_verified(path, sha256)
        try:
            tensors = safetensors.numpy.load(content)
            centroids, lists = tensors["centroids"], tensors["lists"]
        except (SafetensorError, KeyError) as error:
            raise ModelError(f"{path} cannot be read: {error}; fit the model again") from error
        if (
            (centroids.dtype, lists.dtype) != (np.float32, np.int32)
            or (centroids.ndim, centroids.shape[1:], lists.shape) != (2, vectors.shape[1:], vectors.shape[:1])
            or not (lists.min() >= 0 and lists.max() < len(centroids))
        ):
            raise ModelError(f"{path} does not spread the {len(vectors)} rows of the bank over lists; copy it again")
        return cls(np.ascontiguousarray(centroids), lists, vectors)


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

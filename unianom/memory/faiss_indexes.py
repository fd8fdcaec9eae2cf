"""The FAISS indexes that memory banks are made of, and checks of the vectors in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unianom.errors import DataError, UnianomError

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

ROWS_AT_ONCE = 1 << 16
"""Rows read back from an index at a time where not all are wanted at once."""


def load_faiss() -> Any:
    """Return the module FAISS.

    Raises:
        UnianomError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UnianomError(
            "a memory bank needs FAISS; run in unianom's checkout: pip install '.[cpu]' (or '.[gpu]')"
        ) from error
    # Below this many numbers in a batch of queries FAISS 1.14 and 1.15 avoid matrix products; their default suits
    # some 160 threads and is 4 to 6 times slower than need be on a few (facebookresearch/faiss, pull request 5109).
    if faiss.cvar.distance_compute_blas_threshold == 128_000:
        faiss.cvar.distance_compute_blas_threshold = 800 * faiss.omp_get_max_threads()
    return faiss


def checked_vectors(vectors: Float32, what: str, dimension: int | None = None) -> Float32:
    """Return vectors as a contiguous matrix of float32.

    Args:
        vectors: shape (N, D).
        what: their name in messages.
        dimension: D that is asked for; None takes any, but at least one vector.

    Raises:
        DataError: they have another shape, or hold NaN, infinite or absurdly large values.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or (dimension is None and len(vectors) == 0):
        raise DataError(f"{what} of a memory bank must have shape (rows, dimension), got {vectors.shape}")
    if dimension is not None and vectors.shape[1] != dimension:
        raise DataError(f"{what} have dimension {vectors.shape[1]}, the memory bank has {dimension}")
    if not np.isfinite(np.einsum("nd,nd->n", vectors, vectors)).all():
        raise DataError(f"{what} of a memory bank hold NaN, infinite or absurdly large values")
    return vectors


def lengths(vectors: Float32) -> Float64:
    """Return the Euclidean length of each row."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def longest_row(index: Any) -> float:
    """Return the length of the longest row of an index."""
    starts = range(0, index.ntotal, ROWS_AT_ONCE)
    blocks = (np.arange(start, min(start + ROWS_AT_ONCE, index.ntotal)) for start in starts)
    return max(float(lengths(index.reconstruct_batch(block)).max()) for block in blocks)


def flat_index(vectors: Float32) -> Any:
    """Return an index that compares with every vector."""
    index = load_faiss().IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return index


def trained_quantizer(vectors: Float32, nlist: int, seed: int) -> Any:
    """Return a flat index of the `nlist` k-means centroids of the vectors."""
    faiss = load_faiss()
    parameters = faiss.ClusteringParameters()
    parameters.seed = seed
    parameters.min_points_per_centroid = 1  # short lists are the caller's choice, not worth a warning from C++
    clustering = faiss.Clustering(vectors.shape[1], nlist, parameters)
    quantizer = faiss.IndexFlatL2(vectors.shape[1])
    clustering.train(vectors, quantizer)
    return quantizer


def ivf_flat_index(vectors: Float32, lists: Int64, quantizer: Any, nprobe: int) -> Any:
    """Return an index that compares with the vectors of some lists only.

    Args:
        vectors: shape (N, D).
        lists: shape (N,), the list of each vector.
        quantizer: index of the lists' centroids.
        nprobe: how many lists.
    """
    faiss = load_faiss()
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], quantizer.ntotal)
    lists = np.ascontiguousarray(lists)
    index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
    index.make_direct_map()  # rows can be read back by number
    index.nprobe = nprobe
    return index

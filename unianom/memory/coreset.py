"""Greedy k-centre coresets: the few rows of a feature matrix that lie closest to all others.

The rule is farthest-first traversal (Gonzalez, 1985; Sener and Savarese, "Active Learning for Convolutional Neural
Networks: A Core-Set Approach", ICLR 2018) as PatchCore uses it (Roth et al., "Towards Total Recall in Industrial
Anomaly Detection", CVPR 2022): again and again take the row that is farthest from the rows taken so far.

Taken literally, every pick measures all N rows. Here the picks are the same but most distances are never measured:

* A row's distance to its nearest taken row can only fall, so a value measured some picks ago is an upper bound. A row
  whose old bound already lies below the farthest row need not be measured until its turn comes (lazy evaluation:
  Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978).
* Rows that wait are brought up to date many picks at a time, as one matrix product instead of many passes over memory.

Matrix products round differently with the shape of the batch, so they only decide which pairs *may* matter, with a
proven margin; the distance of a pair that may matter is then taken from its definition in float64. Which pairs are
measured together, and on how many threads, therefore cannot change a pick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unianom.errors import DataError, OptionError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

FRONT_ROWS = 4096
"""How many of the (possibly) farthest rows are brought up to date before picking among them."""

BLOCK_ROWS, BLOCK_PICKS = 512, 256
"""Shape of one matrix product, small enough to stay in cache."""

TAKEN = -float(np.finfo(np.float64).tiny)
"""Distance that marks a taken row: below every real one, so it is never taken again, and zero when squared."""


@dataclass(frozen=True)
class CoresetResult:
    """The rows of a coreset.

    Attributes:
        indices: row numbers in the order of choice, shape (count,), all different.
        radius: cover radius: the largest distance from any row to its nearest chosen row.
    """

    indices: Int64
    radius: float


def random_projection(dim_in: int, dim_out: int = 128, *, seed: int) -> Float32:
    """Draw the matrix that takes features to fewer dimensions before distances are compared: `features @ matrix`.

    Entries are uniform in ±1/√dim_in: PatchCore's bias-free linear layer as PyTorch initialises it.

    Returns:
        shape (dim_in, dim_out), float32.

    Raises:
        OptionError: a dimension is below one.
    """
    if dim_in < 1 or dim_out < 1:
        raise OptionError(f"a random projection needs dimensions of at least 1, got {dim_in} to {dim_out}")
    limit = 1 / np.sqrt(dim_in)
    return np.random.default_rng(seed).uniform(-limit, limit, (dim_in, dim_out)).astype(np.float32)


def greedy_coreset(
    features: Float32,
    count: int,
    seed: int,
    start_points: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> CoresetResult:
    """Choose PatchCore's approximate greedy coreset: farthest-first from the mean distance to a few random rows.

    The random rows only set the first distances; they are not part of the coreset unless they get picked.

    Args:
        features: shape (N, D), usually after `random_projection`.
        count: how many rows to choose.
        seed: chooses the start rows.
        start_points: how many start rows; fewer if there are fewer rows.
        progress: called now and then with (rows chosen, count).

    Raises:
        OptionError: `count` is not in 1..N or `start_points` is below one.
        DataError: features are not a finite matrix.
    """
    features = _checked(features, count)
    if start_points < 1:
        raise OptionError(f"start_points must be at least 1, got {start_points}")
    rows = len(features)
    starts = np.random.default_rng(seed).choice(rows, size=min(start_points, rows), replace=False)
    mean = np.zeros(rows)
    for first in range(0, rows, BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        for start in starts:
            mean[block] += row_distances(features[block], features[start])
    return farthest_points(features, mean / len(starts), count, progress)


def farthest_points(
    features: Float32,
    initial: NDArray[np.floating],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> CoresetResult:
    """Choose rows farthest-first from given first distances; of equal distances, the lowest row number is chosen.

    Args:
        features: shape (N, D).
        initial: shape (N,): the distance each row starts with, e.g. to the rows of an earlier coreset.
        count: how many rows to choose.
        progress: called now and then with (rows chosen, count).

    Returns:
        The chosen rows. Once all distinct rows are taken, the rest are duplicates, lowest row number first.

    Raises:
        OptionError: `count` is not in 1..N.
        DataError: features are not a finite matrix, or `initial` does not hold one distance for each row.
    """
    features = _checked(features, count)
    start: Float64 = np.asarray(initial, dtype=np.float64)
    if start.shape != (len(features),) or not (np.isfinite(start) & (start >= 0)).all():
        raise DataError(f"initial must hold one finite distance >= 0 for each of the {len(features)} rows")
    traversal = _Traversal(features, start, count)
    while traversal.taken < count:
        traversal.pick_some()
        if progress is not None:
            progress(traversal.taken, count)
    return CoresetResult(traversal.picks, traversal.cover_radius())


def _checked(features: Float32, count: int) -> Float32:
    features = np.ascontiguousarray(features, dtype=np.float32)
    if features.ndim != 2 or features.size == 0:
        raise DataError(f"a coreset needs features of shape (rows, dimensions), got {features.shape}")
    if not 1 <= count <= len(features):
        raise OptionError(f"a coreset of {count} rows cannot be chosen from {len(features)}; choose 1 to that many")
    largest = max(features.max(), -features.min())  # NaN and infinity carry through
    if not largest < 1e15:
        raise DataError(f"features for a coreset hold NaN, infinite or absurd values (largest {largest})")
    return features


def row_distances(a: Float32, b: Float32) -> Float64:
    """Compute the distance of each row of `a` to `b` (one row, or one for each of `a`): √Σ(a−b)² in float64.

    einsum sums each row on its own, in an order that depends on nothing but D.
    """
    difference = a.astype(np.float64)
    difference -= b
    return np.sqrt(np.einsum("nd,nd->n", difference, difference))


class _Traversal:
    """State of a farthest-first traversal.

    Invariant: `bound[row]` is the exact distance of the row to the nearest of the first `seen[row]` picks (or
    its initial one, if lower), hence an upper bound of the distance to the nearest of all picks. TAKEN marks picks.
    """

    def __init__(self, features: Float32, initial: Float64, count: int) -> None:
        rows, dim = features.shape
        self.features = features
        self.initial = initial
        self.bound = initial.copy()
        self.seen = np.zeros(rows, dtype=np.int64)
        self.picks = np.empty(count, dtype=np.int64)
        self.taken = 0
        # |x−c|² ≈ |x|² + |c|² − 2x·c in float32, on centred features, where rounding weighs least.
        self.centred = features - features.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.square = np.einsum("nd,nd->n", self.centred, self.centred, dtype=np.float64)
        self.length = np.sqrt(self.square)
        self.pick_vectors = np.empty((count, dim), dtype=np.float32)  # −2c
        self.pick_squares = np.empty(count, dtype=np.float32)  # |c|²
        # Rounding of a dot product is at most D·u·|x||c| in any order of summation (Higham, "Accuracy and Stability
        # of Numerical Algorithms", §3.1); 16u more cover centring, the squares and the sums.
        self.unit_error = (dim + 16) * float(np.finfo(np.float32).eps) / 2

    def _margin(self, rows: Int64, longest_pick: float) -> Float64:
        """Return the most by which the float32 squared distance of these rows to any pick can be wrong."""
        return self.unit_error * (self.length[rows] + longest_pick) ** 2 + float(np.finfo(np.float32).tiny)

    def pick_some(self) -> None:
        """Take at least one more row."""
        if self.bound.max() <= 0:  # only duplicates of taken rows are left
            rest = np.flatnonzero(self.bound == 0)[: len(self.picks) - self.taken]
            self._take(rest)
            self.bound[rest] = TAKEN
            return
        rows, limit = self._front()
        centred, features = self.centred[rows], self.features[rows]
        square, bound = self.square[rows], self.bound[rows]
        lowest = square - self._margin(rows, float(self.length[rows].max()))
        while self.taken < len(self.picks):
            best = int(bound.argmax())  # the first of equals: rows are in order
            if bound[best] <= limit:  # a row outside the front may be as far
                break
            self._take(rows[best : best + 1])
            near = np.flatnonzero(centred @ self.pick_vectors[self.taken - 1] + square[best] + lowest <= bound**2)
            bound[near] = np.minimum(bound[near], row_distances(features[near], features[best]))
            bound[best] = TAKEN
        self.bound[rows] = bound
        self.seen[rows] = self.taken

    def _take(self, rows: Int64) -> None:
        new = slice(self.taken, self.taken + len(rows))
        self.picks[new] = rows
        self.pick_vectors[new] = -2 * self.centred[rows]
        self.pick_squares[new] = self.square[rows]
        self.taken += len(rows)

    def _front(self) -> tuple[Int64, float]:
        """Return up-to-date rows, in order, that are farther than a limit, and the limit that no other row exceeds."""
        size = FRONT_ROWS
        while True:
            if size < len(self.bound):
                order = np.argpartition(self.bound, -size)
                front, limit = order[-size:], float(self.bound[order[-size]])
            else:
                front, limit = np.arange(len(self.bound)), TAKEN
            front = front[self.bound[front] > limit]
            if front.size == 0:  # more than `size` rows are equally far
                size *= 2
                continue
            self._bring_up_to_date(front, limit)
            front = front[self.bound[front] > limit]
            if front.size:
                return np.sort(front), limit

    def _bring_up_to_date(self, rows: Int64, limit: float) -> None:
        """Measure rows against the picks they have not seen, until their bound falls to the limit."""
        for first in range(int(self.seen[rows].min()), self.taken, BLOCK_PICKS):
            last = min(first + BLOCK_PICKS, self.taken)
            rows = rows[self.bound[rows] > limit]
            behind = rows[self.seen[rows] < last]
            for start in range(0, len(behind), BLOCK_ROWS):
                self._measure(behind[start : start + BLOCK_ROWS], first, last)
            self.seen[behind] = last

    def _measure(self, rows: Int64, first: int, last: int) -> None:
        """Lower the bounds of rows by the picks first..last."""
        product = self.centred[rows] @ self.pick_vectors[first:last].T  # rows × picks
        product += self.pick_squares[first:last]
        margin = self._margin(rows, float(self.length[self.picks[first:last]].max()))
        nearest = product.min(axis=1) + self.square[rows]
        bound = self.bound[rows] ** 2
        limit = np.minimum(nearest + margin, bound) + margin - self.square[rows]
        closer = np.flatnonzero(nearest - margin <= bound)
        row, pick = np.nonzero(product[closer] <= limit[closer, None])
        row = rows[closer[row]]
        distance = row_distances(self.features[row], self.features[self.picks[first + pick]])
        np.minimum.at(self.bound, row, distance)

    def cover_radius(self) -> float:
        """Return the largest distance of any row to its nearest pick."""
        # A row still at its initial value has no measured pick yet: its initial value is not a distance to one.
        unmeasured = self.bound == self.initial
        self.bound[unmeasured] = np.inf
        self.seen[unmeasured] = 0
        if self.bound.max() <= 0:
            return 0.0
        rows, _ = self._front()
        return float(self.bound[rows].max())

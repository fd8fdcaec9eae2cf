"""How far two sets of images rank settings alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 1000
"""Of the bootstrap."""


def rank_correlation(validation: ArrayLike, test: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return how far validation images rank settings as the test set does.

    Args:
        validation: (N,) objective of each setting without test data; None and NaN are left out.
        test: (N,) its objective on the test set.
        seed: of the bootstrap.

    Returns:
        n (pairs), spearman (ρ), kendall (τ-b), both None where undefined, and spearman_interval: low and high of the
        percentile bootstrap at 95 % over 1,000 resamples of the pairs, None below 4 pairs.
    """
    pairs = np.stack([np.asarray(validation, np.float64), np.asarray(test, np.float64)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    n = pairs.shape[1]
    found: dict[str, Any] = {"n": n, "spearman": None, "kendall": None, "spearman_interval": None}
    if n < 2 or (np.ptp(pairs, axis=1) == 0).any():
        return found
    found["spearman"] = float(_spearman(pairs[None])[0])
    found["kendall"] = float(stats.kendalltau(*pairs).statistic)
    if n >= 4:
        drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
        drawn_rho = _spearman(pairs[:, drawn].transpose(1, 0, 2))
        low, high = np.nanquantile(drawn_rho, (0.025, 0.975))  # NaN: a resample of one value only
        found["spearman_interval"] = [float(low), float(high)]
    return found


def _spearman(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (R,) ρ of R×2×N values; NaN where a side is constant."""
    ranks = stats.rankdata(pairs, axis=2)
    ranks = ranks - ranks.mean(axis=2, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=2).prod(axis=1))
    with np.errstate(invalid="ignore"):
        return (ranks[:, 0] * ranks[:, 1]).sum(axis=1) / scale

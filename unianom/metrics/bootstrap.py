"""Confidence intervals of metrics by resampling images (the percentile bootstrap, Efron 1979).

Images are what was drawn from the world, so images are drawn again: pixels of one image stand and fall together.
Draws keep the number of normal and of anomalous images of each group (stratified), so every metric stays defined.
A resample is told by how often it holds each image; all resamples are computed together, from counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unianom.metrics.curves import Array

_AT_ONCE = 1 << 22
"""Numbers in one intermediate array."""


def draw_resamples(strata: ArrayLike, resamples: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Draw images anew; return how often each is drawn, (resamples, n). Each stratum is drawn from with replacement, to
    its own size.

    Args:
        strata: (n,) integers; images of the same one can stand for each other.
        resamples: how many.
        rng: where the draws come from.
    """
    groups = np.asarray(strata)
    drawn = np.zeros((resamples, len(groups)), np.int32)
    for stratum in np.unique(groups):
        members = np.flatnonzero(groups == stratum)
        size = len(members)
        for rows in chunks(resamples, size):
            picks = rng.integers(0, size, (len(rows), size)) + size * np.arange(len(rows))[:, None]
            counts = np.bincount(picks.ravel(), minlength=len(rows) * size)
            drawn[rows[0] : rows[-1] + 1, members] = counts.reshape(len(rows), size)
    return drawn


def image_resamples(scores: ArrayLike, labels: ArrayLike, drawn: Array) -> dict[str, NDArray[np.float64]]:
    """Compute image_auroc and image_ap of every resample, (resamples,) each; see `unianom.metrics.image.image_metrics`.

    Args:
        scores: (n,) finite image scores.
        labels: (n,) 0 normal, 1 anomalous.
        drawn: (resamples, n) how often each image is in each resample.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    anomalous = truth[order] == 1
    found = []
    for rows in chunks(len(drawn), len(values)):
        counts = drawn[rows][:, order]
        sums = [np.add.reduceat(counts * own, starts, axis=1) for own in (~anomalous, anomalous)]
        found.append(np.stack(histogram_auroc_ap(*sums)))
    auroc, ap = np.concatenate(found, axis=1)
    return {"image_auroc": auroc, "image_ap": ap}


def histogram_auroc_ap(normal: Array, anomalous: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute AUROC and AP of many histograms, (r,) each, scores of a bin tied; NaN without scores of both kinds.

    Args:
        normal, anomalous: (r, k) counts, bins from the lowest score up.
    """
    reached, passed = np.cumsum(anomalous, axis=1, dtype=np.float64), np.cumsum(normal, axis=1, dtype=np.float64)
    total, normals = reached[:, -1:], passed[:, -1:]
    won = np.sum(anomalous * (passed - normal / 2), axis=1)
    hits = total - reached + anomalous  # at or above each bin
    flagged = hits + normals - passed + normal
    precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    defined = (total > 0) & (normals > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = won / (total * normals)[:, 0]
        ap = np.sum(anomalous * precision, axis=1) / total[:, 0]
    return np.where(defined[:, 0], auroc, np.nan), np.where(defined[:, 0], ap, np.nan)


def histogram_aupro(normal: Array, weight: Array, limit: float) -> NDArray[np.float64]:
    """Compute AUPRO of many histograms, (r,); NaN without normal pixels or regions.

    Args:
        normal: (r, k) normal pixels, bins from the lowest score up.
        weight: (r, k) what the anomalous pixels of a bin weigh, each region the same in all.
        limit: highest false-positive rate.
    """
    counts = np.asarray(normal, np.float64)
    passed, total, regions = np.cumsum(counts, axis=1), counts.sum(axis=1, keepdims=True), weight.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        start = np.minimum((total - passed) / total, limit)
        rise = counts / total
        end = np.minimum((total - passed + counts) / total, limit)
        ramp = np.divide((end - start) ** 2, 2 * rise, out=np.zeros_like(rise), where=rise > 0)
        area = np.sum(weight * (limit - end + ramp), axis=1) / limit / regions
    return np.where((total[:, 0] > 0) & (regions > 0), area, np.nan)


def interval(values: Array, confidence: float) -> list[float] | None:
    """Return lowest and highest of the middle `confidence` share of the resamples where the metric is defined."""
    defined = values[np.isfinite(values)]
    if len(defined) == 0:
        return None
    tail = (1 - confidence) / 2
    return [float(bound) for bound in np.quantile(defined, [tail, 1 - tail])]


def chunks(count: int, width: int) -> Iterator[Sequence[int]]:
    """Yield ranges of rows such that an array of so many rows of `width` numbers stays small."""
    step = max(1, _AT_ONCE // max(1, width))
    for start in range(0, count, step):
        yield range(start, min(start + step, count))

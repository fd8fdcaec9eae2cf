"""What a threshold flags, and the numbers and curves that follow from it: AUROC, AP, F1, ROC and PR.

Scores of anomalous and of normal items (images or pixels) come apart; higher means more anomalous, and a threshold
flags every score at or above it. Only thresholds at the distinct anomalous scores are looked at. That is exact:
from one of them down to the next only false positives are added, so precision, F1 and IoU are highest at them, and
recall stays flat, so the area under a curve over the false-positive rate needs only the false positives at and just
above each of them. With few anomalous scores among many normal ones this costs one sort of the normal scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """What is flagged at each of the k distinct anomalous scores, highest first.

    Attributes:
        thresholds: (k,) the distinct anomalous scores, descending.
        position: (n_anomalous,) for each anomalous score, in the order given, its place in `thresholds`.
        true_positives: (k,) anomalous scores at or above the threshold.
        false_positives: (k,) normal scores at or above the threshold.
        false_positives_above: (k,) normal scores above the threshold; fewer than `false_positives` on ties.
        n_anomalous: number of anomalous scores.
        n_normal: number of normal scores.
    """

    thresholds: Array
    position: Array
    true_positives: Array
    false_positives: Array
    false_positives_above: Array
    n_anomalous: int
    n_normal: int

    @property
    def defined(self) -> bool:
        """True where there are scores of both kinds, without which no metric says anything."""
        return self.n_anomalous > 0 and self.n_normal > 0

    @property
    def found(self) -> Array:
        """(k,) number of anomalous scores equal to each threshold."""
        return np.diff(self.true_positives, prepend=0)

    @property
    def recall(self) -> Array:
        """(k,) share of the anomalous scores that is flagged."""
        return self.true_positives / self.n_anomalous

    @property
    def precision(self) -> Array:
        """(k,) share of the flagged scores that is anomalous."""
        return self.true_positives / (self.true_positives + self.false_positives)

    def with_more_normal(self, scores: Array) -> OperatingPoints:
        """Return the same thresholds against further normal scores, (n,), sorted ascending."""
        flagged, above = _count_flagged(scores, self.thresholds)
        return replace(
            self,
            false_positives=self.false_positives + flagged,
            false_positives_above=self.false_positives_above + above,
            n_normal=self.n_normal + len(scores),
        )


def operating_points(anomalous: Array, normal: Array) -> OperatingPoints:
    """Count what each distinct anomalous score flags.

    Args:
        anomalous: (n_anomalous,) finite scores in any order.
        normal: (n_normal,) finite scores of the same dtype, sorted ascending.
    """
    distinct, position, found = np.unique(anomalous, return_inverse=True, return_counts=True)
    thresholds = distinct[::-1]
    flagged, above = _count_flagged(normal, thresholds)
    return OperatingPoints(
        thresholds=thresholds,
        position=len(distinct) - 1 - position,
        true_positives=np.cumsum(found[::-1]),
        false_positives=flagged,
        false_positives_above=above,
        n_anomalous=len(anomalous),
        n_normal=len(normal),
    )


def _count_flagged(scores: Array, thresholds: Array) -> tuple[Array, Array]:
    """Count how many of the ascending `scores` lie at or above, and above, each threshold: (k,) each."""
    n = len(scores)
    if n == 0:
        return np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds), np.int64)
    below = np.searchsorted(scores, thresholds, side="left")
    above = n - below
    # Searching a large array is dear and few real-valued scores tie: search again only for those that do.
    tied = np.take(scores, below, mode="clip") == thresholds
    above[tied] = n - np.searchsorted(scores, thresholds[tied], side="right")
    return n - below, above


def auroc(points: OperatingPoints) -> float:
    """Compute the area under the ROC curve by the trapezoid rule, ties as diagonals; below 0.5 stays below 0.5.

    One minus the mean share of normal scores above an anomalous score, those that tie with it counted half. NaN
    unless there are both normal and anomalous scores.
    """
    if not points.defined:
        return float("nan")
    lost = np.sum(points.found * ((points.false_positives_above + points.false_positives) / 2))
    return float(1 - lost / points.n_anomalous / points.n_normal)


def average_precision(points: OperatingPoints) -> float:
    """Compute average precision Σ (R_n − R_{n−1}) P_n over descending thresholds, without interpolation.

    NaN unless there are both normal and anomalous scores.
    """
    if not points.defined:
        return float("nan")
    return float(np.sum(points.found * points.precision) / points.n_anomalous)


def f1_scores(points: OperatingPoints) -> Array:
    """Compute F1 = 2PR / (P + R + 1e-7) at each threshold, (k,), as the field's evaluation codes define it."""
    precision, recall = points.precision, points.recall
    return 2 * precision * recall / (precision + recall + 1e-7)


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve for a figure.

    Attributes:
        x: (p,) ascending, in [0, 1].
        y: (p,) in [0, 1]; both are empty where the curve is undefined (no anomalous or no normal scores).
    """

    x: Array
    y: Array


def roc_curve(points: OperatingPoints, max_points: int = 1000) -> Curve:
    """Return true-positive rate over false-positive rate, from (0, 0) to (1, 1), thinned to `max_points`."""
    if not points.defined:
        return Curve(np.empty(0), np.empty(0))
    return rising_curve(points, points.recall, max_points)


def rising_curve(points: OperatingPoints, recall: Array, max_points: int) -> Curve:
    """Return any recall, (k,) and 1 at the lowest threshold, over the false-positive rate, thinned to `max_points`.

    Every threshold is a horizontal run up to the normal scores above it, then a rise: vertical without ties,
    diagonal with them.
    """
    before = np.concatenate([[0.0], recall[:-1]])
    x = np.stack([points.false_positives_above, points.false_positives], axis=1).ravel() / points.n_normal
    y = np.stack([before, recall], axis=1).ravel()
    return thin(Curve(np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])), max_points)


def pr_curve(points: OperatingPoints, max_points: int = 1000) -> Curve:
    """Return precision over recall at the anomalous scores, thinned to `max_points`.

    It starts at recall 0 with the precision of the first point, the value average precision uses up to there.
    """
    if not points.defined:
        return Curve(np.empty(0), np.empty(0))
    precision = points.precision
    return thin(Curve(np.concatenate([[0.0], points.recall]), np.concatenate([precision[:1], precision])), max_points)


def thin(curve: Curve, max_points: int) -> Curve:
    """Keep at most `max_points` (2 or more) of a curve's points, its ends among them.

    Points are kept at even steps along the curve (horizontal plus vertical distance), so no point left out lies
    farther than one step, length / (max_points − 1), from the polyline through those kept. ROC and PRO curves are
    at most 2 long: 1000 points stay within 0.002 of the whole curve.
    """
    if len(curve.x) <= max_points:
        return curve
    steps = np.abs(np.diff(curve.x)) + np.abs(np.diff(curve.y))
    length = np.concatenate([[0.0], np.cumsum(steps)])
    keep = np.unique(np.searchsorted(length, np.linspace(0, length[-1], max_points)))
    return Curve(curve.x[keep], curve.y[keep])

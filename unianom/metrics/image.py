"""Image-level metrics: how well one score an image tells anomalous from normal images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from unianom.errors import DataError
from unianom.metrics.curves import (
    Curve,
    OperatingPoints,
    auroc,
    average_precision,
    f1_scores,
    operating_points,
    pr_curve,
    roc_curve,
)


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute image-level metrics of a set of scored images.

    Args:
        scores: (n,) image scores, higher is more anomalous.
        labels: (n,) 0 normal, 1 anomalous.

    Returns:
        - image_auroc: area under the ROC curve, ties as diagonals, never flipped when below 0.5.
        - image_ap: average precision Σ (R_n − R_{n−1}) P_n.
        - image_f1_max: highest F1 over all thresholds, 1e-7 in the denominator.
        - image_f1_threshold: the (highest) threshold that gives it, flagging score ≥ threshold.
        - image_accuracy_at_f1_max: accuracy at that threshold.
        - n_images, n_anomalous: counts.

        F1 and accuracy choose their threshold on the labels they are measured with, as the field reports them: they
        are upper bounds, not what a threshold set beforehand will reach. All but the counts are NaN unless there
        are both normal and anomalous images (AP and F1 would be 1 without normal ones and lift a mean over
        categories without meaning anything).

    Raises:
        DataError: shapes differ, a label is neither 0 nor 1, or a score is NaN or infinite.
    """
    points = _image_points(scores, labels)
    n_images = points.n_normal + points.n_anomalous
    counts = {"n_images": n_images, "n_anomalous": points.n_anomalous}
    if not points.defined:
        undefined = ("image_auroc", "image_ap", "image_f1_max", "image_f1_threshold", "image_accuracy_at_f1_max")
        return {**dict.fromkeys(undefined, float("nan")), **counts}
    f1 = f1_scores(points)
    best = int(np.argmax(f1))
    correct = points.true_positives[best] + points.n_normal - points.false_positives[best]
    return {
        "image_auroc": auroc(points),
        "image_ap": average_precision(points),
        "image_f1_max": float(f1[best]),
        "image_f1_threshold": float(points.thresholds[best]),
        "image_accuracy_at_f1_max": float(correct / n_images),
        **counts,
    }


def image_curves(scores: ArrayLike, labels: ArrayLike, max_points: int = 1000) -> dict[str, Curve]:
    """Return ROC and PR curve of a set of scored images, keys "roc" and "pr"; arguments and errors of
    `image_metrics`."""
    points = _image_points(scores, labels)
    return {"roc": roc_curve(points, max_points), "pr": pr_curve(points, max_points)}


def _image_points(scores: ArrayLike, labels: ArrayLike) -> OperatingPoints:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(
            f"image scores have shape {values.shape} and labels {truth.shape}; give one score and one label an image"
        )
    unknown = np.flatnonzero((truth != 0) & (truth != 1))
    if len(unknown):
        raise DataError(
            f"label of image {unknown[0]} is {truth[unknown[0]]}; it must be 0 (normal) or 1 (anomalous), "
            f"leave out images whose label is unknown"
        )
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise DataError(
            f"score of image {broken[0]} is {values[broken[0]]}; "
            f"leave out images that could not be scored, or mend the model that gave it"
        )
    return operating_points(values[truth == 1], np.sort(values[truth == 0]))

"""Metrics and curves of one kind of score: of categories, of data sets, and of the union of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.options import EvaluateOptions
from pipelines.evaluation.pixel_counts import PixelCounts
from unianom.metrics.curves import Curve
from unianom.metrics.image import image_curves, image_metrics

UNION = "union"

COUNTS = ("n_images", "n_anomalous", "n_maps", "n_anomalous_maps", "n_regions")
"""Entries of a metrics row that add up over categories instead of being averaged."""


def scope_key(category: str) -> str:
    """Return the name of a category where those of the mean and of the union of all stand, too.

    It is the category's own unless it could be taken for one of these, or for what is made of such a name here.
    """
    return f"category:{category}" if category in ("mean", UNION) or category.startswith("category:") else category


def kind_tables(
    options: EvaluateOptions, images: LabelledImages, counted: PixelCounts, kind: str, empty: Callable[[], Any]
) -> dict[str, Any]:
    """Return metrics and curves of categories, data sets and the union of all, of one kind of score."""

    @cache
    def result(groups: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        return _scope_result(options, images, counted, kind, groups, empty)

    rows = []
    for category, groups in images.categories.items():
        names = ", ".join(images.groups[group][0] for group in groups)
        rows.append({"dataset": names, "category": category, **result(groups)[0]})
    union, union_curves = result(images.everything)
    return {
        "metrics": {"categories": rows, "mean": mean_row(rows), "union": union},
        "datasets": [
            {"dataset": name, "mean": mean_row([result((g,))[0] for g in groups]), "union": result(groups)[0]}
            for name, groups in images.datasets.items()
        ],
        "curves": {scope_key(name): result(groups)[1] for name, groups in images.categories.items()}
        | {UNION: union_curves},
    }


def _scope_result(
    options: EvaluateOptions,
    images: LabelledImages,
    counted: PixelCounts,
    kind: str,
    groups: tuple[int, ...],
    empty: Callable[[], Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metrics and curves of some groups together, as plain data; NaN becomes None."""
    rows = images.within(groups)
    values, labels = images.scores[kind][rows], images.labels[rows]
    metrics: dict[str, Any] = dict(image_metrics(values, labels))
    curves: dict[str, Curve] = image_curves(values, labels, options.curve_points)
    parts = [counted.accumulators[name] for name in (images.groups[g] for g in groups) if name in counted.accumulators]
    if parts:
        pixels: Any = empty()
        for part in parts:
            pixels.merge(part)
        summary, of_pixels = pixels.summary(options.curve_points)
        if summary.n_anomalous_maps:
            metrics.update(summary.as_dict(options.soft_dice))
            curves.update({"pixel_roc": of_pixels["roc"], "pixel_pr": of_pixels["pr"], "pro": of_pixels["pro"]})
    return (
        {key: plain(value) for key, value in metrics.items()},
        {name: {"x": curve.x.tolist(), "y": curve.y.tolist()} for name, curve in curves.items()},
    )


def plain(value: float) -> float | int | None:
    """Return a metric as JSON holds it; None where it is undefined."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over the categories where a metric is defined; counts are summed."""
    keys = [key for row in rows for key in row if key not in ("dataset", "category")]
    mean: dict[str, Any] = {}
    for key in dict.fromkeys(keys):
        values = [row[key] for row in rows if row.get(key) is not None]
        if key in COUNTS:
            mean[key] = sum(values)
        elif not key.endswith("threshold"):
            mean[key] = math.fsum(values) / len(values) if values else None
    return mean

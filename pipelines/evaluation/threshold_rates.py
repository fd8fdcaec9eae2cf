"""False-positive and detection rates at the models' thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.labelled_images import RAW, LabelledImages
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet
from unianom.thresholds import threshold_of


def threshold_rates(scores: ScoreSet, images: LabelledImages) -> dict[str, Any] | None:
    """Return the rates met at the models' thresholds, by category and over all; None where no model has one.

    An image is judged by its model's threshold for its category, where there is one. Of images that several thresholds
    judge, `target_fpr` is the highest of theirs, and `promised` whether all of them promise theirs.
    """
    models = {model["digest"]: model for model in scores.manifest["models"]}
    used = [threshold for threshold in _thresholds(images, models, images.everything).values() if threshold is not None]
    if not used:
        return None
    rates = {name: _rates(images, models, groups) for name, groups in images.categories.items()}
    return {
        **_promise(used),
        "confidence": used[0]["confidence"],
        "categories": [{"category": name, **met} for name, met in rates.items() if met is not None],
        "union": _rates(images, models, images.everything),
    }


def _thresholds(
    images: LabelledImages, models: Mapping[str, Any], groups: Sequence[int]
) -> dict[tuple[str, int], dict[str, Any] | None]:
    """Return the threshold, or None, of every model and group among the images of some groups."""
    rows = images.within(groups)
    found = sorted(set(zip(images.models[rows].tolist(), images.group[rows].tolist(), strict=True)))
    return {(digest, group): threshold_of(models[digest], images.groups[group][1]) for digest, group in found}


def _promise(thresholds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "target_fpr": max(threshold["target_fpr"] for threshold in thresholds),
        "promised": all(threshold.get("promised", True) for threshold in thresholds),
    }


def _rates(images: LabelledImages, models: Mapping[str, Any], groups: Sequence[int]) -> dict[str, Any] | None:
    """Return the rates of the images of some groups; None where one of their models has no threshold."""
    thresholds = _thresholds(images, models, groups)
    used = [threshold for threshold in thresholds.values() if threshold is not None]
    if len(used) < len(thresholds):
        return None
    # by the threshold, not by `decision`: a rule stored in the model may have decided
    rows = images.within(groups)
    limits = [
        (thresholds[digest, group] or {})["value"]
        for digest, group in zip(images.models[rows].tolist(), images.group[rows].tolist(), strict=True)
    ]
    failed = images.scores[RAW][rows] > np.array(limits)
    normal, anomalous = failed[images.labels[rows] == NORMAL], failed[images.labels[rows] == ANOMALOUS]
    values = {threshold["value"] for threshold in used}
    return {
        "threshold": values.pop() if len(values) == 1 else None,
        **_promise(used),
        "n_normal": len(normal),
        "false_positive_rate": float(normal.mean()) if len(normal) else None,
        "n_anomalous": len(anomalous),
        "detection_rate": float(anomalous.mean()) if len(anomalous) else None,
    }

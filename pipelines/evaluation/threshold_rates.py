"""False-positive and detection rates at the models' thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.labelled_images import RAW, LabelledImages
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet


def threshold_rates(scores: ScoreSet, images: LabelledImages) -> dict[str, Any] | None:
    """Return the rates met at the models' thresholds, by category and over all; None where no model has one."""
    thresholds = {model["digest"]: model["threshold"] for model in scores.manifest["models"]}
    given = [threshold for threshold in thresholds.values() if threshold is not None]
    if not given:
        return None
    rates = {name: _rates(images, thresholds, groups) for name, groups in images.categories.items()}
    return {
        "target_fpr": given[0]["target_fpr"],
        "confidence": given[0]["confidence"],
        "categories": [{"category": name, **met} for name, met in rates.items() if met is not None],
        "union": _rates(images, thresholds, images.everything),
    }


def _rates(images: LabelledImages, thresholds: Mapping[str, Any], groups: Sequence[int]) -> dict[str, Any] | None:
    """Return the rates of the images of some groups; None where one of their models has no threshold."""
    rows = images.within(groups)
    used = [thresholds[digest] for digest in sorted(set(images.models[rows]))]
    if any(threshold is None for threshold in used):
        return None
    # by the threshold, not by `decision`: a rule stored in the model may have decided
    failed = images.scores[RAW][rows] > np.array([thresholds[digest]["value"] for digest in images.models[rows]])
    normal, anomalous = failed[images.labels[rows] == NORMAL], failed[images.labels[rows] == ANOMALOUS]
    values = {threshold["value"] for threshold in used}
    return {
        "threshold": values.pop() if len(values) == 1 else None,
        "n_normal": len(normal),
        "false_positive_rate": float(normal.mean()) if len(normal) else None,
        "n_anomalous": len(anomalous),
        "detection_rate": float(anomalous.mean()) if len(anomalous) else None,
    }

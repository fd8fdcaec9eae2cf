"""The choice of a threshold's false-positive rate by balanced accuracy on the validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.data.validation_set import ValidationSet
from pipelines.tuning.options import TuneCada, TuneOptions
from pipelines.tuning.records import BEST, SCORES
from pipelines.tuning.trial import Campaign
from unianom import files
from unianom.data.schema import NORMAL
from unianom.data.splits import hash_order
from unianom.thresholds import fit_threshold, normals_needed


def try_rates(campaign: Campaign, best: Mapping[str, Any], options: TuneOptions) -> list[dict[str, Any]]:
    """Return what thresholds of some rates would do.

    Each is fitted to one half of the normal validation images, and tried on the other half and on the anomalous ones.

    Args:
        campaign: the campaign.
        best: record of its best trial.
        options: of jobs/tune.py.
    """
    if not options.threshold_rates or isinstance(options, TuneCada):
        return []
    scores = files.read_array(files.join(campaign.trial_folder(best["values"]), f"{BEST}-{SCORES}"))
    validation_set = ValidationSet(best["proxy"])
    normal, anomalous = np.flatnonzero(validation_set.label == NORMAL), np.flatnonzero(validation_set.label != NORMAL)
    order = hash_order([str(number) for number in normal], options.seed)
    halves = [np.array([int(name) for name in order[part::2]]) for part in range(2)]
    rows = []
    for rate in sorted(options.threshold_rates):
        needed = normals_needed(rate, options.threshold.confidence)
        row: dict[str, Any] = {"rate": rate, "normals_needed": needed}
        if min(map(len, halves)) >= needed and len(campaign.chosen.held_out) >= needed:
            found = []
            for fitted, tried in (halves, halves[::-1]):
                threshold = fit_threshold(scores[fitted].tolist(), rate, options.threshold.confidence).value
                found.append(((scores[tried] > threshold).mean(), (scores[anomalous] > threshold).mean()))
            met, caught = np.mean(found, axis=0)
            row |= {"met": float(met), "caught": float(caught), "balanced_accuracy": float((1 - met + caught) / 2)}
        rows.append(row)
    return rows


def chosen_rate(content: Mapping[str, Any]) -> float | None:
    """Return the rate of the best balanced accuracy; None where none was to be chosen, or could be."""
    rows = [row for row in content["threshold_rates"] if "balanced_accuracy" in row]
    return max(rows, key=lambda row: row["balanced_accuracy"])["rate"] if rows else None

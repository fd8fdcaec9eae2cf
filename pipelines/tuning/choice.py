"""The choice among the trials of a campaign, and what it gains over the options as given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.data.validation_set import ValidationSet
from pipelines.tuning.objective import gain_interval
from pipelines.tuning.records import BEST, GIVEN, LATENCY, MAPS, MEMORY, SCORES
from pipelines.tuning.statuses import DONE
from pipelines.tuning.trial import Campaign
from unianom import files


def select_trial(records: Sequence[Mapping[str, Any]], prefer: str, tolerance: float) -> Mapping[str, Any]:
    """Return the best trial: of the largest objective, or the fastest or smallest within `tolerance` of that."""
    done = [record for record in records if record["status"] == DONE]
    most = max(record["objective"] for record in done)
    if prefer == "accuracy":
        return next(record for record in done if record["objective"] == most)
    near = [record for record in done if record["objective"] >= most - tolerance]
    return min(near, key=lambda record: record[LATENCY if prefer == "latency" else MEMORY])


def setting_of(campaign: Campaign, record: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return one setting of a trial with its metrics and costs; `given` holds the values that make the trial again."""
    return {
        "trial": record["trial"],
        **measured,
        "values": {**campaign.final_values(record["values"]), **measured["values"]},
        "given": {**record["values"], **measured["values"]},
        LATENCY: record[LATENCY],
        MEMORY: record[MEMORY],
    }


def is_default(campaign: Campaign, record: Mapping[str, Any]) -> bool:
    """Return whether the options of a trial are those given."""
    given = (campaign.config_of(record["values"]), campaign.fit_options(record["values"]))
    return given == (campaign.config_of({}), campaign.options)


def gain_over_default(
    campaign: Campaign, best: Mapping[str, Any], default: Mapping[str, Any] | None, seed: int
) -> dict[str, Any] | None:
    """Return what the best setting has over the options as given, and whether that is beyond chance.

    None where the latter were not measured, or on other images.
    """
    if default is None or default["proxy"] != best["proxy"]:
        return None
    validation_set = ValidationSet(best["proxy"], campaign.validation.pixel_stride)

    def predictions(record: Mapping[str, Any], which: str) -> tuple[np.ndarray, np.ndarray]:
        folder = campaign.trial_folder(record["values"])
        scores, maps = (files.read_array(files.join(folder, f"{which}-{name}")) for name in (SCORES, MAPS))
        return scores, maps

    better, worse = predictions(best, BEST), predictions(default, GIVEN)
    low, high = gain_interval(validation_set, better, worse, campaign.objective, seed=seed)
    gain = best["objective"] - default["default"]["objective"]
    return {"objective": gain, "interval": [low, high], "beyond_chance": low > 0}

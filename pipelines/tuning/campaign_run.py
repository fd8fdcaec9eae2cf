"""A campaign and what came of its trials."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipelines.tuning.records import read_settings_table
from pipelines.tuning.statuses import DONE
from pipelines.tuning.trial import Campaign


@dataclass(frozen=True)
class CampaignRun:
    """A campaign and what came of its trials.

    Attributes:
        campaign: the campaign.
        records: of all trials that have one, in the order they were begun.
        wanted: how many trials there were to be.
        seconds: it took.
        fresh: whether a trial ran.
    """

    campaign: Campaign
    records: list[dict[str, Any]]
    wanted: int
    seconds: float
    fresh: bool


def read_settings(ran: CampaignRun) -> list[dict[str, Any]]:
    """Return all settings of all trials that came to their end.

    Each has trial, values (those of the postprocess options also as text, `reading`), objective, metrics, by_category
    and by_recipe.
    """
    settings = []
    for record in ran.records:
        if record["status"] != DONE:
            continue
        values = ran.campaign.final_values(record["values"])
        for row in read_settings_table(ran.campaign.trial_folder(record["values"])):
            measured = json.loads(row["measured"]) if row["measured"] else {}
            settings.append(
                {
                    "trial": record["trial"],
                    "reading": row["values"],
                    "values": {**values, **json.loads(row["values"])},
                    "objective": row["objective"],
                    "metrics": measured.get("metrics", {}),
                    "by_category": measured.get("by_category", {}),
                    "by_recipe": measured.get("by_recipe", {}),
                }
            )
    return settings

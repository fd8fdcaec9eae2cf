"""Results of a campaign: what it chose and found, as JSON, tables and a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime import outputs
from pipelines.runtime.run_record import Run
from pipelines.tuning.campaign_run import CampaignRun
from pipelines.tuning.category_gain import category_gain, joined_settings
from pipelines.tuning.choice import gain_over_default, is_default, select_trial, setting_of
from pipelines.tuning.importance import importance
from pipelines.tuning.options import TuneOptions, per_category
from pipelines.tuning.pareto import pareto_front
from pipelines.tuning.recipes import RECIPE, difference, recipe, recipe_head, recipe_text
from pipelines.tuning.records import LATENCY, MEMORY
from pipelines.tuning.statuses import DONE, STATUSES
from pipelines.tuning.tables import of_one_kind, setting_rows, trial_rows
from pipelines.tuning.threshold_rates import chosen_rate, try_rates
from pipelines.tuning.trial import Campaign
from unianom import __version__, files
from unianom.options import to_plain

RESULT = "campaign.json"
"""File of what a campaign found."""

TOP = 5
"""Best settings that are listed, one of each trial."""


def campaign_content(ran: CampaignRun, settings: list[dict[str, Any]], options: TuneOptions) -> dict[str, Any]:
    """Return what the JSON file of a campaign says: the choice, the default, importance of options, gains, errors."""
    records, campaign = ran.records, ran.campaign
    best = select_trial(records, options.prefer, options.tolerance)
    done = [record for record in records if record["status"] == DONE]
    points = np.array([[record["objective"], record[LATENCY], record[MEMORY]] for record in done])
    front = pareto_front(points, [True, False, False])
    top = sorted(done, key=lambda record: -record["objective"])[:TOP]
    default = next((record for record in done if record["default"] and is_default(campaign, record)), None)
    rates = try_rates(campaign, best, options)
    return {
        "tool_version": __version__,
        "method": campaign.name,
        "categories": campaign.categories,
        "shards": {"uri": campaign.shards.uri, "digest": campaign.shards.digest},
        "search": options.search,
        "objective": {"metrics": campaign.objective, "validation": _in_words(campaign)},
        "counts": {
            "trials": ran.wanted,
            **{status: sum(record["status"] == status for record in records) for status in STATUSES},
            "settings": len(settings),
        },
        "seconds": ran.seconds,
        "best": setting_of(campaign, best, best["best"]),
        "default": None if default is None else setting_of(campaign, default, default["default"]),
        "gain": gain_over_default(campaign, best, default, options.seed),
        "top": [setting_of(campaign, record, record["best"]) for record in top],
        "importance": importance(
            [setting["values"] for setting in settings],
            [setting["objective"] for setting in settings],
            groups=[setting["trial"] for setting in settings],
        ),
        "front": [record["trial"] for record, on in zip(done, front, strict=True) if on],
        "category_gain": category_gain(settings) if len(campaign.categories) > 1 else [],
        "threshold_rates": rates,
        "errors": [{"trial": r["trial"], "error": r["error"]} for r in records if r["error"]],
    }


def _in_words(campaign: Campaign) -> str:
    """Return the validation images of a campaign in words."""
    for name in files.list_names(files.join(campaign.folder, "validation")):
        uri = files.join(campaign.folder, "validation", name)
        if outputs.is_complete(uri):
            kinds = files.read_json(files.join(uri, "_manifest.json"))["kinds"]
            return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items()) + " images"
    return "no images"


def write_campaign(
    ran: CampaignRun, content: dict[str, Any], settings: list[dict[str, Any]], options: TuneOptions
) -> None:
    """Write the JSON file, the tables and the recipe of a campaign."""
    folder = ran.campaign.folder
    files.write_json(files.join(folder, RESULT), content)
    table = pa.Table.from_pylist(of_one_kind(setting_rows(settings)))
    with files.open_atomic(files.join(folder, "settings.parquet")) as handle:
        pq.write_table(table, handle, compression="zstd")
    plain = recipe(ran.campaign, content["best"]["given"], chosen_rate(content))
    if per_category(options):  # the recipe of this category alone
        plain = {**plain, "per_category": False, "categories": ran.campaign.categories}
    files.write_bytes(files.join(folder, RECIPE), recipe_text(plain, recipe_head(content, RECIPE)))
    files.write_bytes(files.join(folder, "trials.csv"), files.csv_bytes(trial_rows(final_records(ran))))


def final_records(ran: CampaignRun) -> list[dict[str, Any]]:
    """Return the records of a campaign with the values that trials had at their end."""
    return [{**record, "values": ran.campaign.final_values(record["values"])} for record in ran.records]


def record_campaign(run: Run, folder: str, content: Mapping[str, Any], prefix: str) -> None:
    """Record metrics, files and figures of a campaign in MLflow, by names with a prefix."""
    for word in ("best", "default"):
        setting = content[word]
        if setting is not None:
            values = {**setting["metrics"], "objective": setting["objective"], LATENCY: setting[LATENCY]}
            run.metrics({f"{prefix}{word}/{name}": value for name, value in values.items()})
    names = ["trials.csv", "settings.parquet", RECIPE, RESULT]
    run.artifacts({prefix + name: files.read_bytes(files.join(folder, name)) for name in names})
    pictures = [name for name in files.list_names(folder) if name.endswith(".png")]
    run.figures({prefix + name: files.read_bytes(files.join(folder, name)) for name in pictures})


def write_common(
    output: str,
    ran: Mapping[str, CampaignRun],
    contents: Mapping[str, dict[str, Any]],
    settings: Mapping[str, list[dict[str, Any]]],
    run: Run,
) -> None:
    """Write the results that campaigns for single categories have in common.

    They are a recipe with an own setting for each, and, where settings were tried for all of them, what one common
    setting would lose.
    """
    first = next(iter(ran.values())).campaign
    own = {}
    for name, one in ran.items():
        config = to_plain(one.campaign.config_of(contents[name]["best"]["given"]))
        own[name] = difference(to_plain(one.campaign.config_of({})), config)
    plain = recipe(first, {}, None)
    plain |= {"categories": sorted(ran), "per_category": True, "category_options": {k: v for k, v in own.items() if v}}
    gain = category_gain(joined_settings(settings))
    means = {word: _mean([c[word]["objective"] for c in contents.values() if c[word]]) for word in ("best", "default")}
    head = [
        f"{first.name}, the best setting of each category (unianom {__version__}); mean objective {means['best']:.4f}.",
        f"python jobs/train.py {first.name} --config {RECIPE} --shards … --output …",
    ]
    files.write_bytes(files.join(output, RECIPE), recipe_text(plain, head))
    files.write_json(files.join(output, RESULT), {"categories": sorted(ran), "category_gain": gain, "mean": means})
    run.artifacts({name: files.read_bytes(files.join(output, name)) for name in (RECIPE, RESULT)})
    run.metrics({f"mean/{word}": value for word, value in means.items()})


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan

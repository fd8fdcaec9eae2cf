"""What comes of a campaign: the best setting as a recipe, tables and figures, and, once all is chosen, a diagnosis of
the choice on the test split."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.tracking import Run, scope
from pipelines.tuning import figures as shown
from pipelines.tuning.agreement import diagnose
from pipelines.tuning.objective import gain_interval
from pipelines.tuning.space import key_of
from pipelines.tuning.trial import BEST, DONE, GIVEN, LATENCY, MAPS, MEMORY, SCORES, SETTINGS, Campaign
from unianom import __version__, files, visual
from unianom.data.schema import NORMAL
from unianom.data.splits import hash_order
from unianom.methods import METHODS
from unianom.options import from_plain, merged, open_options, to_plain
from unianom.thresholds import fit_threshold, normals_needed

RESULT, RECIPE = "campaign.json", "best.yaml"
"""What a campaign found; the recipe of its best setting."""

NOT_IN_RECIPES = (
    *("shards", "output", "model", "folder", "overwrite", "tracking", "runtime"),
    *("max_failures", "checkpoint_every", "validate_every", "calibration"),
)
"""Options of fitting that say where and how safely, not what."""

COMMANDS = {"cada": "python jobs/calibrate.py --config {recipe} --model … --shards …"}
"""How a recipe is used that is not one of jobs/train.py."""

TOP = 5
"""Best settings that are listed, one of each trial."""


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


@dataclass(frozen=True)
class TuneResult:
    """What a job found.

    Attributes:
        folder: where it lies.
        fresh: whether a trial ran.
        contents: what the JSON file of each campaign says, by its categories joined with "+".
        recipe: URI of the recipe of the best setting.
        diagnosis: what its JSON file says; None if it was not asked for.
    """

    folder: str
    fresh: bool
    contents: dict[str, dict[str, Any]]
    recipe: str
    diagnosis: dict[str, Any] | None


def write_results(options: Any, output: str, ran: Mapping[str, CampaignRun], run: Run) -> TuneResult:
    """Choose, write and record.

    Args:
        options: of jobs/tune.py.
        output: of the job.
        ran: its campaigns: one, or one for each category.
        run: the MLflow run of the job.
    """
    contents, settings = {}, {}
    for name, one in ran.items():
        settings[name] = read_settings(one)
        contents[name] = _content(one, settings[name], options)
        _write_campaign(one, contents[name], settings[name], options)
        prefix = f"{scope(name)}/" if per_category(options) else ""
        _record(run, one.campaign.folder, contents[name], prefix)
    recipe = files.join(output, RECIPE)
    if per_category(options):
        _write_common(output, ran, contents, settings, options, run)
    diagnosis = None
    if options.diagnose:
        campaigns = {name: one.campaign for name, one in ran.items()}
        diagnosis = diagnose(output, campaigns, contents, settings, options, run)
    outputs.finish(output, {"campaigns": {n: c["counts"] for n, c in contents.items()}})
    return TuneResult(output, any(one.fresh for one in ran.values()), contents, recipe, diagnosis)


def per_category(options: Any) -> bool:
    """Whether a job has a campaign for each category; one that calibrates a model has not."""
    return bool(getattr(options, "per_category", False))


def read_settings(ran: CampaignRun) -> list[dict[str, Any]]:
    """All settings of all trials that came to their end: trial, values (those of the reading options also as
    text), objective, metrics and by_category."""
    settings = []
    for record in ran.records:
        if record["status"] != DONE:
            continue
        path = files.join(ran.campaign.trial_folder(record["values"]), SETTINGS)
        values = ran.campaign.shown_values(record["values"])
        for row in pq.read_table(pa.BufferReader(files.read_bytes(path))).to_pylist():
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


def select_trial(records: Sequence[Mapping[str, Any]], prefer: str, tolerance: float) -> Mapping[str, Any]:
    """The best trial: of the largest objective, or, of those within `tolerance` of it, the fastest or smallest."""
    done = [record for record in records if record["status"] == DONE]
    most = max(record["objective"] for record in done)
    if prefer == "accuracy":
        return next(record for record in done if record["objective"] == most)
    near = [record for record in done if record["objective"] >= most - tolerance]
    return min(near, key=lambda record: record[LATENCY if prefer == "latency" else MEMORY])


def _setting(campaign: Campaign, record: Mapping[str, Any], reading: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "trial": record["trial"],
        **reading,
        "values": {**campaign.shown_values(record["values"]), **reading["values"]},
        "given": {**record["values"], **reading["values"]},
        LATENCY: record[LATENCY],
        MEMORY: record[MEMORY],
    }


def _content(ran: CampaignRun, settings: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    records, campaign = ran.records, ran.campaign
    best = select_trial(records, options.prefer, options.tolerance)
    done = [record for record in records if record["status"] == DONE]
    points = np.array([[record["objective"], record[LATENCY], record[MEMORY]] for record in done])
    front = shown.pareto_front(points, [True, False, False])
    top = sorted(done, key=lambda record: -record["objective"])[:TOP]
    default = next((record for record in done if record["default"] and _is_default(campaign, record)), None)
    rates = _rates(campaign, best, options)
    return {
        "tool_version": __version__,
        "method": campaign.name,
        "categories": campaign.categories,
        "shards": {"uri": campaign.shards.uri, "digest": campaign.shards.digest},
        "search": options.search,
        "objective": {"metrics": campaign.objective, "validation": _in_words(campaign)},
        "counts": {
            "trials": ran.wanted,
            **{status: sum(record["status"] == status for record in records) for status in shown.STATUSES},
            "settings": len(settings),
        },
        "seconds": ran.seconds,
        "best": _setting(campaign, best, best["best"]),
        "default": None if default is None else _setting(campaign, default, default["default"]),
        "gain": _gain(campaign, best, default, options.seed),
        "top": [_setting(campaign, record, record["best"]) for record in top],
        "importance": shown.importance(
            [setting["values"] for setting in settings],
            [setting["objective"] for setting in settings],
            groups=[setting["trial"] for setting in settings],
        ),
        "front": [record["trial"] for record, on in zip(done, front, strict=True) if on],
        "category_gain": shown.category_gain(settings) if len(campaign.categories) > 1 else [],
        "threshold_rates": rates,
        "errors": [{"trial": r["trial"], "error": r["error"]} for r in records if r["error"]],
    }


def _is_default(campaign: Campaign, record: Mapping[str, Any]) -> bool:
    """Whether the options of a trial are those given."""
    given = (campaign.config_of(record["values"]), campaign.fit_options(record["values"]))
    return given == (campaign.config_of({}), campaign.options)


def _gain(
    campaign: Campaign, best: Mapping[str, Any], default: Mapping[str, Any] | None, seed: int
) -> dict[str, Any] | None:
    """What the best setting has over the options as given, and whether that is beyond chance; None where the latter
    were not measured, or on other images."""
    if default is None or default["proxy"] != best["proxy"]:
        return None
    validation_set = ValidationSet(best["proxy"], campaign.validation.pixel_stride)

    def seen(record: Mapping[str, Any], which: str) -> tuple[np.ndarray, np.ndarray]:
        folder = campaign.trial_folder(record["values"])
        scores, maps = (files.read_array(files.join(folder, f"{which}-{name}")) for name in (SCORES, MAPS))
        return scores, maps

    low, high = gain_interval(validation_set, seen(best, BEST), seen(default, GIVEN), campaign.objective, seed=seed)
    gain = best["objective"] - default["default"]["objective"]
    return {"objective": gain, "interval": [low, high], "beyond_chance": low > 0}


def _in_words(campaign: Campaign) -> str:
    """The validation images of a campaign."""
    for name in files.list_names(files.join(campaign.folder, "validation")):
        uri = files.join(campaign.folder, "validation", name)
        if outputs.is_complete(uri):
            kinds = files.read_json(files.join(uri, "_manifest.json"))["kinds"]
            return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items()) + " images"
    return "no images"


# ------------------------------------------------------------------------------------------------- the threshold's rate
def _rates(campaign: Campaign, best: Mapping[str, Any], options: Any) -> list[dict[str, Any]]:
    """What thresholds of some rates would do: fitted to each half of the normal validation images, tried on the other
    and on the anomalous ones."""
    if not options.threshold_rates:
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
    """The rate of the best balanced accuracy; None where none was to be chosen, or could be."""
    rows = [row for row in content["threshold_rates"] if "balanced_accuracy" in row]
    return max(rows, key=lambda row: row["balanced_accuracy"])["rate"] if rows else None


# -------------------------------------------------------------------------------------------------------------- recipes
def recipe(campaign: Campaign, values: Mapping[str, Any], rate: float | None) -> dict[str, Any]:
    """Options of jobs/train.py that fit what a trial was, as plain data; those that are defaults are left out."""
    options = campaign.fit_options(values)
    fields = [field for field in dataclasses.fields(options) if field.name not in NOT_IN_RECIPES]
    fitted = {
        field.name: to_plain(getattr(options, field.name))
        for field in fields
        if getattr(options, field.name) != _default_of(field)
    }
    if rate is not None:
        fitted = merged(fitted, {"threshold": {"target_fpr": rate}})
    if options.runtime.cpus_per_worker != 1:
        fitted["runtime"] = {"cpus_per_worker": options.runtime.cpus_per_worker}
    config = campaign.config_of(values)
    group = "method" if campaign.name in METHODS else "calibration"
    return {**fitted, group: told_options(config)}


def told_options(config: Any) -> dict[str, Any]:
    """Options that make a config when nothing else is said, as plain data: those that are not defaults, and those that
    a preset or another option would fill in otherwise."""
    cls = type(config)
    plain = to_plain(config)
    unsaid = {
        field.name: None if field.name in open_options(cls) else to_plain(_default_of(field))
        for field in dataclasses.fields(cls)
    }
    told = difference(to_plain(cls()), plain)
    while missing := difference(to_plain(from_plain(cls, merged(unsaid, told))), plain):
        told = merged(told, missing)
    return told


def _default_of(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data that `merged` turns `before` into `after` with."""
    changed: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and set(old) <= set(value):
            if inside := difference(old, value):
                changed[key] = inside
        elif value != old or key not in before:
            changed[key] = value
    return changed


def recipe_text(plain: Mapping[str, Any], head: Sequence[str]) -> bytes:
    """A recipe as YAML with a few words before it."""
    body = yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return ("".join(f"# {line}\n" for line in head) + body).encode()


def _head(content: Mapping[str, Any], where: str) -> list[str]:
    best, default = content["best"], content["default"]
    gain = "" if default is None else f", with the options as given {default['objective']:.4f}"
    if content["gain"] is not None and not content["gain"]["beyond_chance"]:
        gain += " (no gain beyond chance)"
    return [
        f"{content['method']}, best of {content['counts']['settings']} settings of a campaign (unianom {__version__}): "
        f"trial {best['trial']}.",
        f"Objective {best['objective']:.4f}{gain}, on {content['objective']['validation']}.",
        COMMANDS.get(
            content["method"], f"python jobs/train.py {content['method']} --config {{recipe}} --shards … --output …"
        ).format(recipe=where),
    ]


# -------------------------------------------------------------------------------------------------------------- writing
def _write_campaign(ran: CampaignRun, content: dict[str, Any], settings: list[dict[str, Any]], options: Any) -> None:
    folder, records = ran.campaign.folder, ran.records
    files.write_json(files.join(folder, RESULT), content)
    table = pa.Table.from_pylist(_one_kind(shown.setting_rows(settings)))
    with files.open_atomic(files.join(folder, "settings.parquet")) as handle:
        pq.write_table(table, handle, compression="zstd")
    plain = recipe(ran.campaign, content["best"]["given"], chosen_rate(content))
    if per_category(options):  # the recipe of this category alone
        plain = {**plain, "per_category": False, "categories": ran.campaign.categories}
    files.write_bytes(files.join(folder, RECIPE), recipe_text(plain, _head(content, RECIPE)))
    records = [{**record, "values": ran.campaign.shown_values(record["values"])} for record in records]
    files.write_bytes(files.join(folder, "trials.csv"), files.csv_bytes(shown.trial_rows(records)))
    figures = {
        "parallel.png": ("Settings: options from left to right", shown.parallel_coordinates(settings, content["best"])),
        "importance.png": ("Importance of the options", shown.importance_figure(content["importance"])),
        "slices.png": ("Objective against each option", shown.slices_figure(settings)),
        "trials.png": ("Trials", shown.history_figure(records)),
        "pareto.png": ("Accuracy, latency and memory", shown.pareto_figure(records, content["front"])),
    }
    for name, (_, figure) in figures.items():
        files.write_bytes(files.join(folder, name), visual.png(figure))
    title = f"Campaign: {content['method']} on {', '.join(content['categories'])}"
    part = shown.section(title, content, {name: words for name, (words, _) in figures.items()})
    files.write_json(files.join(folder, "section.json"), part)


def _one_kind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose columns hold values of one kind each, as Parquet needs: text where numbers and others are mixed."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    mixed = {
        name
        for name in names
        if len(
            {
                float if isinstance(v, int | float) and not isinstance(v, bool) else type(v)
                for row in rows
                if (v := row.get(name)) is not None
            }
        )
        > 1
    }
    kept = []
    for row in rows:
        kept.append({name: _one_value(row.get(name), name in mixed) for name in names})
    return kept


def _one_value(value: Any, as_text: bool) -> Any:
    if as_text and value is not None:
        return str(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _record(run: Run, folder: str, content: Mapping[str, Any], prefix: str) -> None:
    for word in ("best", "default"):
        setting = content[word]
        if setting is not None:
            values = {**setting["metrics"], "objective": setting["objective"], LATENCY: setting[LATENCY]}
            run.metrics({f"{prefix}{word}/{name}": value for name, value in values.items()})
    names = ["trials.csv", "settings.parquet", RECIPE, RESULT]
    run.artifacts({prefix + name: files.read_bytes(files.join(folder, name)) for name in names})
    pictures = [name for name in files.list_names(folder) if name.endswith(".png")]
    run.figures({prefix + name: files.read_bytes(files.join(folder, name)) for name in pictures})


def _write_common(
    output: str,
    ran: Mapping[str, CampaignRun],
    contents: Mapping[str, dict[str, Any]],
    settings: Mapping[str, list[dict[str, Any]]],
    options: Any,
    run: Run,
) -> None:
    """Of campaigns for single categories: a recipe with an own setting for each, and, where settings were tried for
    all of them, what one common setting would lose."""
    first = next(iter(ran.values())).campaign
    own = {}
    for name, one in ran.items():
        config = to_plain(one.campaign.config_of(contents[name]["best"]["given"]))
        own[name] = difference(to_plain(one.campaign.config_of({})), config)
    plain = recipe(first, {}, None)
    plain |= {"categories": sorted(ran), "per_category": True, "category_options": {k: v for k, v in own.items() if v}}
    gain = shown.category_gain(joined_settings(settings))
    means = {word: _mean([c[word]["objective"] for c in contents.values() if c[word]]) for word in ("best", "default")}
    head = [
        f"{first.name}, the best setting of each category (unianom {__version__}); mean objective {means['best']:.4f}.",
        f"python jobs/train.py {first.name} --config {RECIPE} --shards … --output …",
    ]
    files.write_bytes(files.join(output, RECIPE), recipe_text(plain, head))
    files.write_json(files.join(output, RESULT), {"categories": sorted(ran), "category_gain": gain, "mean": means})
    run.artifacts({name: files.read_bytes(files.join(output, name)) for name in (RECIPE, RESULT)})
    run.metrics({f"mean/{word}": value for word, value in means.items()})


def joined_settings(settings: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Settings of campaigns for single categories, joined by their values."""
    joined: dict[str, dict[str, Any]] = {}
    for rows in settings.values():
        for row in rows:
            one = joined.setdefault(key_of(row["values"]), {**row, "by_category": {}})
            one["by_category"] = {**one["by_category"], **row["by_category"]}
    return list(joined.values())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan

"""Recipes: the options of jobs/train.py that train a trial again, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipelines.tuning.trial import Campaign
from unianom import __version__
from unianom.execution import precision_of
from unianom.methods import METHODS
from unianom.options import from_plain, merged, open_options, to_plain

RECIPE = "best.yaml"
"""File of the recipe of the best setting."""

NOT_IN_RECIPES = (
    *("shards", "output", "model", "folder", "overwrite", "tracking", "runtime"),
    *("max_failures", "checkpoint_every", "validate_every", "calibration"),
)
"""Options of fitting that say where and how safely, not what."""

COMMANDS = {"cada": "python jobs/calibrate.py --config {recipe} --model … --shards …"}
"""How a recipe is used that is not one of jobs/train.py."""


def recipe(campaign: Campaign, values: Mapping[str, Any], rate: float | None) -> dict[str, Any]:
    """Return the options of jobs/train.py that fit a trial again, as plain data without those that are defaults."""
    options = campaign.fit_options(values)
    fields = [field for field in dataclasses.fields(options) if field.name not in NOT_IN_RECIPES]
    fitted = {
        field.name: to_plain(getattr(options, field.name))
        for field in fields
        if getattr(options, field.name) != _default_of(field)
    }
    if rate is not None:
        fitted = merged(fitted, {"threshold": {"target_fpr": rate}})
    runtime: dict[str, Any] = {}
    if options.runtime.cpus_per_worker != 1:
        runtime["cpus_per_worker"] = options.runtime.cpus_per_worker
    if precision_of(options.runtime.execution.engine) != "float32":
        runtime["engine"] = options.runtime.engine
    if runtime:
        fitted["runtime"] = runtime
    config = campaign.config_of(values)
    group = "method" if campaign.name in METHODS else "calibration"
    return {**fitted, group: minimal_options(config)}


def minimal_options(config: Any) -> dict[str, Any]:
    """Return options that make a config when no other is given, as plain data.

    They are those that are not defaults, and those that a preset or another option would fill in otherwise.
    """
    cls = type(config)
    plain = to_plain(config)
    absent = {
        field.name: None if field.name in open_options(cls) else to_plain(_default_of(field))
        for field in dataclasses.fields(cls)
    }
    needed = difference(to_plain(cls()), plain)
    while missing := difference(to_plain(from_plain(cls, merged(absent, needed))), plain):
        needed = merged(needed, missing)
    return needed


def _default_of(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested plain data that `merged` turns `before` into `after` with."""
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
    """Return a recipe as YAML with a few comment lines before it."""
    body = yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return ("".join(f"# {line}\n" for line in head) + body).encode()


def recipe_head(content: Mapping[str, Any], where: str) -> list[str]:
    """Return comment lines of a campaign's recipe: which setting it is, how good, how to use it."""
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

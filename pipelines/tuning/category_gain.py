"""What each category would gain by a setting of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tuning.space import key_of


def category_gain(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each category would gain by a setting of its own.

    Args:
        settings: those without a category of the others cannot be the common one.

    Returns:
        Rows of category ("mean" last), common (objective there of the setting with the largest mean over the
        categories), own (of the category's own best setting), gain (own − common), and trial and values of the own
        best setting, in the last row of the common one; nothing if no setting holds all categories.
    """
    known = [
        {name: float(y) for name, y in (setting.get("by_category") or {}).items() if y is not None and math.isfinite(y)}
        for setting in settings
    ]
    names = sorted({name for found in known for name in found})
    whole = [number for number, found in enumerate(known) if len(found) == len(names)]
    if not names or not whole:
        return []
    common = max(whole, key=lambda number: math.fsum(known[number].values()))
    rows = []
    for name in names:
        own = max((number for number, found in enumerate(known) if name in found), key=lambda n: known[n][name])
        rows.append(_gain(name, known[common][name], known[own][name], settings[own]))
    means = [math.fsum(row[key] for row in rows) / len(rows) for key in ("common", "own")]
    return [*rows, _gain("mean", means[0], means[1], settings[common])]


def _gain(name: str, common: float, own: float, setting: Mapping[str, Any]) -> dict[str, Any]:
    values = {"trial": setting.get("trial"), "values": dict(setting.get("values") or {})}
    return {"category": name, "common": common, "own": own, "gain": own - common, **values}


def joined_settings(settings: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join settings of campaigns for single categories by their values."""
    joined: dict[str, dict[str, Any]] = {}
    for rows in settings.values():
        for row in rows:
            one = joined.setdefault(key_of(row["values"]), {**row, "by_category": {}})
            one["by_category"] = {**one["by_category"], **row["by_category"]}
    return list(joined.values())

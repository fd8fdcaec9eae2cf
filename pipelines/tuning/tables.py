"""Trials and settings of a campaign as flat tables, for CSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tuning.wording import is_number


def trial_rows(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a flat row for each trial, with a column for each option."""
    keys = ("objective", "seconds", "latency_ms", "memory_mb")
    return [
        {
            "trial": trial["trial"],
            "status": trial["status"],
            "progress": max((report["progress"] for report in trial.get("reports") or ()), default=None),
            **{key: trial.get(key) for key in keys},
            **{option: _cell(value) for option, value in trial["values"].items()},
            "error": trial.get("error"),
        }
        for trial in trials
    ]


def setting_rows(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a flat row for each setting.

    It has a column for each option, metric and category (`CATEGORY/objective`).
    """
    return [
        {
            "trial": setting["trial"],
            "objective": setting["objective"],
            **{option: _cell(value) for option, value in setting["values"].items()},
            **(setting.get("metrics") or {}),
            **{f"{name}/objective": value for name, value in (setting.get("by_category") or {}).items()},
        }
        for setting in settings
    ]


def _cell(value: Any) -> Any:
    """Return a value for CSV, where an empty cell says that a trial has no such option.

    Text and numbers stay, others are JSON.
    """
    return value if isinstance(value, str) or is_number(value) else json.dumps(value)


def of_one_kind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose columns hold values of one kind each, as Parquet needs: mixed ones become text."""
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

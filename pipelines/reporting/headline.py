"""The short table of an evaluation: protocols side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.reporting.metric_text import aupro_keys, percent, short_name

HEADLINE = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap")
"""Metrics of the short table, before AUPRO."""


def headline_keys(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of the short table that are defined, and how they are shown."""
    mean = evaluation["metrics"]["mean"]
    return {key: short_name(key) for key in (*HEADLINE, *aupro_keys(mean)) if mean.get(key) is not None}


def headline_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the short table: mean of categories and union of all, raw and calibrated, each
    figure in % with its interval."""
    keys, intervals = headline_keys(evaluation), evaluation.get("intervals") or {}
    rows = []
    for kind, tables in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        if tables is None:
            continue
        for scope, words in (("mean", "model-unified (mean of categories)"), ("union", "absolute-unified (union)")):
            bounds = (intervals.get(kind) or {}).get(scope, {})
            cells = [_with_interval(tables["metrics"][scope].get(key), bounds.get(key)) for key in keys]
            rows.append([f"{kind}, {words}", *cells])
    return list(keys.values()), rows


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    if bounds is None:
        return percent(value)
    return f"{percent(value)} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def dataset_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of mean and union of each data set, raw and calibrated; none of a single data set."""
    if len(evaluation.get("datasets", [])) < 2:
        return []
    keys = headline_keys(evaluation)
    rows = []
    for kind, tables in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        for entry in tables["datasets"] if tables is not None else []:
            for scope in ("mean", "union"):
                cells = [percent(entry[scope].get(key)) for key in keys]
                rows.append([entry["dataset"], f"{kind}, {scope}", *cells, f"{entry[scope]['n_images']:,}"])
    return sorted(rows, key=lambda row: row[0])


def largest_error(evaluation: Mapping[str, Any]) -> float:
    """Return the most that a pixel metric of the union can be off, raw or calibrated, in percentage points."""
    kinds = (evaluation, evaluation.get("calibrated"))
    unions = [tables["metrics"]["union"] for tables in kinds if tables is not None]
    return 100 * max((v for row in unions for k, v in row.items() if k.endswith("_error") and v is not None), default=0)

"""The first screen of a report: does it work on these images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.metric_text import aupro_keys, percent
from pipelines.reporting.outcomes import Outcome, counted
from pipelines.reporting.samples import text_column
from unianom.thresholds import promise_in_words, threshold_of

TILES = (("image AUROC", "image_auroc"), ("pixel AUROC", "pixel_auroc"))
"""Headline figures by their key, before AUPRO."""


def worst_first(inputs: Sequence[ReportInput]) -> list[str]:
    """Return the categories: the largest share of wrong decisions first, then the lowest image AUROC."""
    wrong: dict[str, list[float]] = {}
    auroc: dict[str, list[float]] = {}
    for entry in inputs:
        for name, of_category in entry.outcomes[1].items():
            wrong.setdefault(name, []).append(of_category.wrong_share)
        for row in entry.evaluation["metrics"]["categories"] if entry.evaluation else []:
            if row.get("image_auroc") is not None:
                auroc.setdefault(row["category"], []).append(row["image_auroc"])

    def place(name: str) -> tuple[float, float, str]:
        return -float(np.mean(wrong[name])), float(np.mean(auroc[name])) if name in auroc else 2.0, name

    return sorted(wrong, key=place)


def threshold_lines(entry: ReportInput) -> list[str]:
    """Return the thresholds of an input and their promises in words, each promise once."""
    categories = sorted(set(text_column(entry.table, "category")))
    used = dict.fromkeys(zip(text_column(entry.table, "model"), text_column(entry.table, "category")))
    models = {model["digest"]: model for model in entry.models}
    values: dict[str, dict[float, list[str]]] = {}
    without: list[str] = []
    for digest, category in used:
        found = threshold_of(models[digest], category)
        if found is None:
            without.append(category)
        else:
            values.setdefault(promise_in_words(found), {}).setdefault(found["value"], []).append(category)
    lines = []
    for words, by_value in values.items():
        of = [category for names in by_value.values() for category in names]
        where = "" if len(of) == len(categories) else f" of {', '.join(sorted(of))}"
        if len(by_value) == 1:
            lines.append(f"Threshold{where} {next(iter(by_value)):.4g}: {words}.")
        else:
            each = ", ".join(f"{', '.join(names)} {value:.4g}" for value, names in by_value.items())
            lines.append(f"Thresholds ({each}): {words}.")
    if without:
        lines.append("No threshold" + (f" for {', '.join(sorted(without))}." if values else "."))
    return lines


def headline_tiles(entry: ReportInput, total: Outcome) -> list[dict[str, str]]:
    """Return the few figures that are looked for first: name, value with unit, what it is of, and whether it is good
    or bad news."""
    tiles = []
    if total.decided and total.anomalous:
        of = f"{_share(total.missed, total.anomalous)} of the anomalous images"
        tiles.append(_tile("missed", f"{total.missed:,} of {total.anomalous:,}", of, total.missed))
    if total.decided and total.normal:
        of = f"{_share(total.false_alarms, total.normal)} of the normal images"
        tiles.append(_tile("flagged wrongly", f"{total.false_alarms:,} of {total.normal:,}", of, total.false_alarms))
    if entry.evaluation is None:
        return tiles
    metrics = entry.evaluation["metrics"]
    several = len(metrics["categories"]) > 1
    for name, key in [*TILES, *(("AUPRO", key) for key in aupro_keys(metrics["mean"]))]:
        if metrics["mean"].get(key) is not None:
            union = f"mean of categories; union {percent(metrics['union'].get(key))} %" if several else ""
            tiles.append({"name": name, "value": f"{percent(metrics['mean'][key])} %", "of": union, "news": ""})
    return tiles


def _tile(name: str, value: str, of: str, wrong: int) -> dict[str, str]:
    return {"name": name, "value": value, "of": of, "news": "bad" if wrong else "good"}


def _share(count: int, of: int) -> str:
    return f"{percent(count / of)} %"


def category_lines(name: str, inputs: Sequence[ReportInput]) -> list[dict[str, str]]:
    """Return of each input its name ("" of a single one), its figures of a category, and what it missed there."""
    lines = []
    for entry in inputs:
        of = entry.outcomes[1].get(name)
        if of is None:
            continue
        parts = []
        if of.decided and of.anomalous:
            parts.append(f"missed {of.missed:,} of {of.anomalous:,}")
        if of.decided and of.normal:
            parts.append(f"flagged {of.false_alarms:,} of {counted(of.normal, 'normal image')}")
        rows = entry.evaluation["metrics"]["categories"] if entry.evaluation else []
        value = next((row.get("image_auroc") for row in rows if row["category"] == name), None)
        if value is not None:
            parts.append(f"image AUROC {percent(value)} %")
        shown = entry.name if len(inputs) > 1 else ""
        lines.append({"name": shown, "figures": " · ".join(parts), "missed": of.missed_words})
    return lines


def wrong_rows(entry: ReportInput, margin: np.ndarray, most: int = 200) -> dict[str, Any]:
    """Return the images that were judged wrongly, the furthest from the threshold first: missed ones, then false
    alarms; their number, and at most so many of them.

    Args:
        entry: the input.
        margin: (n,) of each row of its table.
        most: rows at most.
    """
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(entry.table.to_pylist()):
        kind = {(1, "pass"): "missed", (0, "fail"): "false alarm"}.get((row["label"], row["decision"]))
        if kind:
            rows.append({**row, "verdict": kind, "margin": round(float(margin[number]), 1) + 0.0})
    rows.sort(key=lambda row: (row["verdict"] != "missed", -abs(row["margin"]), row["sample_id"]))
    return {"count": len(rows), "rows": rows[:most]}

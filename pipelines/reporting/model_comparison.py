"""Tables of a report on several models: one column a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.reporting.headline import headline_keys
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.metric_text import UNDEFINED, percent, short_name
from pipelines.reporting.outcomes import Outcome
from pipelines.reporting.overview import threshold_lines

NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
}
"""Metrics as the first screen calls them."""


def headline_table(inputs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """Return the rows of the table of models: a name and a cell a model; the best is marked."""
    totals = [entry.outcomes[0] for entry in inputs]
    rows = [
        _counts("missed anomalous images", totals, lambda o: (o.missed, o.anomalous)),
        _counts("flagged normal images", totals, lambda o: (o.false_alarms, o.normal)),
    ]
    for key in _keys(inputs):
        values = [_metrics(entry)["mean"].get(key) for entry in inputs]
        rows.append(_row(NAMES.get(key, short_name(key)), values, [f"{percent(v)} %" for v in values], max))
    words = [" ".join(threshold_lines(entry)) for entry in inputs]
    rows.append({"name": "threshold", "text": True, "cells": [{"text": w, "best": False} for w in words]})
    return [row for row in rows if any(cell["text"] not in (UNDEFINED, f"{UNDEFINED} %") for cell in row["cells"])]


def _counts(name: str, totals: Sequence[Outcome], numbers: Callable[[Outcome], tuple[int, int]]) -> dict[str, Any]:
    """Return a row of "3 of 40", fewest best; a dash where nothing is decided or there is no such image."""
    shares: list[float | None] = []
    texts = []
    for total in totals:
        wrong, every = numbers(total)
        known = total.decided and every > 0
        shares.append(wrong / every if known else None)
        texts.append(f"{wrong:,} of {every:,} ({percent(wrong / every)} %)" if known else UNDEFINED)
    return _row(name, shares, texts, min)


def _row(name: str, values: Sequence[float | None], texts: Sequence[str], best: Callable[..., float]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    first = best(known) if len(set(known)) > 1 else None
    cells = [{"text": t, "best": v is not None and v == first} for v, t in zip(values, texts, strict=True)]
    return {"name": name, "text": False, "cells": cells}


def category_table(inputs: Sequence[ReportInput], categories: Sequence[str]) -> dict[str, Any]:
    """Return the table of categories: for each metric a column a model, in %; the best of a row is marked."""
    keys = _keys(inputs)
    of = [{row["category"]: row for row in _metrics(entry)["categories"]} for entry in inputs]
    rows = []
    for name in categories:
        cells: list[dict[str, Any]] = []
        for key in keys:
            values = [found.get(name, {}).get(key) for found in of]
            cells += _row("", values, [percent(value) for value in values], max)["cells"]
        rows.append({"name": name, "cells": cells})
    return {"groups": [NAMES.get(key, short_name(key)) for key in keys], "rows": rows}


def _keys(inputs: Sequence[ReportInput]) -> list[str]:
    """Return the metrics that any of the models has."""
    return list(dict.fromkeys(key for entry in inputs if entry.evaluation for key in headline_keys(entry.evaluation)))


def _metrics(entry: ReportInput) -> Mapping[str, Any]:
    return entry.evaluation["metrics"] if entry.evaluation else {}

"""The tables of the page: results, decisions, defect types, and what the shard set holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.metric_glossary import metric_columns
from pipelines.reporting.metric_text import UNDEFINED, percent
from pipelines.reporting.samples import text_column
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS


def results_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results table: groups of columns, rows of categories, and rows of mean and union."""
    rows = metrics["categories"]
    image, pixel = metric_columns(rows)
    columns = [*image, *pixel]
    lowest = {}
    for column in columns:
        values = [row[column.key] for row in rows if row.get(column.key) is not None]
        lowest[column.key] = min(values) if len(values) > 2 else None

    def cells(row: Mapping[str, Any], mark: bool) -> list[dict[str, Any]]:
        values = [(column.key, row.get(column.key)) for column in columns]
        return [{"text": percent(v), "low": mark and v is not None and v == lowest[key]} for key, v in values]

    several = len(rows) > 1
    return {
        "groups": [("image level", len(image)), ("pixel level", len(pixel))]
        if pixel
        else [("image level", len(image))],
        "columns": columns,
        "starts": {0, len(image)},
        "rows": [{"name": row["category"], "cells": cells(row, True), "counts": _row_counts(row)} for row in rows],
        "totals": [
            {"name": name, "cells": cells(metrics[name], False), "counts": counts}
            for name, counts in (("mean", ["", "", ""]), ("union", _row_counts(metrics["union"])))
            if several
        ],
        "marked": any(value is not None for value in lowest.values()),
    }


def _row_counts(row: Mapping[str, Any]) -> list[str]:
    """Return the numbers of images, anomalous ones, and those of them with a mask."""
    masked = row.get("n_anomalous_maps")
    return [f"{row['n_images']:,}", f"{row['n_anomalous']:,}", UNDEFINED if masked is None else f"{masked:,}"]


def decision_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the thresholds do, by category and over all."""
    threshold = evaluation["threshold"]
    if threshold is None:
        return []
    rows = [(row["category"], row) for row in threshold["categories"]]
    if len(rows) > 1 and threshold["union"] is not None:
        rows.append(("union", threshold["union"]))
    return [
        {
            "name": name,
            "total": name == "union",
            "threshold": UNDEFINED if rates["threshold"] is None else f"{rates['threshold']:.4g}",
            "n_normal": f"{rates['n_normal']:,}",
            "false_positive_rate": percent(rates["false_positive_rate"]),
            "above": above_target(rates, threshold),
            "n_anomalous": f"{rates['n_anomalous']:,}",
            "detection_rate": percent(rates["detection_rate"]),
        }
        for name, rates in rows
    ]


def defect_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return how many of each defect type are found; nothing where nothing is decided."""
    anomalous = table.filter(pc.and_(pc.equal(table["label"], ANOMALOUS), pc.is_valid(table["decision"])))
    kinds: dict[tuple[str, str], list[bool]] = {}
    texts = (text_column(anomalous, name) for name in ("category", "defect", "decision"))
    for category, defect, decision in zip(*texts, strict=True):
        kinds.setdefault((category, defect or UNDEFINED), []).append(decision == "fail")
    return [
        {
            "category": category,
            "defect": defect,
            "images": len(failed),
            "found": sum(failed),
            "rate": percent(sum(failed) / len(failed)),
        }
        for (category, defect), failed in sorted(kinds.items())
    ]


def with_examples(duplicates: Mapping[str, Any]) -> str:
    """Return the number of groups of identical images, with the first as an example."""
    example = f", e.g. {' = '.join(duplicates['examples'][0][:2])}" if duplicates["examples"] else ""
    return f"{duplicates['groups']:,}{example}"


def sample_counts(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the samples of the shard set by category (rows), split and label (columns)."""
    names = {NORMAL: "normal", ANOMALOUS: "anomalous", None: "unlabelled"}
    cells: dict[tuple[str, str], dict[tuple[str, int | None], int]] = {}
    for entry in entries:
        row = cells.setdefault((entry["dataset"], entry["category"]), {})
        key = (entry["split"], entry["label"])
        row[key] = row.get(key, 0) + entry["count"]
    order = [(split, label) for split in SPLITS for label in names]
    columns = [key for key in order if any(key in row for row in cells.values())]
    return {
        "columns": [f"{split} {names[label]}" for split, label in columns],
        "rows": [
            {
                "dataset": dataset,
                "category": category,
                "cells": [f"{row[c]:,}" if c in row else UNDEFINED for c in columns],
            }
            for (dataset, category), row in sorted(cells.items())
        ],
    }


def above_target(rates: Mapping[str, Any], threshold: Mapping[str, Any]) -> bool:
    """Return whether more normal images are flagged than the threshold promises."""
    promise = {**threshold, **rates}  # rates of before have no promise of their own
    return promise.get("promised", True) and (rates["false_positive_rate"] or 0) > promise["target_fpr"]

"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.samples import _texts
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS

COLUMNS = (
    "sample_id",
    "category",
    "label",
    "defect",
    "score",
    "calibrated_score",
    "decision",
    "map_offset",
    "status",
    "model",
)
"""Columns of the scores that decide what is shown; `map_offset` tells which samples have a map."""

UNDEFINED = "–"


@dataclass(frozen=True)
class Metric:
    """A column of the results table: its key in the evaluation, its heading, and what it says in a line."""

    key: str
    title: str
    meaning: str


IMAGE_METRICS = (
    Metric(
        "image_auroc",
        "AUROC",
        "how often an anomalous image scores higher than a normal one, over all such pairs; 50 % is guessing",
    ),
    Metric(
        "image_ap",
        "AP",
        "average precision: the share of true alarms among all alarms, averaged over the alarms that find each "
        "anomalous image; guessing gives the share of anomalous images",
    ),
    Metric(
        "image_f1_max",
        "F1-max",
        "harmonic mean of precision and recall at the threshold where it is highest; that threshold is chosen on "
        "these very labels, so this is an upper bound",
    ),
    Metric("image_accuracy_at_f1_max", "Acc.", "share of images judged rightly at the threshold of F1-max"),
)
PIXEL_METRICS = (
    Metric(
        "pixel_auroc",
        "AUROC",
        "as for images, over all pixels; high even for coarse maps, since most pixels are normal and easy",
    ),
    Metric("pixel_ap", "AP", "as for images, over all pixels; guessing gives the share of anomalous pixels"),
    Metric("pixel_f1_max", "F1-max", "as for images, over all pixels; the same as the best pooled Dice coefficient"),
    Metric(
        "pixel_iou_max",
        "IoU-max",
        "overlap of flagged and anomalous pixels over their union, at the threshold where it is highest",
    ),
    Metric(
        "dsc",
        "DSC",
        "Dice coefficient of each image, averaged, at the one threshold with the largest sum of precision and recall",
    ),
    Metric("iou", "IoU", "overlap over union of each image, averaged, at the threshold of DSC"),
    Metric(
        "soft_dice",
        "soft DSC",
        "Dice coefficient of each anomalous image with its map scaled to 0 to 1 in place of a threshold, averaged",
    ),
    Metric("soft_iou", "soft IoU", "overlap over union of the same maps, averaged"),
)
AUPRO_MEANING = (
    "mean share of each anomalous region that is covered, averaged over false-positive rates of pixels from 0 to 30 % "
    "(to another rate, or by a published approximation, where its name says so); small regions count as much as large"
)
OTHER_MEANINGS = (
    ("mean", "average over categories, each judged by itself; categories where the metric is undefined are left out"),
    ("union", "all categories in one pool: scores must also be comparable between categories"),
    ("false-positive rate", "share of normal images above the threshold"),
    ("detection rate", "share of anomalous images above the threshold"),
    (
        "σ",
        "distance of a score from the threshold (from the median of normal images, if there is none), in standard "
        "deviations of the scores of normal images",
    ),
)


def percent(value: float | None) -> str:
    """A share in percent with one decimal, or a dash where it is undefined."""
    return UNDEFINED if value is None else f"{100 * value:.1f}"


def aupro_keys(metrics: Mapping[str, Any]) -> list[str]:
    """AUPRO's keys in a row of results: variants and limits other than the usual ones are part of the name."""
    return [key for key in metrics if key.startswith("aupro") and not key.endswith("_error")]


def largest_error(evaluation: Mapping[str, Any]) -> float:
    """The most that a pixel metric of the union can be off, raw or calibrated, in percentage points."""
    tables = [found["metrics"]["union"] for found in (evaluation, evaluation.get("calibrated")) if found is not None]
    return 100 * max((v for row in tables for k, v in row.items() if k.endswith("_error") and v is not None), default=0)


HEADLINE = {"image_auroc": "I-AUROC", "image_ap": "I-AP", "pixel_auroc": "P-AUROC", "pixel_ap": "P-AP"}
"""Metrics of the short table; AUPRO is added under the name of its variant."""


def aupro_names(row: Mapping[str, Any]) -> dict[str, str]:
    """AUPRO's keys in a row of results, and how they are shown."""
    return {key: key.replace("aupro", "AUPRO") for key in aupro_keys(row)}


def headline_keys(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the metrics of the short table that are defined, and how they are shown."""
    mean = evaluation["metrics"]["mean"]
    return {key: name for key, name in (HEADLINE | aupro_names(mean)).items() if mean.get(key) is not None}


def headline_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the short table: mean of categories and union of all, raw and calibrated, each figure in %
    with its interval."""
    keys, intervals = headline_keys(evaluation), evaluation.get("intervals") or {}
    rows = []
    for kind, found in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        if found is None:
            continue
        for scope, words in (("mean", "model-unified (mean of categories)"), ("union", "absolute-unified (union)")):
            bounds = (intervals.get(kind) or {}).get(scope, {})
            cells = [_with_interval(found["metrics"][scope].get(key), bounds.get(key)) for key in keys]
            rows.append([f"{kind}, {words}", *cells])
    return list(keys.values()), rows


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    if bounds is None:
        return percent(value)
    return f"{percent(value)} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def dataset_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Mean and union of each data set, raw and calibrated; none of a single data set."""
    if len(evaluation.get("datasets", [])) < 2:
        return []
    keys = headline_keys(evaluation)
    rows = []
    for kind, found in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        for entry in found["datasets"] if found is not None else []:
            for scope in ("mean", "union"):
                cells = [percent(entry[scope].get(key)) for key in keys]
                rows.append([entry["dataset"], f"{kind}, {scope}", *cells, f"{entry[scope]['n_images']:,}"])
    return sorted(rows, key=lambda row: row[0])


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Metric], list[Metric]]:
    """Image-level and pixel-level columns; pixel metrics only where an evaluation has any."""
    keys = {key: None for row in rows for key in row}
    pixel = [metric for metric in PIXEL_METRICS if metric.key in keys]
    pixel += [Metric(key, key.replace("aupro", "AUPRO").replace("_", " "), AUPRO_MEANING) for key in aupro_keys(keys)]
    return list(IMAGE_METRICS), pixel


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The results table: groups of columns, rows of categories, and rows of mean and union."""
    rows = metrics["categories"]
    image, pixel = _columns(rows)
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
    """Images, anomalous ones, and those of them with a mask."""
    masked = row.get("n_anomalous_maps")
    return [f"{row['n_images']:,}", f"{row['n_anomalous']:,}", UNDEFINED if masked is None else f"{masked:,}"]


def _decisions(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the thresholds do, by category and over all."""
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


def _defects(table: pa.Table) -> list[dict[str, Any]]:
    """How many of each defect type are found; empty where nothing is decided."""
    anomalous = table.filter(pc.and_(pc.equal(table["label"], ANOMALOUS), pc.is_valid(table["decision"])))
    kinds: dict[tuple[str, str], list[bool]] = {}
    texts = (_texts(anomalous, name) for name in ("category", "defect", "decision"))
    for category, defect, decision in zip(*texts, strict=True):
        kinds.setdefault((category, defect or UNDEFINED), []).append(decision == "fail")
    return [
        {
            "category": category,
            "defect": defect,
            "images": len(found),
            "found": sum(found),
            "rate": percent(sum(found) / len(found)),
        }
        for (category, defect), found in sorted(kinds.items())
    ]


def with_examples(found: Mapping[str, Any]) -> str:
    return f"{found['groups']:,}" + (f", e.g. {' = '.join(found['examples'][0][:2])}" if found["examples"] else "")


def _counts(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of the shard set by category (rows), split and label (columns)."""
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


def _meanings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every term of the tables and what it says."""
    image, pixel = _columns(metrics["categories"])
    terms = [(f"image {metric.title}", metric.meaning) for metric in image]
    terms += [
        (f"pixel {metric.title}" if metric in PIXEL_METRICS else metric.title, metric.meaning) for metric in pixel
    ]
    return [*terms, *OTHER_MEANINGS]


def above_target(rates: Mapping[str, Any], threshold: Mapping[str, Any]) -> bool:
    """Whether more normal images are flagged than the threshold was set for."""
    return (rates["false_positive_rate"] or 0) > threshold["target_fpr"]

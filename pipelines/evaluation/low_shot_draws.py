"""Draws of the low-shot protocol: few normal images of each category, a bank for each draw, and metrics over draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.bank_protocol import BankScorer, scores_file, spread
from pipelines.evaluation.metric_tables import plain
from pipelines.evaluation.options import LowShotOptions
from unianom import __version__
from unianom.configs import method_of
from unianom.data.image import decode_mask, prepare_mask
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot
from unianom.errors import DataError
from unianom.metrics.image import image_metrics
from unianom.metrics.pixel import pixel_metrics
from unianom.options import to_plain

METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
"""Metrics of every draw."""


def plan_draws(shards: ShardSet, options: LowShotOptions) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Plan the banks to fit, and find which numbers of shots which category cannot give.

    Returns:
        Units of number, shots, seed and categories; and rows of category, shots and normal_images.

    Raises:
        DataError: no category has as many normal images as any number of shots.
    """
    categories = list(options.categories) or shards.categories
    have = {name: shards.count(Selection(("train",), (name,), (NORMAL,))) for name in categories}
    draws: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for shots in options.shots:
        enough = [name for name in categories if have[name] >= shots]
        skipped += [
            {"category": name, "shots": shots, "normal_images": have[name]} for name in categories if name not in enough
        ]
        groups = [[name] for name in enough] if options.per_category else [enough] * bool(enough)
        for group in groups:
            for seed in range(options.seed, options.seed + options.draws):
                draws.append({"number": len(draws), "shots": shots, "seed": seed, "categories": group})
    if not draws:
        raise DataError(
            f"{shards.uri} has at most {max(have.values())} normal training images of a category, fewer than any of "
            f"shots={list(options.shots)}"
        )
    return draws, skipped


class DrawScorer(BankScorer):
    """A bank of one draw, and metrics of its categories. A `PartTask`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._masks: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Fit, score and measure one draw."""
        draw = self.tasks[task["number"]]
        categories = tuple(draw["categories"])
        pool = [row for row in self.reader.samples("train") if row["category"] in categories]
        ids, groups = [row["sample_id"] for row in pool], [row["category"] for row in pool]
        made = self.fit(frozenset(few_shot(ids, groups, draw["shots"], draw["seed"])))
        masks = self._masks_of(categories)
        pixels: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in categories}

        def keep_map(row: dict[str, Any], anomaly_map: np.ndarray) -> None:
            mask = masks.get(row["sample_id"])
            if mask is None and row["label"] == NORMAL:
                mask = np.zeros(anomaly_map.shape, bool)
            if mask is not None:
                maps, marked = pixels[row["category"]]
                maps.append(anomaly_map)
                marked.append(mask)

        rows = self.score(keep_map, categories)
        measured = []
        for name in categories:
            scored = [row for row in rows if row["category"] == name]
            metrics: dict[str, Any] = dict(
                image_metrics([row["score"] for row in scored], [row["label"] for row in scored])
            )
            maps, marked = pixels[name]
            if any(mask.any() for mask in marked):
                metrics |= pixel_metrics(maps, marked).as_dict()
            values = {key: plain(metrics[key]) for key in METRICS if key in metrics}
            measured.append({"category": name, **values})
        columns = {key: draw[key] for key in ("shots", "seed")}
        return self.commit(draw["number"], [{**columns, **row} for row in rows], {**draw, **made, "metrics": measured})

    def _masks_of(self, categories: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the S×S bool masks of the anomalous test images by sample_id, and keep them for the next draw.

        Images without a mask, or with one that is empty at this resolution, are not among them.
        """
        if categories not in self._masks:
            shards, policy = self.reader.shards, self.method.input
            selection = Selection(("test",), categories, (ANOMALOUS,))
            readable: dict[str, np.ndarray] = {}
            for part in shards.parts:
                for batch in shards.read(part, selection, ["sample_id", "mask"]):
                    for row in batch.to_pylist():
                        if row["mask"] is not None:
                            mask = prepare_mask(decode_mask(row["mask"]), policy)
                            if mask.any():
                                readable[row["sample_id"]] = mask
            self._masks[categories] = readable
        return self._masks[categories]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compute mean and standard deviation over the draws, by category and number of shots, and of the mean category.

    Args:
        records: of shots, seed and `metrics` by category.

    Returns:
        Rows of category ("mean" last), shots, draws, categories (how many), and of each metric its `spread`. A mean is
        taken over the categories of each draw first, where all of them have the metric.
    """
    draws: dict[tuple[str, int], dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        for metrics in record["metrics"]:
            for name in (metrics["category"], "mean"):
                draws.setdefault((name, record["shots"]), {}).setdefault(record["seed"], []).append(metrics)
    summary = []
    for (name, shots), by_seed in sorted(draws.items(), key=lambda item: (item[0][0] == "mean", item[0])):
        row: dict[str, Any] = {"category": name, "shots": shots, "draws": len(by_seed)}
        row["categories"] = len(next(iter(by_seed.values())))
        for key in METRICS:
            values = [[of_one[key] for of_one in group if of_one.get(key) is not None] for group in by_seed.values()]
            if any(values):
                row[key] = spread([math.fsum(group) / len(group) for group in values if group])
        summary.append(row)
    return summary


def low_shot_content(
    options: LowShotOptions,
    shards: ShardSet,
    records: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the content of low_shot.json: what was measured of each draw, and over all draws."""
    rows = [
        {
            "category": row["category"],
            **{key: record[key] for key in ("shots", "seed", "images", "patches", "bank_rows")},
            **{key: row.get(key) for key in METRICS},
        }
        for record in records
        for row in record["metrics"]
    ]
    return {
        "tool_version": __version__,
        "protocol": "low_shot",
        "method": method_of(options.method),
        "config": to_plain(options.method),
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "per_category": options.per_category,
        "draws": rows,
        "summary": summarise(records),
        "skipped": skipped,
        "scores": [scores_file(record["number"]) for record in records],
    }


def flat_summary(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of summary.csv: mean and standard deviation of each metric in columns of their own."""
    return [
        {
            **{key: row[key] for key in ("category", "shots", "draws", "categories")},
            **{f"{key}_{part}": row[key][part] for key in METRICS if key in row for part in ("mean", "sd")},
        }
        for row in summary
    ]

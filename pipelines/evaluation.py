"""Scores and the labels and masks of their shards → every table the labels allow.

One unit of work a category, and one for the union of all (the absolute-unified protocol). Metrics are exact.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.commandline import console, print_table
from pipelines.report import figures
from pipelines.runtime import Progress, RuntimeOptions, connect, run_units
from pipelines.tracking import TrackingOptions, track
from unianom import __version__, files
from unianom.data.image import InputPolicy, decode_map, decode_mask, prepare_mask
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.errors import DataError
from unianom.metrics.curves import Curve
from unianom.metrics.image import image_curves, image_metrics
from unianom.metrics.pixel import PixelAccumulator
from unianom.metrics.region import AuproVariant, check_aupro_options
from unianom.serialise import from_plain, to_plain

UNION = "union"

COUNTS = ("n_images", "n_anomalous", "n_maps", "n_anomalous_maps", "n_regions")
"""Entries of a metrics row that add up over categories instead of being averaged."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a score set against the labels and masks of its shards.

    Args:
        scores: score set; path or URI.
        shards: the shard set that was scored; path or URI.
        output: folder for evaluation.json and categories.csv; path or URI.
        aupro_limit: highest false-positive rate of AUPRO.
        aupro_variant: "exact", or a published approximation: "legacy_global_200", "legacy_per_image".
        soft_dice: also give Dice and IoU without a threshold of maps scaled by their own extremes, image by image, as
            polyp segmentation is measured.
        curve_points: points kept of each curve.
        runtime: actors and their CPUs.
        tracking: where MLflow records the run.
    """

    scores: str
    shards: str
    output: str
    aupro_limit: float = 0.3
    aupro_variant: AuproVariant = "exact"
    soft_dice: bool = False
    curve_points: int = 400
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self) -> None:
        check_aupro_options(self.aupro_limit, self.aupro_variant)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Compute all tables and curves, write them, and return the content of evaluation.json.

    Raises:
        DataError: the scores are not of these shards, or nothing is labelled.
    """
    scores, shards = ScoreSet.open(options.scores), ShardSet.open(options.shards)
    if scores.manifest["shards"]["digest"] != shards.digest:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    labelled = sorted({row["category"] for row in scores.manifest["counts"] if row["label"] is not None})
    if not labelled:
        raise DataError(f"no sample of {scores.uri} has a label, so there is nothing to evaluate against")
    arguments = {
        "scores": scores,
        "shards": shards,
        "aupro_limit": options.aupro_limit,
        "aupro_variant": options.aupro_variant,
        "curve_points": options.curve_points,
        "soft_dice": options.soft_dice,
    }
    units = [{"name": category, "categories": [category]} for category in labelled]
    if len(labelled) > 1:
        units.append({"name": UNION, "categories": labelled})
    connect(options.runtime)
    results: dict[str, dict[str, Any]] = {}
    progress = Progress("evaluate", len(units), "tables")
    for result in run_units(TableMaker, arguments, units, options.runtime):
        results[result["name"]] = result
        progress.advance(1)
    progress.close()
    if len(labelled) == 1:
        results[UNION] = results[labelled[0]]
    content = _content(scores, shards, labelled, results)
    output = files.full_uri(options.output)
    table = _table_csv(content["metrics"]).encode()
    files.write_bytes(files.join(output, "categories.csv"), table)
    files.write_json(files.join(output, "evaluation.json"), content)
    with track(options.tracking, "evaluate", output, to_plain(options)) as run:
        run.tags({"unianom.models": ", ".join(m["digest"] for m in content["models"])})
        for row in content["metrics"]["categories"]:
            run.metrics({f"{row['category']}/{k}": v for k, v in row.items() if k not in ("dataset", "category")})
        run.metrics({f"mean/{key}": value for key, value in content["metrics"]["mean"].items()})
        run.metrics({f"{UNION}/{key}": value for key, value in content["metrics"]["union"].items()})
        run.artifacts({"categories.csv": table})
        run.json("evaluation.json", content)
        run.figures(figures(content, scores.table(columns=["sample_id", "category", "label", "score", "status"])))
    return content


class TableMaker:
    """Computes the metrics of some categories together. A `UnitWorker`.

    Args:
        scores, shards: what was scored, and its labels and masks.
        aupro_limit, aupro_variant: see `unianom.metrics.region.aupro`.
        curve_points: points kept of each curve.
        soft_dice: also give soft Dice and soft IoU.
    """

    def __init__(
        self,
        scores: ScoreSet,
        shards: ShardSet,
        aupro_limit: float,
        aupro_variant: AuproVariant,
        curve_points: int,
        soft_dice: bool = False,
    ) -> None:
        self._scores, self._shards = scores, shards
        self._aupro_limit, self._aupro_variant = aupro_limit, aupro_variant
        self._curve_points, self._soft_dice = curve_points, soft_dice
        models = scores.manifest["models"]
        self._policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in models}
        self._thresholds = {m["digest"]: m["threshold"] for m in models}

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Metrics, curves and rates at the threshold; NaN becomes None."""
        selection = Selection(categories=tuple(unit["categories"]))
        columns = ["sample_id", "dataset", "label", "score", "status", "model"]
        rows = [
            row
            for row in self._scores.table(selection, columns).to_pylist()
            if row["status"] == "ok" and row["label"] is not None
        ]
        values = np.array([row["score"] for row in rows], np.float64)
        labels = np.array([row["label"] for row in rows], np.int64)
        metrics: dict[str, Any] = dict(image_metrics(values, labels))
        curves: dict[str, Curve] = image_curves(values, labels, self._curve_points)
        accumulator = PixelAccumulator(self._aupro_limit, self._aupro_variant)
        for anomaly_map, mask in self._maps(selection):
            accumulator.update([anomaly_map], [mask])
        pixels = accumulator.compute()
        if pixels.n_anomalous_maps:
            metrics.update(pixels.as_dict(self._soft_dice))
            found = accumulator.curves(self._curve_points)
            curves.update({"pixel_roc": found["roc"], "pixel_pr": found["pr"], "pro": found["pro"]})
        return {
            "name": unit["name"],
            "dataset": ", ".join(sorted({row["dataset"] for row in rows})),
            "metrics": {key: _plain(value) for key, value in metrics.items()},
            "curves": {name: {"x": curve.x.tolist(), "y": curve.y.tolist()} for name, curve in curves.items()},
            "rates": self._rates(rows),
        }

    def _maps(self, selection: Selection) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Maps with their masks; anomalous images whose mask is unknown take no part."""
        if not self._scores.manifest["maps"]:
            return
        columns = ["sample_id", "label", "status", "model", "anomaly_map", "map_offset", "map_scale"]
        for part in self._scores.parts:
            shard_part = "-".join(part.split("-")[:2]) + ".parquet"
            if shard_part not in self._shards.parts:
                continue  # rejected samples, which have no map
            masks: dict[str, bytes | None] = {}
            for batch in self._shards.read(shard_part, selection, ["sample_id", "mask"]):
                masks.update(zip(batch["sample_id"].to_pylist(), batch["mask"].to_pylist(), strict=True))
            for batch in self._scores.read(part, selection, columns):
                for row in batch.to_pylist():
                    mask = masks[row["sample_id"]]
                    if row["status"] != "ok" or row["label"] is None or (row["label"] == 1 and mask is None):
                        continue
                    anomaly_map = decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
                    if mask is None:
                        yield anomaly_map, np.zeros(anomaly_map.shape, bool)
                    else:
                        yield anomaly_map, prepare_mask(decode_mask(mask), self._policies[row["model"]])

    def _rates(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the models' thresholds do to these samples; None where a model has none."""
        thresholds = {row["model"]: self._thresholds[row["model"]] for row in rows}
        if any(threshold is None for threshold in thresholds.values()):
            return None
        failed = {0: 0, 1: 0}
        total = {0: 0, 1: 0}
        for row in rows:
            total[row["label"]] += 1
            failed[row["label"]] += row["score"] > thresholds[row["model"]]["value"]
        values = {threshold["value"] for threshold in thresholds.values()}
        return {
            "threshold": values.pop() if len(values) == 1 else None,
            "n_normal": total[0],
            "false_positive_rate": failed[0] / total[0] if total[0] else None,
            "n_anomalous": total[1],
            "detection_rate": failed[1] / total[1] if total[1] else None,
        }


def _plain(value: float) -> float | int | None:
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _content(
    scores: ScoreSet, shards: ShardSet, categories: list[str], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    rows = [
        {"dataset": results[category]["dataset"], "category": category, **results[category]["metrics"]}
        for category in categories
    ]
    return {
        "tool_version": __version__,
        "scores": {"uri": scores.uri, "digest": scores.digest},
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "models": scores.manifest["models"],
        "metrics": {"categories": rows, "mean": mean_row(rows), "union": results[UNION]["metrics"]},
        "threshold": _threshold(scores, categories, results),
        "curves": {name: result["curves"] for name, result in results.items()},
        "statuses": scores.manifest["statuses"],
        "rejected": _not_scored(scores),
    }


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the categories where a metric is defined; counts are summed."""
    keys = [key for row in rows for key in row if key not in ("dataset", "category")]
    mean: dict[str, Any] = {}
    for key in dict.fromkeys(keys):
        values = [row[key] for row in rows if row.get(key) is not None]
        if key in COUNTS:
            mean[key] = sum(values)
        elif not key.endswith("threshold"):
            mean[key] = math.fsum(values) / len(values) if values else None
    return mean


def _threshold(scores: ScoreSet, categories: list[str], results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    given = [model["threshold"] for model in scores.manifest["models"] if model["threshold"] is not None]
    if not given:
        return None
    rates = [{"category": c, **results[c]["rates"]} for c in categories if results[c]["rates"] is not None]
    return {
        "target_fpr": given[0]["target_fpr"],
        "confidence": given[0]["confidence"],
        "categories": rates,
        "union": results[UNION]["rates"],
    }


def _not_scored(scores: ScoreSet, most: int = 100) -> list[dict[str, Any]]:
    columns = ["sample_id", "category", "status", "error"]
    rows = [row for row in scores.table(columns=columns).to_pylist() if row["status"] != "ok"]
    return rows[:most]


def _table_csv(metrics: dict[str, Any]) -> str:
    rows = [
        *metrics["categories"],
        {"dataset": "", "category": "mean", **metrics["mean"]},
        {"dataset": "", "category": UNION, **metrics["union"]},
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


SHOWN = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "image_f1_max": "I-F1max",
    "image_accuracy_at_f1_max": "I-Acc",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "pixel_f1_max": "P-F1max",
    "dsc": "DSC",
    "iou": "IoU",
    "soft_dice": "soft DSC",
    "soft_iou": "soft IoU",
}
"""Metrics of the printed table, and their usual short names; AUPRO is added under the name of its variant."""


def print_evaluation(content: dict[str, Any]) -> None:
    """Print the result table, and the rates met at the threshold."""
    metrics = content["metrics"]
    rows = [*metrics["categories"], {"category": "mean", **metrics["mean"]}, {"category": UNION, **metrics["union"]}]
    shown = {key: name for key, name in SHOWN.items() if any(row.get(key) is not None for row in rows)}
    shown.update({key: key.replace("aupro", "AUPRO") for key in metrics["mean"] if key.startswith("aupro")})

    def cell(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        return "–" if value is None else f"{100 * value:.1f}"

    table = [
        [row["category"], *(cell(row, key) for key in shown), str(row["n_images"]), str(row["n_anomalous"])]
        for row in rows
    ]
    print_table("metrics in %", ["category", *shown.values(), "images", "anomalous"], table, footer=2)
    if content["threshold"] is None:
        console.print("no threshold in the model, so no decisions were evaluated")
        return
    met = content["threshold"]["union"]
    promised = (
        f"{100 * content['threshold']['target_fpr']:g} % at {100 * content['threshold']['confidence']:g} % confidence"
    )
    if met is not None and met["false_positive_rate"] is not None:
        caught = "–" if met["detection_rate"] is None else f"{100 * met['detection_rate']:.1f} %"
        console.print(
            f"at the threshold: {100 * met['false_positive_rate']:.1f} % of {met['n_normal']} normal images fail "
            f"(promised at most {promised}), {caught} of {met['n_anomalous']} anomalous images are caught"
        )

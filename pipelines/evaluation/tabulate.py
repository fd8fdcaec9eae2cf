"""Scores and counted pixels → the content of evaluation.json and categories.csv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.intervals import Resampling
from pipelines.evaluation.labelled_images import CALIBRATED, RAW, LabelledImages
from pipelines.evaluation.metric_tables import UNION, kind_tables
from pipelines.evaluation.notes import evaluation_notes
from pipelines.evaluation.options import EvaluateOptions
from pipelines.evaluation.pixel_counts import PixelCounts, PixelPlan, read_pixel_counts
from pipelines.evaluation.threshold_rates import threshold_rates
from unianom import __version__, files
from unianom.data.shards import ScoreSet, ShardSet


def tabulate(
    options: EvaluateOptions, scores: ScoreSet, shards: ShardSet, images: LabelledImages, plan: PixelPlan, folder: str
) -> dict[str, Any]:
    """Return the content of evaluation.json, from the scores and the counted pixels in a folder."""
    tables: dict[str, dict[str, Any]] = {}
    intervals: dict[str, Any] = {}
    left_out: list[str] = []
    for kind in plan.kinds:
        tables[kind], intervals[kind], left_out = _evaluate_kind(options, scores, shards, images, plan, folder, kind)
    raw = tables[RAW]
    with_maps = raw["metrics"]["union"].get("n_maps") is not None
    return {
        "tool_version": __version__,
        "scores": {"uri": scores.uri, "digest": scores.digest},
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "models": [
            {key: value for key, value in model.items() if key != "normal_scores"}
            for model in scores.manifest["models"]
        ],
        "metrics": raw["metrics"],
        "datasets": raw["datasets"],
        "threshold": threshold_rates(scores, images),
        "pixel_mode": ("binned" if plan.binned else "exact") if with_maps else None,
        "calibrated": tables.get(CALIBRATED),
        "intervals": None
        if not options.bootstrap.resamples
        else {
            "confidence": options.bootstrap.confidence,
            "resamples": options.bootstrap.resamples,
            RAW: intervals[RAW],
            CALIBRATED: intervals.get(CALIBRATED),
        },
        "notes": evaluation_notes(options, scores, plan, images, with_maps, left_out),
        "curves": raw["curves"],
        "statuses": scores.manifest["statuses"],
        "rejected": _not_scored(scores),
    }


def _evaluate_kind(
    options: EvaluateOptions,
    scores: ScoreSet,
    shards: ShardSet,
    images: LabelledImages,
    plan: PixelPlan,
    folder: str,
    kind: str,
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Return tables and intervals of one kind of score, and the images that its pixels leave out; the pixels are in
    memory no longer than this takes."""
    counted = PixelCounts({}, {})
    if scores.maps == "all":
        counted = read_pixel_counts(scores, shards, plan, folder, kind)
    tables = kind_tables(options, images, counted, kind, plan.accumulator)
    if not options.bootstrap.resamples:
        return tables, None, counted.left_out
    resampling = Resampling(images, counted, kind, options.aupro_limit, options.bootstrap)
    return tables, resampling.intervals(tables["metrics"]), counted.left_out


def _not_scored(scores: ScoreSet, most: int = 100) -> list[dict[str, Any]]:
    """Return the first samples without a score, and why they have none."""
    columns = ["sample_id", "category", "status", "error"]
    rows = [row for row in scores.table(columns=columns).to_pylist() if row["status"] != "ok"]
    return rows[:most]


def categories_csv(content: dict[str, Any]) -> bytes:
    """Return categories.csv: categories, mean and union, then mean and union of each data set where there are several.

    Column `scores` says whether a row is of raw or of calibrated scores.
    """
    rows = []
    for kind, tables in ((RAW, content), (CALIBRATED, content["calibrated"])):
        if tables is None:
            continue
        metrics = tables["metrics"]
        of_kind = [*metrics["categories"], *_total_rows("", metrics)]
        if len(tables["datasets"]) > 1:
            of_kind += [row for entry in tables["datasets"] for row in _total_rows(entry["dataset"], entry)]
        rows += [{"scores": kind, **row} for row in of_kind]
    return files.csv_bytes(rows)


def _total_rows(dataset: str, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of mean and union."""
    return [{"dataset": dataset, "category": name, **tables[name]} for name in ("mean", UNION)]

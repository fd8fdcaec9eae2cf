"""jobs/evaluate.py: scores and the labels and masks of their shards → every table the labels allow.

    maps and masks ─▶ workers: one task a score part, each map decoded once ─▶ counts of pixels of every group
    scores and labels ────────────────────────────────────────────────────────┴─▶ tables, curves, intervals

Raw and calibrated scores are evaluated side by side; for each, categories by themselves and their mean
(model-unified), the union of each data set, and the union of all (absolute-unified).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.metric_tables import UNION
from pipelines.evaluation.options import EvaluateOptions
from pipelines.evaluation.pixel_counts import PixelPlan, count_pixels, plan_pixels
from pipelines.evaluation.tabulate import categories_csv, tabulate
from pipelines.reporting.curves import figures
from pipelines.runtime import outputs
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError
from unianom.options import to_plain

COUNTED = "_pixel_counts"
"""Folder below the evaluation where counts of pixels lie until it is written."""

PLANNED = ("aupro_limit", "aupro_variant", "soft_dice", "exact_pixels", "curve_points", "bootstrap")
"""Options that the tables depend on."""


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Compute all tables and curves and write them, or find them written; return the content of evaluation.json.

    Raises:
        DataError: the scores are not of these shards, nothing is labelled, or the output holds anything else.
        OptionError: a published approximation of AUPRO, of more pixels than are counted exactly.
    """
    scores, shards = ScoreSet.open(options.scores), ShardSet.open(options.shards)
    if scores.manifest["shards"]["digest"] != shards.digest:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    images = LabelledImages.read(scores)
    pixel_plan = plan_pixels(options, scores, images)
    plan = {
        "tool": __version__,
        "scores": scores.digest,
        "shards": shards.digest,
        **{name: to_plain(getattr(options, name)) for name in PLANNED},
    }
    output = files.full_uri(options.output)
    path = files.join(output, "evaluation.json")
    inputs = {"scores": options.scores, "shards": options.shards}
    with (
        outputs.open_output(output, "evaluation", plan, inputs=inputs, overwrite=options.overwrite),
        track(options.tracking, "evaluate", output, to_plain(options)) as run,
    ):
        if not files.exists(path):
            _write(options, scores, shards, images, pixel_plan, output)
        content: dict[str, Any] = files.read_json(path)
        _record(run, content, files.read_bytes(files.join(output, "categories.csv")))
        columns = ["sample_id", "category", "label", "score", "calibrated_score", "status"]
        run.figures(figures(content, scores.table(columns=columns)))
    return content


def _write(
    options: EvaluateOptions,
    scores: ScoreSet,
    shards: ShardSet,
    images: LabelledImages,
    plan: PixelPlan,
    output: str,
) -> None:
    """Compute all tables and curves and write them, evaluation.json last."""
    work = files.join(output, COUNTED)
    # what a killed run has counted is found again by what it depends on
    folder = files.join(work, files.digest_of([scores.digest, shards.digest, asdict(plan)])[:12])
    if scores.maps == "all":
        count_pixels(scores, shards, plan, folder, options.runtime)
    content = tabulate(options, scores, shards, images, plan, folder)
    files.write_bytes(files.join(output, "categories.csv"), categories_csv(content))
    files.write_json(files.join(output, "evaluation.json"), content)
    files.remove(work)


def _record(run: Run, content: Mapping[str, Any], table: bytes) -> None:
    """Record metrics and tables in MLflow."""
    run.tags({"unianom.models": ", ".join(m["digest"] for m in content["models"])})
    for prefix, tables in (("", content), ("calibrated/", content["calibrated"])):
        if tables is None:
            continue
        metrics = tables["metrics"]
        for row in metrics["categories"]:
            values = {key: value for key, value in row.items() if key not in ("dataset", "category")}
            run.metrics({f"{prefix}{scope(row['category'])}/{key}": value for key, value in values.items()})
        run.metrics({f"{prefix}mean/{key}": value for key, value in metrics["mean"].items()})
        run.metrics({f"{prefix}{UNION}/{key}": value for key, value in metrics["union"].items()})
    run.artifacts({"categories.csv": table})
    run.json("evaluation.json", content)

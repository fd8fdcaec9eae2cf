"""jobs/decide.py: stored scores → thresholds from held-out normal images → pass, review or fail. No network runs.

scores of held-out normals ─▶ decision rule ─┐
                 scores to judge ──────────┴▶ actors: one decision part per score part ─▶ summary, review queue
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipelines.inference.decision_parts import (
    DECISION_VERSION,
    ORDINARY,
    DecisionSet,
    queue_csv,
    review_queues,
    write_parts,
)
from pipelines.inference.decision_summary import RATES, summarise
from pipelines.inference.held_out import check_calibration, check_inputs, fit_decision_rule, held_out_scores
from pipelines.inference.options import DecideOptions
from pipelines.inference.rule_storage import find_models
from pipelines.reporting.decision_report import decisions_section, queue_file
from pipelines.reporting.queue_sheet import draw_queue
from pipelines.runtime import outputs
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files
from unianom.data.shards import ScoreSet, ShardSet
from unianom.data.splits import hash_order
from unianom.options import to_plain
from unianom.thresholds import DecisionRule

RECORDED = ("thresholds.json", "summary.json", "queue.csv")
"""Files of the output that MLflow gets, beside the pictures."""


@dataclass(frozen=True)
class DecideResult:
    """Result of a decision job.

    Attributes:
        decisions: the finished decision set.
        fresh: whether this run wrote anything of it.
        rule: the thresholds.
        summary: content of summary.json.
        written: model folders that this run stored the rule in.
    """

    decisions: DecisionSet
    fresh: bool
    rule: DecisionRule
    summary: dict[str, Any]
    written: list[str]


def decide(options: DecideOptions) -> DecideResult:
    """Fit the rule, judge all scores, and write decisions, summary and review queue; or find that done.

    Raises:
        DataError: wrong inputs, no held-out normal images, or an output that is another's.
        OptionError: too few of them for the rates asked for.
        ModelError: the rule cannot be stored in the model.
    """
    scores = ScoreSet.open(options.scores)
    normals = scores if options.normals is None else ScoreSet.open(options.normals)
    shards = None if options.shards is None else ShardSet.open(options.shards)
    check_inputs(scores, normals, shards)
    targets = [] if options.write_back is None else find_models(options.write_back, scores)
    judged = sorted({row["category"] for row in scores.manifest["counts"]})
    if options.scores_kind == "calibrated":
        check_calibration(normals)
    kept = options.normals is None and options.scores_kind == "raw"
    found = held_out_scores(normals, shards, options.held_out_fraction, kept)
    held_out = [row for row in found if row["category"] in judged]
    rule = fit_decision_rule(held_out, judged, options)
    plan = {
        "scores": scores.digest,
        "normals": normals.digest,
        "shards": None if shards is None else shards.digest,
        "rule": rule.to_dict(),
        "target_fpr": options.target_fpr,
        "review_fpr": options.review_fpr,
        "confidence": options.confidence,
        "queue": options.queue,
        "pictures": options.pictures,
    }
    output = files.full_uri(options.output)
    inputs = {
        "scores": options.scores,
        "normals": options.normals,
        "shards": options.shards,
        "write_back": options.write_back,
    }
    with (
        outputs.open_output(output, "decision set", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "decide", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            records = write_parts(scores, rule, output, digest, options)
            _finish(records, scores, shards, held_out, rule, output, digest, options)
        summary = files.read_json(files.join(output, "summary.json"))
        for row in summary["categories"]:
            run.metrics({f"{scope(row['category'])}/{key}": row[key] for key in RATES})
        names = [name for name in files.list_names(output) if name in RECORDED or re.fullmatch(r"queue_\w+\.png", name)]
        run.artifacts({name: files.read_bytes(files.join(output, name)) for name in names})
    written = [target.store(rule) for target in targets if not target.has(rule)]
    return DecideResult(DecisionSet.open(output), fresh, rule, summary, written)


def _finish(
    records: list[dict[str, Any]],
    scores: ScoreSet,
    shards: ShardSet | None,
    held_out: list[dict[str, Any]],
    rule: DecisionRule,
    output: str,
    plan: str,
    options: DecideOptions,
) -> None:
    """Write what sums the decisions up, then the manifest."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for record in records:
        counts.update({tuple(key): count for *key, count in record["counts"]})
    summary = summarise(counts, Counter(row["category"] for row in held_out), rule, options)
    merged = [row for record in records for queue in record["queues"].values() for row in queue]
    queues = review_queues(list({row["sample_id"]: row for row in merged}.values()), options.queue)
    files.write_json(files.join(output, "thresholds.json"), rule.to_dict())
    files.write_json(files.join(output, "summary.json"), summary)
    files.write_bytes(files.join(output, "queue.csv"), queue_csv(queues))
    pictures = []
    if shards is not None and options.pictures:
        shown = {name: queue[: options.pictures] for name, queue in queues.items() if queue}
        ordinary = hash_order((name for record in records for name in record["ordinary"]), 0)[:ORDINARY]
        for name, content in draw_queue(shown, ordinary, scores, shards, rule.kind).items():
            files.write_bytes(files.join(output, queue_file(name)), content)
            pictures.append(name)
    files.write_json(files.join(output, "section.json"), decisions_section(summary, pictures))
    manifest = {
        "kind": DecisionSet.kind,
        "schema_version": DECISION_VERSION,
        "tool_version": __version__,
        "plan_digest": plan,
        "scores": {"uri": scores.uri, "digest": scores.digest},
        "counts": scores.manifest["counts"],
        "files": [{key: record[key] for key in ("name", "rows", "sha256")} for record in records],
    }
    outputs.finish(output, manifest)

"""Decisions: one part per score part, and the review queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inference.options import DecideOptions
from pipelines.inference.score_columns import IDENTITY
from pipelines.runtime import outputs
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_unfinished
from unianom import files
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import PartSet, PartWriter, ScoreSet
from unianom.data.splits import hash_order
from unianom.thresholds import PASS, DecisionRule

DECISION_SCHEMA = pa.schema(
    [
        *(SCORE_SCHEMA.field(name) for name in IDENTITY),
        pa.field("score", pa.float32()),
        pa.field("fail_above", pa.float64()),
        pa.field("review_above", pa.float64()),
        pa.field("decision", SCORE_SCHEMA.field("defect").type),
        pa.field("margin", pa.float32()),
        *(SCORE_SCHEMA.field(name) for name in ("status", "error", "model")),
    ]
)
"""One judged sample. `score` is the one that was judged, raw or calibrated; `decision` is pass, review or fail, null
where there is no score; `margin` is the distance above `fail_above` in standard deviations of normal scores."""

COLUMNS = (*IDENTITY, "score", "calibrated_score", "status", "error", "model")
"""What is read of a score."""

DECISION_VERSION = 1

ORDINARY = 64
"""Images that passed, of which each part names at most so many: their maps show what is ordinary."""


@dataclass(frozen=True)
class DecisionSet(PartSet):
    """Decisions, as jobs/decide.py writes them."""

    schema: ClassVar[pa.Schema] = DECISION_SCHEMA
    version: ClassVar[int] = DECISION_VERSION
    kind: ClassVar[str] = "decision set"
    job: ClassVar[str] = "jobs/decide.py"


def write_parts(
    scores: ScoreSet, rule: DecisionRule, output: str, plan: str, options: DecideOptions
) -> list[dict[str, Any]]:
    """Write the decision parts that are not there yet; return the records of all, in the order of the parts."""
    tasks = {decision_part(part, plan): {"part": part} for part in scores.parts}
    arguments = {"scores": scores, "rule": rule, "output": output, "plan": plan, "queue": options.queue}
    rows = sum(entry["rows"] for entry in scores.manifest["files"])
    images = rows // 100  # a score costs far less than an image
    records, _ = run_unfinished(
        PartDecider, arguments, tasks, output, options.runtime, Progress("decide", rows), images, "rows"
    )
    return list(records.values())


def decision_part(part: str, plan: str) -> str:
    """Return the name of the decision part of a score part: it tells the plan, so parts of two plans never mix."""
    return f"{part.rsplit('-', 1)[0]}-{plan[:12]}.parquet"


class PartDecider:
    """Judges the samples of one score part. A `PartTask`.

    Args:
        scores: the score set.
        rule: how.
        output: folder of the decision set.
        plan: digest of the decision plan.
        queue: images in each list of the review queue.
    """

    def __init__(self, scores: ScoreSet, rule: DecisionRule, output: str, plan: str, queue: int) -> None:
        self._scores, self._rule, self._output, self._plan, self._queue = scores, rule, output, plan, queue

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one decision part and its record, which sums up its images of the test split."""
        name = decision_part(task["part"], self._plan)
        path = files.join(self._output, name)
        decided = [self._decided(batch) for batch in self._scores.read(task["part"], None, COLUMNS, rows=4096)]
        table = pa.concat_tables([DECISION_SCHEMA.empty_table(), *(columns for columns, _ in decided)])
        margins = np.concatenate([[], *(margin for _, margin in decided)])
        with files.open_atomic(path) as handle, PartWriter(handle, DECISION_SCHEMA) as writer:
            writer.write_table(table)
        of_test = pc.equal(table["split"].cast(pa.string()), "test").to_numpy()
        test = table.filter(pa.array(of_test)).to_pylist()
        for row, margin in zip(test, margins[of_test].tolist(), strict=True):
            row["margin"] = margin  # not rounded, for the order of the queues
        counts = Counter((row["category"], row["label"], row["decision"]) for row in test)
        record = {
            "plan": self._plan,
            "name": name,
            "rows": len(table),
            "sha256": files.sha256_file(path),
            "counts": [[*key, count] for key, count in sorted(counts.items(), key=str)],
            "queues": review_queues([row for row in test if row["decision"] is not None], self._queue),
            "ordinary": hash_order((row["sample_id"] for row in test if row["decision"] == PASS), 0)[:ORDINARY],
        }
        outputs.commit_part(self._output, name, record)
        return {"rows": len(table)}

    def _decided(self, batch: pa.RecordBatch) -> tuple[pa.Table, np.ndarray]:
        """Return rows of DECISION_SCHEMA, in the order of the scores, and their margins in float64; those without a
        score have no decision."""
        rows = np.flatnonzero(pc.equal(batch["status"].cast(pa.string()), "ok").to_numpy(zero_copy_only=False))
        scored = batch.take(pa.array(rows))
        score = scored["score"].to_numpy(zero_copy_only=False)
        common = scored["calibrated_score"]
        calibrated = None if common.null_count else common.to_numpy(zero_copy_only=False)
        judged = self._rule.judge(score, calibrated, scored["category"].to_pylist())
        columns = {name: batch[name] for name in DECISION_SCHEMA.names if name in batch.schema.names}
        for name in ("score", "fail_above", "review_above", "decision", "margin"):
            field = DECISION_SCHEMA.field(name)
            values = np.full(len(batch), None, object)
            values[rows] = getattr(judged, name)
            columns[name] = pa.array(values, field.type, from_pandas=True)
        margins = np.full(len(batch), np.nan)
        margins[rows] = judged.margin
        return pa.Table.from_arrays([columns[name] for name in DECISION_SCHEMA.names], schema=DECISION_SCHEMA), margins


def review_queues(rows: list[dict[str, Any]], count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first of each list of the review queue, in order; equal ones by sample_id.

    "uncertain" are those nearest to the threshold to fail, "anomalous" those highest above it.
    """
    uncertain = sorted(rows, key=lambda row: (abs(row["margin"]), row["sample_id"]))
    anomalous = sorted(rows, key=lambda row: (-row["margin"], row["sample_id"]))
    return {"uncertain": uncertain[:count], "anomalous": anomalous[:count]}


def queue_csv(queues: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """Return queue.csv: both lists, one after the other."""
    columns = (
        "sample_id",
        "dataset",
        "category",
        "decision",
        "score",
        "fail_above",
        "margin",
        "label",
        "defect",
        "uri",
    )
    rows = [
        {"list": name, "rank": rank, **{key: row[key] for key in columns}}
        for name, queue in queues.items()
        for rank, row in enumerate(queue, 1)
    ]
    return files.csv_bytes(rows, ["list", "rank", *columns])

"""The decision for every image, as a table that any program reads."""

from __future__ import annotations

import csv
import io

from unianom import files
from unianom.data.shards import ScoreSet

COLUMNS = ("sample_id", "category", "split", "label", "defect", "score", "decision", "status", "error", "uri")


def write_decisions(scores: ScoreSet, path: str) -> dict[str, int]:
    """Write a CSV file with a line for every image, the most anomalous first; return how many there are by decision.

    Images without a score come first, with their status, so that nobody takes them for inspected.

    Args:
        scores: of a model; its decisions are null where the model has no threshold.
        path: of the file; path or URI.
    """
    rows = scores.table(columns=list(COLUMNS)).to_pylist()
    rows.sort(key=lambda row: (row["status"] == "ok", -(row["score"] or 0.0), row["sample_id"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    if not files.exists(path) or files.read_bytes(path) != content:
        files.write_bytes(path, content)
    counts: dict[str, int] = {}
    for row in rows:
        name = row["decision"] or ("no threshold" if row["status"] == "ok" else row["status"])
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))

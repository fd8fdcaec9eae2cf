"""Decisions on the terminal and as a section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.reporting.metric_text import UNDEFINED, percent
from pipelines.runtime.cli import console, print_table
from unianom import files

QUEUES = {"uncertain": "nearest to the threshold to fail", "anomalous": "highest above it"}
"""The lists of the review queue, and what comes first in each."""

COLUMNS = {
    "category": "category",
    "thresholds": "thresholds",
    "unseen_normals": "normals fitted to",
    "review_above": "review above",
    "fail_above": "fail above",
    "normal": "normal",
    "false_positive_rate": "fail %",
    "normal_review_rate": "review %",
    "anomalous": "anomalous",
    "detection_rate": "fail %",
    "anomalous_review_rate": "review %",
    "images": "images",
    "review_rate": "review %",
}
"""Columns of the summary and their headings; shares are of the count to their left."""


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the summary as text."""

    def cell(row: Mapping[str, Any], key: str) -> str:
        value = row[key]
        if COLUMNS[key].endswith("%"):
            return percent(value)
        if value is None:
            return UNDEFINED
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [[cell(row, key) for key in COLUMNS] for row in summary["categories"]]


def _promise(summary: Mapping[str, Any]) -> str:
    """Say what is promised of normal images."""
    if not summary.get("promised", True):
        return "nothing of some or all categories, for which there are too few normal images (see the notes)"
    return (
        f"at most {100 * summary['target_fpr']:.3g} % of normal images fail and at most "
        f"{100 * summary['review_fpr']:g} % fail or come to review, each at {100 * summary['confidence']:g} % "
        f"confidence"
    )


def queue_file(name: str) -> str:
    """Return the name of the contact sheet of a list of the review queue."""
    return f"queue_{name}.png"


def decisions_section(summary: Mapping[str, Any], queues: Sequence[str]) -> dict[str, Any]:
    """Return the section of a report.

    Args:
        summary: content of summary.json.
        queues: lists of the review queue that have a contact sheet.
    """
    images = "normal images that the model has not learned from and that are not of the test split"
    if summary.get("source") == "leave_one_out":
        images = "the normal images of the memory bank, each scored without its own vectors"
    text = [
        f"Thresholds on {summary['scores_kind']} scores, fitted to {images}; promised is: {_promise(summary)}. The "
        f"shares are of test images.",
        *(f"{note}." for note in summary["notes"]),
    ]
    table = {"title": "Decisions", "columns": list(COLUMNS.values()), "rows": _table(summary)}
    figures = [{"title": f"Review queue: {QUEUES[name]}", "file": queue_file(name)} for name in queues]
    return {"title": "Decisions", "text": text, "tables": [table], "figures": figures}


def print_decisions(summary: Mapping[str, Any], folder: str, fresh: bool, rule_stored_in: Sequence[str]) -> None:
    """Print the summary and where everything is.

    Args:
        summary: content of summary.json.
        folder: of the decision set; path or URI.
        fresh: whether this run wrote it.
        rule_stored_in: model folders.
    """
    rows = _table(summary)
    print_table(
        f"decisions on test images by {summary['scores_kind']} scores",
        list(COLUMNS.values()),
        rows,
        footer=int(len(rows) > 1),
    )
    console.print(f"promised for normal images: {_promise(summary)}")
    for note in summary["notes"]:
        console.print(f"note: {note}")
    unscored = summary["categories"][-1]["not_scored"]
    if unscored:
        console.print(f"note: {unscored} images without a score have no decision")
    names = files.list_names(folder)
    if not any(name.endswith(".png") for name in names):
        console.print("no contact sheets: they are drawn with --shards and --pictures above 0")
    done = "written" if fresh else "were complete already"
    console.print(f"decisions {done}: {folder} (review queue: queue.csv, thresholds: thresholds.json)")
    for model in rule_stored_in:
        console.print(f"rule stored in {model}; scores made before are of the model without it")

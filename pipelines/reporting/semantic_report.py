"""The semantic protocol: its figure, its section of the report, and its table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pipelines.reporting.metric_text import percent
from pipelines.runtime.cli import console, print_table
from unianom import visual

TASK_COLUMNS = ["task", "I-AUROC", "I-AP", "test images", "anomalous", "images in the bank", "bank rows"]


def _task_table(rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of all tasks, then their mean."""
    counts = ("n_images", "n_anomalous", "images", "bank_rows")
    table = [
        [row["task"], percent(row["image_auroc"]), percent(row["image_ap"]), *(f"{row[key]:,}" for key in counts)]
        for row in rows
    ]
    return [*table, ["mean", percent(mean["image_auroc"]), percent(mean["image_ap"]), *[""] * len(counts)]]


def task_figure(rows: Sequence[Mapping[str, Any]], mean: float | None) -> bytes:
    """Draw a dot for each task, the highest AUROC on top, and a line at their mean; return PNG bytes."""
    known = sorted((row for row in rows if row["image_auroc"] is not None), key=lambda row: row["image_auroc"])
    figure = Figure(figsize=(5.2, 0.9 + 0.19 * len(known)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * row["image_auroc"] for row in known]
    axes.hlines(range(len(known)), 0, values, color=visual.NORMAL_COLOUR, linewidth=0.8, alpha=0.4)
    axes.scatter(values, range(len(known)), color=visual.NORMAL_COLOUR, s=22, zorder=3)
    for height, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (value, height), (5, 0), "data", "offset points", fontsize=6, va="center")
    title = "Image AUROC by normal class"
    if mean is not None:
        axes.axvline(100 * mean, color=visual.ANOMALOUS_COLOUR, linewidth=1)
        title += f"; line: mean {percent(mean)} %"
    axes.set_yticks(range(len(known)), [row["task"] for row in known])
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.set_xlim(max(0, min([50, *values]) - 4), 104)
    visual.quiet(axes, title, "image AUROC in %", "")
    return visual.png(figure)


def semantic_section(content: Mapping[str, Any], categories: Sequence[str]) -> dict[str, Any]:
    """Return the section of a report.

    Args:
        content: of semantic.json.
        categories: of the shards.
    """
    rows, mean = content["tasks"], content["mean"]
    return {
        "title": f"Semantic anomalies: {content['method']} on {', '.join(categories)}",
        "text": [
            f"{len(rows)} choices of normal classes, each with a bank of its own; the whole test split is scored, "
            f"images of all other classes are anomalous.",
            f"Mean image AUROC {percent(mean['image_auroc'])} %, backbone {content['config']['backbone']['name']}.",
        ],
        "tables": [{"title": "Image level, in %", "columns": TASK_COLUMNS, "rows": _task_table(rows, mean)}],
        "figures": [{"title": "Image AUROC of each task", "file": "semantic.png"}],
    }


def print_semantic(content: Mapping[str, Any], folder: str, fresh: bool) -> None:
    """Print the table of tasks, and where everything is.

    Args:
        content: of semantic.json.
        folder: where it lies.
        fresh: whether this run wrote it.
    """
    print_table("image level, in %", TASK_COLUMNS, _task_table(content["tasks"], content["mean"]), footer=1)
    done = "written" if fresh else "was complete already"
    console.print(f"semantic protocol {done}: {folder} (semantic.json, tasks.csv, semantic.png, scores)")

"""The low-shot protocol: its figure, its section of the report, and its tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.reporting.metric_text import UNDEFINED, percent, short_name
from pipelines.runtime.cli import console, print_table
from unianom import visual

METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
"""Metrics that have a table, in this order."""


def _skipped_sentences(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each category that has too few normal images for some numbers of shots."""
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in skipped:
        by_category.setdefault(row["category"], []).append(row)
    return [
        f"{name} has only {rows[0]['normal_images']} normal images, so it takes no part at "
        f"{', '.join(str(row['shots']) for row in rows)} shots."
        for name, rows in by_category.items()
    ]


def _shot_tables(summary: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, columns and rows of a table for each metric: categories by numbers of shots.

    The mean is shown where all categories take part; over fewer it could not be compared.
    """
    shots = sorted({row["shots"] for row in summary})
    names = list(dict.fromkeys(row["category"] for row in summary))
    if len(names) == 2:  # the mean of a single category would repeat it
        names = names[:1]
    cells = {(row["category"], row["shots"]): row for row in summary}
    tables = []
    for key in METRICS:
        if not any(key in row for row in summary):
            continue
        table = []
        for name in names:
            known = [cells.get((name, number), {}) for number in shots]
            spreads = [
                row.get(key) if name != "mean" or row.get("categories") == len(names) - 1 else None for row in known
            ]
            table.append([name, *(UNDEFINED if value is None else _with_spread(value) for value in spreads)])
        tables.append(
            (short_name(key), ["category", *(f"{number} shot{'s' * (number > 1)}" for number in shots)], table)
        )
    return tables


def _with_spread(value: Mapping[str, float | None]) -> str:
    """Return mean ± standard deviation in %, without the latter where there is none."""
    return percent(value["mean"]) + ("" if value["sd"] is None else f"±{100 * value['sd']:.1f}")


COLOURS = ("#3f83c9", "#dd6b33", "#3a9a6c", "#a45fb5", "#b8962e", "#6b7280")


def shot_figure(summary: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw curves over the number of shots on a logarithmic axis, with a band of one standard deviation; return
    PNG bytes."""
    keys = [key for key in ("image_auroc", "pixel_auroc", "aupro") if any(key in row for row in summary)]
    figure = Figure(figsize=(3.4 * len(keys), 3.1), layout="constrained")
    names = [name for name in dict.fromkeys(row["category"] for row in summary) if name != "mean"]
    several = len(names) > len(COLOURS)
    for number, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), number + 1)
        for index, name in enumerate(names):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "label": name}
            if several:
                style = {"color": "#9aa3b0", "linewidth": 0.7}
            _draw_spread(axes, [row for row in summary if row["category"] == name and key in row], key, style)
        if several:
            every = [row for row in summary if row["category"] == "mean" and row["categories"] == len(names)]
            mean = [row for row in every if key in row]
            _draw_spread(axes, mean, key, {"color": COLOURS[0], "label": "mean"})
        shots = sorted({row["shots"] for row in summary})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(s) for s in shots])
        axes.minorticks_off()
        visual.quiet(axes, short_name(key), "normal images per category", "in %" if number == 0 else "")
        if number == 0:
            axes.legend(fontsize=7, frameon=False, loc="lower right")
    return visual.png(figure)


def _draw_spread(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, style: dict[str, Any]) -> None:
    """Draw one curve with its band; grey ones have none."""
    if not rows:
        return
    shots = [row["shots"] for row in rows]
    mean = np.array([100 * row[key]["mean"] for row in rows])
    deviation = np.array([100 * (row[key]["sd"] or 0) for row in rows])
    axes.plot(shots, mean, marker="o", markersize=3.5, **{"linewidth": 1.5, **style})
    if "label" in style:
        axes.fill_between(shots, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, linewidth=0)


def low_shot_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a report.

    Args:
        content: of low_shot.json.
    """
    summary = content["summary"]
    banks = "one bank for each category" if content["per_category"] else "one bank for all categories"
    return {
        "title": f"Few normal images: {content['method']}",
        "text": [
            f"{_draws(summary)} seeded draws of each number of normal images per category, {banks}; mean ± standard "
            f"deviation over the draws, on all test images. Backbone {content['config']['backbone']['name']}.",
            *_skipped_sentences(content["skipped"]),
        ],
        "tables": [
            {"title": f"{title}, in %", "columns": columns, "rows": table}
            for title, columns, table in _shot_tables(summary)
        ],
        "figures": [{"title": "Metrics by number of normal images", "file": "low_shot.png"}],
    }


def _draws(summary: Sequence[Mapping[str, Any]]) -> int:
    """Return how often each number of shots was drawn."""
    return int(max(row["draws"] for row in summary))


def print_low_shot(content: Mapping[str, Any], folder: str, fresh: bool) -> None:
    """Print a table for each metric, which categories were left out, and where everything is.

    Args:
        content: of low_shot.json.
        folder: where it lies.
        fresh: whether this run wrote it.
    """
    for title, columns, table in _shot_tables(content["summary"]):
        print_table(f"{title} in %", columns, table, footer=int(len(table) > 1))
    console.print(f"mean ± standard deviation over {_draws(content['summary'])} draws")
    for sentence in _skipped_sentences(content["skipped"]):
        console.print(f"note: {sentence}")
    done = "written" if fresh else "was complete already"
    console.print(f"low-shot protocol {done}: {folder} (low_shot.json, draws.csv, summary.csv, low_shot.png, scores)")

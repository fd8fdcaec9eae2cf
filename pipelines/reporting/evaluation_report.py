"""An evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.reporting.headline import headline_rows, largest_error
from pipelines.reporting.metric_text import SHORT_NAMES, aupro_keys, percent, short_name
from pipelines.runtime.cli import console, print_table


def print_evaluation(content: Mapping[str, Any]) -> None:
    """Print the result tables, raw and calibrated, and the rates met at the threshold."""
    for kind, tables in (("raw", content), ("calibrated", content["calibrated"])):
        if tables is not None:
            title = "metrics in %" if content["calibrated"] is None else f"metrics of {kind} scores in %"
            _print_metrics(title, tables)
    _print_headline(content)
    if content["pixel_mode"] == "binned":
        console.print(f"pixel metrics of the union are off by at most {largest_error(content):.2g} percentage points")
    for note in content["notes"]:
        console.print(f"note: {note}")
    _print_rates(content["threshold"])


def _print_metrics(title: str, tables: Mapping[str, Any]) -> None:
    metrics = tables["metrics"]
    totals = []
    if len(tables["datasets"]) > 1:
        for entry in tables["datasets"]:
            # a data set of one category would repeat its row
            if sum(row["dataset"] == entry["dataset"] for row in metrics["categories"]) != 1:
                totals += [{**entry[name], "category": f"{name} of {entry['dataset']}"} for name in ("mean", "union")]
    totals += [{**metrics["mean"], "category": "mean"}, {**metrics["union"], "category": "union"}]
    rows = [*metrics["categories"], *totals]
    shown = [key for key in SHORT_NAMES if any(row.get(key) is not None for row in rows)]
    shown += aupro_keys(metrics["mean"])
    table = [
        [row["category"], *(percent(row.get(key)) for key in shown), str(row["n_images"]), str(row["n_anomalous"])]
        for row in rows
    ]
    print_table(title, ["category", *map(short_name, shown), "images", "anomalous"], table, footer=len(totals))


def _print_headline(content: Mapping[str, Any]) -> None:
    intervals = content["intervals"]
    if intervals is None and content["calibrated"] is None:
        return
    columns, rows = headline_rows(content)
    title = "protocols side by side, in %"
    if intervals is not None:
        title += (
            f" [{100 * intervals['confidence']:g} % confidence intervals, {intervals['resamples']:,} resamples of the "
            f"images]"
        )
    print_table(title, ["scores, protocol", *columns], rows)


def _print_rates(threshold: Mapping[str, Any] | None) -> None:
    if threshold is None:
        console.print("no threshold in the model, so no decisions were evaluated")
        return
    met = threshold["union"]
    promised = (
        f"promised at most {100 * threshold['target_fpr']:.3g} % at {100 * threshold['confidence']:g} % confidence"
    )
    if not threshold.get("promised", True):
        promised = "no promise: too few normal images"
    if met is not None and met["false_positive_rate"] is not None:
        caught = "–" if met["detection_rate"] is None else f"{100 * met['detection_rate']:.1f} %"
        console.print(
            f"at the threshold: {100 * met['false_positive_rate']:.1f} % of {met['n_normal']} normal images fail "
            f"({promised}), {caught} of {met['n_anomalous']} anomalous images are caught"
        )

"""A comparison as tables, on the terminal, and as a section of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.reporting.metric_text import UNDEFINED, percent, short_name
from pipelines.reporting.table_formats import Table
from pipelines.runtime.cli import console, print_table

PROTOCOLS = {"mean": "mean over categories", "union": "union of categories (absolute-unified)"}


def comparison_tables(
    results: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    mean_ranks: Mapping[str, Mapping[str, Any]],
) -> Iterator[Table]:
    """Yield a table for each data set and protocol, one of mean ranks, and those of published results.

    Args:
        results: all lines, as comparison.json holds them.
        metrics: that any result has, in the order of their columns.
        groups: dataset, protocol and results of each, and the results' ranks by metric.
        mean_ranks: by protocol, the data sets and the models with their mean ranks.
    """
    for group in groups:
        yield _group_table(group)
    for protocol, words in PROTOCOLS.items():
        datasets, models = mean_ranks[protocol]["datasets"], mean_ranks[protocol]["models"]
        if len(datasets) > 1:
            shown = [key for key in metrics if any(key in model for model in models)]
            rows = [
                [model["name"], model["scores"], *(f"{model[k]:.2f}" if k in model else UNDEFINED for k in shown)]
                for model in models
            ]
            title = f"mean rank over {', '.join(datasets)} ({words}); 1 is best"
            yield Table(title, ["model", "scores", *map(short_name, shown)], rows)
    yield from _published_tables(results, metrics)


def _group_table(group: Mapping[str, Any]) -> Table:
    shown = list(group["ranks"])
    rows = [[r["name"], r["method"], r["scores"], *(_cell(r, key) for key in shown)] for r in group["results"]]
    best = set()
    for column, key in enumerate(shown, 3):
        placed = group["ranks"][key]
        first = min((rank for rank in placed if rank is not None), default=None)
        best |= {(n, column) for n, rank in enumerate(placed) if rank is not None and rank == first}
    title = f"{group['dataset']}, {PROTOCOLS[group['protocol']]}, in %"
    return Table(title, ["model", "method", "scores", *map(short_name, shown)], rows, frozenset(best))


def _cell(result: Mapping[str, Any], metric: str) -> str:
    """Return a metric in %, with its interval where it has one."""
    value, bounds = percent(result["metrics"].get(metric)), result["intervals"].get(metric)
    if bounds is None or None in bounds:
        return value
    return f"{value} [{percent(bounds[0])}, {percent(bounds[1])}]"


def _published_tables(results: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Iterator[Table]:
    """Yield results beside published ones, and published ones that do not compare."""
    beside, apart = [], []
    for result in results:
        published = result["published"]
        if published is None:
            continue
        head = [result["name"], result["dataset"], result["protocol"], result["scores"]]
        if published["differences"]:
            apart.append([*head, published["source"], "; ".join(published["differences"])])
            continue
        for key, value in published["values"].items():
            here = result["metrics"].get(key)
            gap = UNDEFINED if here is None else f"{100 * here - value:+.1f}"
            name = short_name(key) if key in metrics else key
            beside.append([*head, name, percent(here), f"{value:g}", gap, published["source"]])
    line = ["model", "data set", "over categories", "scores"]
    if beside:
        columns = [*line, "metric", "here", "published", "difference", "source"]
        yield Table("published results of the same method, protocol and settings, in %", columns, beside)
    if apart:
        yield Table("published results that these runs are not comparable with", [*line, "source", "because"], apart)


def plain_table(table: Table) -> dict[str, Any]:
    """Return a table as comparison.json holds it."""
    return {"title": table.title, "columns": table.columns, "rows": table.rows, "best": sorted(map(list, table.best))}


def comparison_section(tables: Sequence[Table], notes: Sequence[str]) -> dict[str, Any]:
    """Return the section of a report."""
    shown = [{"title": table.title, "columns": table.columns, "rows": table.rows} for table in tables]
    return {"title": "Comparison", "text": [f"{note}." for note in notes], "tables": shown, "figures": []}


def print_comparison(content: Mapping[str, Any]) -> None:
    """Print all tables."""
    for table in content["tables"]:
        print_table(table["title"], table["columns"], table["rows"])
        console.print()
    for note in content["notes"]:
        console.print(f"note: {note}")

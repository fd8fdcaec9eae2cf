"""Evaluations as lines of a comparison: results by data set and protocol, and their ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from pipelines.evaluation.metric_tables import mean_row
from pipelines.evaluation.published import nearest_published
from unianom import files
from unianom.options import to_plain

ALL = "all"
"""Name of all data sets of an evaluation together."""

METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "dsc")
"""Compared metrics, before AUPRO."""

PROTOCOLS = ("mean", "union")
"""Mean over categories, and union of categories (absolute-unified)."""


@dataclass(frozen=True)
class Result:
    """One line of the comparison: a model on a data set.

    Attributes:
        name: of the evaluation.
        method: of its models.
        dataset: name, or "all".
        protocol: "mean" over categories, or "union" of them.
        scores: "raw" or "calibrated".
        metrics: share by name, with the counts n_images and n_anomalous.
        intervals: lower and upper bound by metric, where the evaluation has them.
        published: source, values in % and differences of the published result nearest to it; None without any.
    """

    name: str
    method: str
    dataset: str
    protocol: str
    scores: str
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    published: dict[str, Any] | None


def results_of(name: str, evaluation: Mapping[str, Any], published: Sequence[Mapping[str, Any]]) -> Iterator[Result]:
    """Yield the lines of an evaluation: by data set, and of several data sets together; raw, and calibrated
    where it has that."""
    for scores in ("raw", "calibrated"):
        block = evaluation if scores == "raw" else evaluation.get("calibrated")
        if block is None:
            continue
        intervals = (evaluation.get("intervals") or {}).get(scores) or {}
        for dataset, rows, metrics, bounds in _data_sets(block, intervals):
            models = _models_of(evaluation, rows)
            for protocol in PROTOCOLS if len(rows) > 1 else ("mean",):
                if metrics.get(protocol) is None:
                    continue
                yield Result(
                    name=name,
                    method=", ".join(sorted({model["method"] for model in models})),
                    dataset=dataset,
                    protocol=protocol,
                    scores=scores,
                    metrics=metrics[protocol],
                    intervals=bounds.get(protocol) or {},
                    published=nearest_published(published, evaluation, models, dataset, rows, protocol, scores),
                )


def _data_sets(
    block: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]]:
    """Yield name, rows of categories, results and intervals by protocol of each data set, then of all of them."""
    metrics = block["metrics"]
    names = list(dict.fromkeys(row["dataset"] for row in metrics["categories"]))
    given = {entry["dataset"]: entry for entry in block.get("datasets") or []}
    whole = {"mean": metrics["mean"], "union": metrics["union"]}
    for name in names:
        rows = [row for row in metrics["categories"] if row["dataset"] == name]
        if len(names) == 1:
            yield name, rows, whole, dict(intervals)
            continue
        totals = given.get(name) or {"mean": mean_row(rows), "union": None}  # a union needs the scores, not their means
        alone = rows[0]["category"] if len(rows) == 1 else None
        yield name, rows, totals, {"mean": (intervals.get("categories") or {}).get(alone)}
    if len(names) > 1:
        yield ALL, metrics["categories"], whole, dict(intervals)


def _models_of(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the models that judged these categories."""
    categories = {row["category"] for row in rows}
    return [model for model in evaluation["models"] if categories & set(model["categories"])] or evaluation["models"]


def metric_keys(results: Sequence[Result]) -> list[str]:
    """Return the compared metrics that any result has; the error bounds of binned ones are no metrics."""
    keys = [key for result in results for key, value in result.metrics.items() if value is not None]
    aupro = [key for key in keys if key.startswith("aupro") and not key.endswith("_error")]
    return [key for key in dict.fromkeys([*METRICS, *aupro]) if key in keys]


def group_results(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return results by data set and protocol; all data sets together come last."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.protocol), []).append(result)
    order = {"mean": 0, "union": 1}
    return dict(sorted(groups.items(), key=lambda item: (item[0][0] == ALL, item[0][0], order[item[0][1]])))


def same_images(group: Sequence[Result]) -> bool:
    """Return whether all results count as many images and anomalous ones; else they are of different images."""
    return len({(result.metrics.get("n_images"), result.metrics.get("n_anomalous")) for result in group}) == 1


def ranks(group: Sequence[Result], metric: str) -> list[float | None]:
    """Return the rank of each result, 1 the best, ties sharing their mean; None where it is undefined."""
    defined = [n for n, result in enumerate(group) if result.metrics.get(metric) is not None]
    placed: list[float | None] = [None] * len(group)
    if len(group) < 2 or not same_images(group):  # results of different images do not compare
        return placed
    for n, rank in zip(defined, rankdata([-group[n].metrics[metric] for n in defined]), strict=True):
        placed[n] = float(rank)
    return placed


def mean_ranks(results: Sequence[Result], protocol: str) -> tuple[list[str], dict[tuple[str, str], dict[str, float]]]:
    """Average the ranks over those data sets in which every model has a rank.

    Returns:
        The data sets, and by name and scores the mean rank of each metric; models without a single such data set are
        left out, so all means are over the same data sets.
    """
    lines = {(result.name, result.scores) for result in results}
    used: list[str] = []
    collected: dict[tuple[str, str], dict[str, list[float]]] = {line: {} for line in sorted(lines)}
    for (dataset, its_protocol), group in group_results(results).items():
        if dataset == ALL or its_protocol != protocol or {(r.name, r.scores) for r in group} != lines:
            continue
        if len(group) < 2 or not same_images(group):
            continue
        used.append(dataset)
        for metric in metric_keys(group):
            for result, rank in zip(group, ranks(group, metric), strict=True):
                if rank is not None:
                    collected[result.name, result.scores].setdefault(metric, []).append(rank)
    means = {
        line: {metric: float(np.mean(values)) for metric, values in by_metric.items() if len(values) == len(used)}
        for line, by_metric in collected.items()
    }
    return used, means if used else {}


def ranked_groups(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return for each data set and protocol its results as plain data, and their ranks by metric."""
    return [
        {
            "dataset": dataset,
            "protocol": protocol,
            "results": [to_plain(result) for result in group],
            "ranks": {key: ranks(group, key) for key in metric_keys(group)},
        }
        for (dataset, protocol), group in group_results(results).items()
    ]


def plain_mean_ranks(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return the mean ranks of each protocol as plain data, see `mean_ranks`."""
    plain = {}
    for protocol in PROTOCOLS:
        used, means = mean_ranks(results, protocol)
        models = [{"name": name, "scores": scores, **by_metric} for (name, scores), by_metric in means.items()]
        plain[protocol] = {"datasets": used, "models": models}
    return plain


def comparison_notes(results: Sequence[Result], published: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each thing a reader must know before comparing."""
    notes = [
        f"{dataset}: the evaluations are of different images, so they are not ranked"
        for (dataset, protocol), group in group_results(results).items()
        if protocol == "mean" and not same_images(group)
    ]
    compared = {(entry["method"], entry["dataset"]) for entry in published}
    without = sorted({r.dataset for r in results if r.published is None and (r.method, r.dataset) not in compared})
    if without:
        notes.append(f"no published results at hand for these methods on {', '.join(without)}")
    return notes


def comparison_csv(results: Sequence[Result]) -> bytes:
    """Return comparison.csv: one line a result, shares from 0 to 1; published values only where they compare."""
    shown = metric_keys(results)
    lines = []
    placed = {
        id(r): {k: ranks(g, k)[n] for k in shown} for g in group_results(results).values() for n, r in enumerate(g)
    }
    for result in results:
        published = result.published or {"values": {}, "differences": [], "source": ""}
        line: dict[str, Any] = {
            key: getattr(result, key) for key in ("name", "method", "dataset", "protocol", "scores")
        }
        line |= {key: result.metrics.get(key) for key in ("n_images", "n_anomalous")}
        for key in shown:
            low, high = result.intervals.get(key) or (None, None)
            value = None if published["differences"] else published["values"].get(key)
            line |= {key: result.metrics.get(key), f"{key}_low": low, f"{key}_high": high}
            line |= {
                f"{key}_rank": placed[id(result)][key],
                f"{key}_published": None if value is None else round(value / 100, 6),
            }
        lines.append(line | {"source": published["source"], "not_comparable": "; ".join(published["differences"])})
    return files.csv_bytes(lines)

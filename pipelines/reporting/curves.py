"""Curves and score histograms of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.reporting.metric_text import aupro_keys, percent
from pipelines.reporting.samples import labelled, text_column
from unianom import files, visual
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.metrics.curves import Curve


@dataclass(frozen=True, eq=False)
class Scope:
    """Scores and metrics that a set of curves is about: of a category, or of all of them together.

    Attributes:
        name: its category, or "union".
        key: its name among the curves of the evaluation.
        title: its name as shown.
        metrics: its row of the results.
        rates: what the threshold does to it, if there is one.
        normal, anomalous: scores of its images.
    """

    name: str
    key: str
    title: str
    metrics: Mapping[str, Any]
    rates: Mapping[str, Any] | None
    normal: np.ndarray
    anomalous: np.ndarray


def curves_key(category: str, curves: Mapping[str, Any]) -> str:
    """Return the name of a category among the curves of an evaluation.

    It is its own, or "category:<name>" where its own could be taken for that of a total.
    """
    marked = f"category:{category}"
    return marked if marked in curves else category


def scopes(evaluation: Mapping[str, Any], table: pa.Table) -> list[Scope]:
    """Return all categories together, then each of them; of a single category just that."""
    metrics, threshold = evaluation["metrics"], evaluation["threshold"]
    names = [row["category"] for row in metrics["categories"]]
    rates = {row["category"]: row for row in threshold["categories"]} if threshold else {}
    category, label, score = text_column(table, "category"), table["label"].to_numpy(), table["score"].to_numpy()
    normal, anomalous = label == NORMAL, label == ANOMALOUS
    shown = [
        Scope(
            name="union",
            key="union",
            title=names[0] if len(names) == 1 else "All categories",
            metrics=metrics["union"],
            rates=threshold["union"] if threshold else None,
            normal=score[normal],
            anomalous=score[anomalous],
        )
    ]
    for name, row in zip(names, metrics["categories"], strict=True):
        inside = category == name
        if len(names) > 1:
            key = curves_key(name, evaluation["curves"])
            shown.append(
                Scope(name, key, name, row, rates.get(name), score[inside & normal], score[inside & anomalous])
            )
    return shown


def figures(evaluation: Mapping[str, Any], scores_table: pa.Table) -> dict[str, bytes]:
    """Draw curves and score histograms as pictures, the same as in the report.

    Args:
        evaluation: content of evaluation.json.
        scores_table: the score set's columns sample_id, category, label, score, calibrated_score and status.

    Returns:
        PNG bytes by file name: "union.png" and, of several categories, "scores_by_category.png" and
        "category_<name>.png" each.
    """
    pictures = {}
    table = labelled(scores_table)
    for number, scope in enumerate(scopes(evaluation, table)):
        panels = scope_panels(evaluation, scope)
        figure, axes = visual.new_figure(len(panels), scope.title)
        for draw, ax in zip(panels, axes, strict=True):
            draw(ax)
        name = "union" if number == 0 else f"category_{files.safe_name(scope.name)}"
        pictures[f"{name}.png"] = visual.png(figure)
    rows = score_rows(evaluation, table)
    if rows is not None:
        pictures["scores_by_category.png"] = visual.png(rows)
    return pictures


def score_rows(evaluation: Mapping[str, Any], table: pa.Table) -> Figure | None:
    """Draw score histograms of every category on one axis, raw and, where there are any, calibrated.

    Return None for one category without calibrated scores, whose histogram is shown anyway.
    """
    names = [row["category"] for row in evaluation["metrics"]["categories"]]
    kinds = {"Raw scores": "score"}
    if evaluation.get("calibrated"):
        kinds["Calibrated scores"] = "calibrated_score"
    if len(names) == 1 and len(kinds) == 1:
        return None
    category, label = text_column(table, "category"), table["label"].to_numpy()
    columns = {}
    for title, column in kinds.items():
        scores = table[column].to_numpy()
        columns[title] = [
            (scores[(category == name) & (label == NORMAL)], scores[(category == name) & (label == ANOMALOUS)])
            for name in names
        ]
    union = evaluation["threshold"] and evaluation["threshold"]["union"]
    threshold = union["threshold"] if union else None
    return visual.score_rows(columns, names, [] if threshold is None else [threshold])


def scope_panels(evaluation: Mapping[str, Any], scope: Scope) -> list[Callable[[Axes], None]]:
    """Return what draws each figure of a scope: ROC, precision–recall, PRO where there is one, score histogram."""
    of_scope = evaluation["curves"][scope.key]
    others = [c for key, c in evaluation["curves"].items() if key != "union"] if scope.key == "union" else []
    rates = scope.rates or {}

    def curves(**keys: tuple[str, str]) -> dict[str, Curve]:
        """Return curves by their label, which carries the metric that sums the curve up."""
        return {
            f"{level} {percent(scope.metrics.get(metric))} %": _curve(of_scope[key])
            for level, (key, metric) in keys.items()
            if key in of_scope
        }

    def context(key: str) -> list[Curve]:
        return [_curve(other[key]) for other in others if key in other and len(others) > 1]

    point = None
    if rates.get("false_positive_rate") is not None and rates.get("detection_rate") is not None:
        point = (rates["false_positive_rate"], rates["detection_rate"])
    roc = curves(image=("roc", "image_auroc"), pixel=("pixel_roc", "pixel_auroc"))
    pr = curves(image=("pr", "image_ap"), pixel=("pixel_pr", "pixel_ap"))
    panels: list[Callable[[Axes], None]] = [
        partial(visual.draw_curves, kind="roc", curves=roc, context=context("roc"), point=point),
        partial(visual.draw_curves, kind="pr", curves=pr, context=context("pr")),
    ]
    if "pro" in of_scope:
        pro = curves(AUPRO=("pro", aupro_keys(scope.metrics)[0]))
        panels.append(partial(visual.draw_curves, kind="pro", curves=pro, context=context("pro")))
    histogram = partial(visual.draw_histogram, normal=scope.normal, anomalous=scope.anomalous)
    return [*panels, partial(histogram, threshold=rates.get("threshold"))]


def _curve(content: Mapping[str, Sequence[float]]) -> Curve:
    return Curve(np.asarray(content["x"], np.float64), np.asarray(content["y"], np.float64))

"""The page of scores without an evaluation: of images that nobody has labelled, the most anomalous first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pipelines.reporting.gallery import Judged, PictureGroup, choose_unlabelled, judged
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.metric_glossary import DISTANCE
from pipelines.reporting.metric_text import percent
from pipelines.reporting.outcomes import counted, joined, verdict
from pipelines.reporting.overview import threshold_lines
from pipelines.reporting.page import colours, figure_svg, frame_ratio, legend, scales_of, svg, templates
from pipelines.reporting.page_facts import data_facts, model_details, page_title
from pipelines.reporting.page_notices import RANDOM_WEIGHTS, any_random, count_unscored
from pipelines.reporting.page_tables import sample_counts
from pipelines.reporting.pictures import Pictures, draw_pictures
from pipelines.reporting.samples import text_column
from pipelines.reporting.sections import Section
from unianom import __version__, visual
from unianom.data.shards import ShardSet
from unianom.thresholds import threshold_of

LARGE = 4
"""Pictures of the first screen."""

RANKED = 200
"""Images of the table of the highest scores."""


def scores_page(
    inputs: Sequence[ReportInput], shards: ShardSet, count: int, sections: Sequence[Section], plan: str
) -> str:
    """Return the page as HTML.

    Args:
        inputs: one, without an evaluation.
        shards: of the images.
        count: of pictures, see `gallery.choose_unlabelled`.
        sections: of other jobs.
        plan: digest that the page's head names.
    """
    (entry,) = inputs
    samples = judged(inputs)
    chosen = choose_unlabelled(samples, count)
    rows = [row for group in chosen for row in group.rows]
    pictures = draw_pictures(inputs, shards, samples, rows)
    categories = sorted(set(samples.category))
    thresholds = _thresholds(entry)
    return (
        templates()
        .get_template("scores_page.html")
        .render(
            title=page_title(inputs),
            plan=plan,
            answer=_answer(samples),
            threshold=threshold_lines(entry),
            notices=_notices(entry, samples),
            groups=[_group(group, pictures, first=number == 0) for number, group in enumerate(chosen)],
            ratio=frame_ratio(list(pictures.cards.values())),
            several_categories=len(categories) > 1,
            scales=scales_of(inputs, pictures, samples, rows),
            legend=legend(pictures),
            histogram=_histogram(entry, thresholds),
            score_rows=_score_rows(entry, categories, thresholds) if len(categories) > 1 else None,
            by_category=_by_category(samples, categories) if len(categories) > 1 else None,
            ranking=_ranking(entry, samples),
            sections=sections,
            models=[model_details(model) for model in entry.models],
            data=data_facts(inputs, shards),
            counts=sample_counts(shards.manifest["counts"]),
            rejected=_rejected(entry),
            n_rejected=count_unscored(entry.scores.manifest["statuses"]),
            meanings=[DISTANCE],
            tool_version=__version__,
            **colours(),
        )
    )


def _answer(samples: Judged) -> str:
    """Say in a sentence how many images were flagged."""
    decisions = Counter(samples.decision[:, 0].tolist())
    total = len(samples.sample_id)
    if set(decisions) == {None}:
        return f"{counted(total, 'image')} by score. No threshold, so nothing is flagged."
    parts = [f"{decisions['fail']:,} of {counted(total, 'image')} flagged ({percent(decisions['fail'] / total)} %)"]
    if decisions["review"]:
        parts.append(f"{decisions['review']:,} for review")
    return f"{joined(parts)}."


def _notices(entry: ReportInput, samples: Judged) -> list[tuple[str, str]]:
    """Return what limits what the page shows."""
    found = [("warning", RANDOM_WEIGHTS)] if any_random(entry.models) else []
    statuses = entry.scores.manifest["statuses"]
    if unscored := count_unscored(statuses):
        found.append(("warning", f"{unscored:,} of {counted(sum(statuses.values()), 'sample')} without a score."))
    if np.any(samples.label >= 0):
        found.append(("note", "Some images are labelled: jobs/evaluate.py tells how well the scores agree with it."))
    return found


def _group(group: PictureGroup, pictures: Pictures, first: bool) -> dict[str, Any]:
    cards = [pictures.cards[row] for row in group.rows]
    return {"title": group.title, "large": cards[:LARGE] if first else [], "cards": cards[LARGE:] if first else cards}


def _thresholds(entry: ReportInput) -> list[float]:
    """Return the thresholds in use, each once."""
    models = {model["digest"]: model for model in entry.models}
    pairs = set(zip(text_column(entry.table, "model"), text_column(entry.table, "category")))
    found = (threshold_of(models[digest], name) for digest, name in pairs)
    return sorted({threshold["value"] for threshold in found if threshold is not None})


def _histogram(entry: ReportInput, thresholds: Sequence[float]) -> Any:
    """Draw the spread of all scores, with the threshold where there is one for all."""
    scores, label = entry.table["score"].to_numpy(), entry.table["label"].fill_null(-1).to_numpy()
    threshold = thresholds[0] if len(thresholds) == 1 else None
    groups = [
        (scores[label == -1], "images", visual.NORMAL_COLOUR),
        (scores[label == 0], "normal", visual.NORMAL_COLOUR),
        (scores[label == 1], "anomalous", visual.ANOMALOUS_COLOUR),
    ]
    given = [group for group in groups if len(group[0])]
    return svg(partial(visual.draw_scores, groups=given, threshold=threshold))


def _score_rows(entry: ReportInput, categories: Sequence[str], thresholds: Sequence[float]) -> Any:
    """Draw the spread of scores of each category."""
    scores, category = entry.table["score"].to_numpy(), text_column(entry.table, "category")
    groups = [(scores[category == name], np.zeros(0)) for name in categories]
    return figure_svg(visual.score_rows({"Scores": groups}, categories, thresholds if len(thresholds) == 1 else []))


def _by_category(samples: Judged, categories: Sequence[str]) -> dict[str, Any]:
    """Return the table of decisions by category."""
    rows = []
    for name in categories:
        decisions = Counter(samples.decision[samples.category == name, 0].tolist())
        total = sum(decisions.values())
        flagged = decisions["fail"]
        rows.append([name, f"{total:,}", f"{flagged:,}", percent(flagged / total), f"{decisions['review']:,}"])
    return {"columns": ["category", "images", "flagged", "flagged %", "for review"], "rows": rows}


def _ranking(entry: ReportInput, samples: Judged) -> list[dict[str, Any]]:
    """Return the images with the highest scores over their thresholds."""
    order = np.argsort(-samples.margin[:, 0], kind="stable")[:RANKED]
    rows = entry.table.take(samples.rows[order, 0]).to_pylist()
    return [
        {
            **row,
            "margin": round(float(samples.margin[place, 0]), 1) + 0.0,
            "verdict": verdict(int(samples.label[place]), row["decision"]),
        }
        for place, row in zip(order, rows, strict=True)
    ]


def _rejected(entry: ReportInput, most: int = 100) -> list[dict[str, Any]]:
    """Return the first samples without a score, and why they have none."""
    table = entry.scores.table(columns=["sample_id", "category", "status", "error"])
    return [row for row in table.to_pylist() if row["status"] != "ok"][:most]

"""The page of one evaluation, or of several of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.reporting.curves import scope_panels, scopes, score_rows
from pipelines.reporting.gallery import CategoryPictures, Judged, choose, judged, margins
from pipelines.reporting.headline import dataset_rows, headline_rows
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.metric_glossary import term_meanings
from pipelines.reporting.model_comparison import category_table, headline_table
from pipelines.reporting.overview import category_lines, headline_tiles, threshold_lines, worst_first, wrong_rows
from pipelines.reporting.page import colours, figure_svg, frame_ratio, legend, scales_of, svg, templates
from pipelines.reporting.page_facts import data_facts, evaluation_facts, model_details, page_title
from pipelines.reporting.page_notices import count_unscored, shared_notices
from pipelines.reporting.page_tables import decision_rows, defect_rows, results_table, sample_counts
from pipelines.reporting.pictures import Pictures, draw_pictures
from pipelines.reporting.sections import Section
from unianom import __version__
from unianom.data.shards import ShardSet


def evaluation_page(
    inputs: Sequence[ReportInput], shards: ShardSet, count: int, sections: Sequence[Section], plan: str
) -> str:
    """Return the page as HTML.

    Args:
        inputs: of the report, each with an evaluation.
        shards: of the images.
        count: pictures of each category, see `gallery.choose`.
        sections: of other jobs.
        plan: digest that the page's head names.
    """
    samples, categories = judged(inputs), worst_first(inputs)
    chosen = choose(samples, categories, count)
    large = [[row for _, row in of.large] for of in chosen]
    rows = [row for own, of in zip(large, chosen) for row in (*own, *(r for group in of.more for r in group.rows))]
    pictures = draw_pictures(inputs, shards, samples, rows)
    common_scales = scales_of(inputs, pictures, samples, rows)
    one_scale = len(common_scales) <= len(inputs)
    several = len(inputs) > 1
    return (
        templates()
        .get_template("evaluation_page.html")
        .render(
            title=page_title(inputs),
            plan=plan,
            several=several,
            answers=[_answer(entry, several) for entry in inputs],
            model_rows=headline_table(inputs) if several else [],
            model_names=[entry.name for entry in inputs],
            by_category=category_table(inputs, categories) if several and len(categories) > 1 else None,
            notices=shared_notices(inputs, shards.manifest),
            n_categories=len(categories),
            blocks=[
                _block(inputs, samples, pictures, of, own, not one_scale) for of, own in zip(chosen, large, strict=True)
            ],
            scales=common_scales if one_scale else [],
            legend=legend(pictures),
            wrong=[{"name": entry.name, **wrong_rows(entry, margins(entry))} for entry in inputs],
            details=[_details(number, entry) for number, entry in enumerate(inputs)],
            sections=sections,
            data=data_facts(inputs, shards),
            counts=sample_counts(shards.manifest["counts"]),
            meanings=term_meanings(_all_categories(inputs)),
            tool_version=__version__,
            **colours(),
        )
    )


def _answer(entry: ReportInput, several: bool) -> dict[str, Any]:
    """Return what the first screen says of one input."""
    total = entry.outcomes[0]
    return {
        "name": entry.name if several else "",
        "words": total.in_words,
        "threshold": threshold_lines(entry),
        "tiles": [] if several else headline_tiles(entry, total),
    }


def _block(
    inputs: Sequence[ReportInput],
    samples: Judged,
    pictures: Pictures,
    of: CategoryPictures,
    large: Sequence[int],
    with_scales: bool,
) -> dict[str, Any]:
    """Return what stands of one category on the first screen, and behind it."""
    rows = [row for row in large if row in pictures.cards]
    more = [(group, [pictures.cards[row] for row in group.rows]) for group in of.more]
    every = [*rows, *(row for group in of.more for row in group.rows)]
    return {
        "category": of.category,
        "lines": category_lines(of.category, inputs),
        "ratio": frame_ratio([pictures.cards[row] for row in rows]),
        "large": [(role, pictures.cards[row]) for role, row in of.large],
        "more": [{"title": group.title, "left_out": group.left_out, "cards": cards} for group, cards in more],
        "n_more": sum(len(cards) for _, cards in more),
        "scales": scales_of(inputs, pictures, samples, every) if with_scales else [],
    }


def _details(number: int, entry: ReportInput) -> dict[str, Any]:
    """Return tables and curves of one input."""
    evaluation = entry.evaluation
    assert evaluation is not None
    calibrated = evaluation.get("calibrated")
    rows = score_rows(evaluation, entry.table)
    shown = scopes(evaluation, entry.table)
    return {
        "suffix": f"-{number + 1}" if number else "",
        "name": entry.name,
        "facts": evaluation_facts(evaluation, entry.scores.manifest, entry.table),
        "results": results_table(evaluation["metrics"]),
        "calibrated": None if calibrated is None else results_table(calibrated["metrics"]),
        "protocols": headline_rows(evaluation),
        "intervals": evaluation.get("intervals"),
        "datasets": dataset_rows(evaluation),
        "score_rows": None if rows is None else figure_svg(rows),
        "threshold": threshold_lines(entry),
        "decisions": decision_rows(evaluation),
        "defects": defect_rows(entry.table),
        "scopes": [
            {"title": scope.title, "panels": [svg(p) for p in scope_panels(evaluation, scope)]} for scope in shown
        ],
        "models": [model_details(model) for model in entry.models],
        "rejected": evaluation["rejected"],
        "n_rejected": count_unscored(evaluation["statuses"]),
    }


def _all_categories(inputs: Sequence[ReportInput]) -> dict[str, Any]:
    """Return the rows of all inputs, whose columns are explained."""
    return {"categories": [row for e in inputs if e.evaluation for row in e.evaluation["metrics"]["categories"]]}

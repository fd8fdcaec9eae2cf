"""jobs/report.py: an evaluation → one HTML file to hand round, which needs nothing beside itself.

    evaluation.json ─▶ tables and curves ───────────────────────────┐
    scores, without maps ─▶ score histograms ───────────────────────┼─▶ report.html
                 └─▶ choice of samples ─▶ their images and maps ────┘

Only the images and maps that are shown are read, and those few maps that set the scale of all heat maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes

from pipelines.reporting.curves import scope_panels, scopes, score_rows
from pipelines.reporting.gallery import Card, Gallery, make_gallery
from pipelines.reporting.headline import dataset_rows, headline_rows
from pipelines.reporting.metric_glossary import term_meanings
from pipelines.reporting.metric_text import aupro_keys, percent
from pipelines.reporting.options import ReportOptions
from pipelines.reporting.page_facts import data_facts, evaluation_facts, model_details, page_title
from pipelines.reporting.page_notices import count_unscored, notices
from pipelines.reporting.page_tables import decision_rows, defect_rows, promise_words, results_table, sample_counts
from pipelines.reporting.samples import labelled
from pipelines.reporting.sections import Section, read_section
from pipelines.runtime import outputs
from pipelines.runtime.tracking import track
from unianom import __version__, files, visual
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError
from unianom.options import to_plain

SCORE_COLUMNS = (
    "sample_id",
    "category",
    "label",
    "defect",
    "score",
    "calibrated_score",
    "decision",
    "map_offset",
    "status",
    "model",
)
"""Columns of the scores that the page is made of; `map_offset` tells which samples have a map."""


def write_report(options: ReportOptions) -> str:
    """Write the report, or find it written; return its path or URI.

    Raises:
        DataError: no evaluation there, its scores or shards are gone or were changed since, a section is missing or
            not what it should be, or the output is anything but such a report.
    """
    path = files.join(options.evaluation, "evaluation.json")
    try:
        evaluation = files.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give the folder jobs/evaluate.py wrote") from error
    scores, shards = ScoreSet.open(evaluation["scores"]["uri"]), ShardSet.open(evaluation["shards"]["uri"])
    for name, parts in (("scores", scores), ("shards", shards)):
        if parts.digest != evaluation[name]["digest"]:
            raise DataError(f"{parts.uri} was changed after {path} was written; run jobs/evaluate.py again")
    table = labelled(scores.table(columns=SCORE_COLUMNS))
    sections = [read_section(folder) for folder in options.sections]
    output = files.full_uri(options.output)
    digest = files.digest_of(
        {
            "tool": __version__,
            "evaluation": files.sha256_file(path),
            "sections": [files.sha256_of(repr(section).encode()) for section in sections],
            "gallery": options.gallery,
        }
    )
    # the scores and shards that the evaluation names are read, too
    inputs = {
        "evaluation": options.evaluation,
        "evaluation's scores": scores.uri,
        "evaluation's shards": shards.uri,
    }
    for folder in options.sections:
        outputs.check_apart(output, {"sections": folder})
    with (
        outputs.open_file(output, "a report", digest, _made_by, inputs=inputs, overwrite=options.overwrite) as made,
        track(options.tracking, "report", output, to_plain(options)) as run,
    ):
        if not made:
            gallery = make_gallery(evaluation, table, scores, shards, options.gallery)
            page = render(evaluation, scores.manifest, shards.manifest, table, gallery, sections, digest)
            files.write_bytes(output, page.encode())
        run.artifacts({output.rsplit("/", 1)[-1]: files.read_bytes(output)})
    return output


def _made_by(page: bytes) -> str | None:
    """Return the digest of the plan that a report names in its head."""
    digest = re.search(rb'<meta name="unianom-plan" content="([0-9a-f]{64})">', page[:4096])
    return None if digest is None else digest[1].decode()


def _svg(draw: Callable[[Axes], None]) -> Markup:
    """Draw a figure as inline SVG."""
    figure, (axes,) = visual.new_figure()
    draw(axes)
    return Markup(visual.svg(figure))  # matplotlib escapes the text it writes


def render(
    evaluation: Mapping[str, Any],
    score_manifest: Mapping[str, Any],
    shard_manifest: Mapping[str, Any],
    table: pa.Table,
    gallery: Gallery,
    sections: Sequence[Section] = (),
    plan: str = "",
) -> str:
    """Return the report as HTML; its head names the digest of its plan."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = scopes(evaluation, table)
    rows = score_rows(evaluation, table)
    calibrated = evaluation.get("calibrated")
    return environment.get_template("report.html").render(
        title=page_title(evaluation),
        plan=plan,
        facts=evaluation_facts(evaluation, score_manifest, table),
        notices=notices(evaluation, shard_manifest, table),
        headline=_headline_tiles(evaluation),
        results=results_table(evaluation["metrics"]),
        calibrated=None if calibrated is None else results_table(calibrated["metrics"]),
        protocols=headline_rows(evaluation),
        intervals=evaluation.get("intervals"),
        datasets=dataset_rows(evaluation),
        score_rows=None if rows is None else Markup(visual.svg(rows)),  # matplotlib escapes the text it writes
        sections=sections,
        threshold=evaluation["threshold"],
        decisions=decision_rows(evaluation),
        defects=defect_rows(table),
        scopes=[{"title": scope.title, "panels": list(map(_svg, scope_panels(evaluation, scope)))} for scope in shown],
        gallery=_gallery_groups(gallery, [scope.name for scope in shown]),
        scale=gallery.scale,
        heat_gradient=", ".join("rgb({} {} {})".format(*colour) for colour in visual.heat_colours()[::15]),
        outline="rgb({} {} {})".format(*visual.OUTLINE),
        models=[model_details(model) for model in evaluation["models"]],
        data=data_facts(evaluation, shard_manifest),
        counts=sample_counts(shard_manifest["counts"]),
        rejected=evaluation["rejected"],
        n_rejected=count_unscored(evaluation["statuses"]),
        meanings=term_meanings(evaluation["metrics"]),
        tool_version=evaluation["tool_version"],
    )


def _headline_tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the few figures that are looked for first: name, value with unit, what it is of."""
    metrics, threshold = evaluation["metrics"], evaluation["threshold"]
    several = len(metrics["categories"]) > 1
    chosen = [("image AUROC", "image_auroc"), ("pixel AUROC", "pixel_auroc")]
    tiles = []
    for name, key in [*chosen, *(("AUPRO", key) for key in aupro_keys(metrics["mean"]))]:
        if metrics["mean"].get(key) is not None:
            union = f"mean of categories; union {percent(metrics['union'].get(key))} %"
            tiles.append((name, f"{percent(metrics['mean'][key])} %", union if several else ""))
    rates = threshold["union"] if threshold else None
    if rates is not None:
        promised = f"of {rates['n_normal']:,} normal images; {promise_words(threshold)}"
        tiles.append(("false positives", f"{percent(rates['false_positive_rate'])} %", promised))
        tiles.append(
            ("detected", f"{percent(rates['detection_rate'])} %", f"of {rates['n_anomalous']:,} anomalous images")
        )
    return tiles


def _gallery_groups(gallery: Gallery, scope_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the gallery as the page shows it: every card says in which scopes it appears, by their number."""
    number = {name: index for index, name in enumerate(scope_names)}

    def card(entry: Card) -> dict[str, Any]:
        of_category = [number[entry.sample["category"]]] if len(scope_names) > 1 else []
        return {"scopes": ([0] if entry.overall else []) + of_category, "entry": entry}

    groups = [
        ("Anomalous images with the lowest scores", "worst first", gallery.missed),
        ("Normal images with the highest scores", "worst first", gallery.alarms),
        ("Typical anomalous images", "of each defect type, next to its median score", gallery.typical),
    ]
    return [{"title": t, "note": n, "cards": list(map(card, cards))} for t, n, cards in groups if cards]

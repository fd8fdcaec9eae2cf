"""An evaluation → one HTML file to hand round, which needs nothing beside itself.

    evaluation.json ─▶ tables and curves ───────────────────────────┐
    scores, without maps ─▶ score histograms ───────────────────────┼─▶ report.html
                 └─▶ choice of samples ─▶ their images and maps ────┘

Only the images and maps that are shown are read, and those few maps that set the scale of all heat maps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes

from pipelines.reporting.curves import _panels, scopes, score_rows
from pipelines.reporting.gallery import Card, Gallery, make_gallery
from pipelines.reporting.options import ReportOptions
from pipelines.reporting.samples import labelled
from pipelines.reporting.sections import Section, read_section
from pipelines.reporting.tables import (
    COLUMNS,
    _counts,
    _decisions,
    _defects,
    _meanings,
    _results,
    above_target,
    aupro_keys,
    dataset_rows,
    headline_rows,
    largest_error,
    percent,
    with_examples,
)
from pipelines.runtime import outputs
from pipelines.runtime.tracking import track
from unianom import __version__, files, visual
from unianom.data.image import (
    InputPolicy,
)
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError
from unianom.options import flatten, from_plain, to_plain


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
    for name, found in (("scores", scores), ("shards", shards)):
        if found.digest != evaluation[name]["digest"]:
            raise DataError(f"{found.uri} was changed after {path} was written; run jobs/evaluate.py again")
    table = labelled(scores.table(columns=COLUMNS))
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
    """The digest of the plan that a report names in its head."""
    found = re.search(rb'<meta name="unianom-plan" content="([0-9a-f]{64})">', page[:4096])
    return None if found is None else found[1].decode()


def _svg(draw: Callable[[Axes], None]) -> Markup:
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
    """The report as HTML; its head names the digest of its plan."""
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
        title=_title(evaluation),
        plan=plan,
        facts=_facts(evaluation, score_manifest, table),
        notices=_notices(evaluation, shard_manifest, table),
        headline=_headline(evaluation),
        results=_results(evaluation["metrics"]),
        calibrated=None if calibrated is None else _results(calibrated["metrics"]),
        protocols=headline_rows(evaluation),
        intervals=evaluation.get("intervals"),
        datasets=dataset_rows(evaluation),
        score_rows=None if rows is None else Markup(visual.svg(rows)),  # matplotlib escapes the text it writes
        sections=sections,
        threshold=evaluation["threshold"],
        decisions=_decisions(evaluation),
        defects=_defects(table),
        scopes=[{"title": scope.title, "panels": list(map(_svg, _panels(evaluation, scope)))} for scope in shown],
        gallery=_groups(gallery, [scope.name for scope in shown]),
        scale=gallery.scale,
        heat_gradient=", ".join("rgb({} {} {})".format(*colour) for colour in visual.heat_colours()[::15]),
        outline="rgb({} {} {})".format(*visual.OUTLINE),
        models=[_model_details(model) for model in evaluation["models"]],
        data=_data(evaluation, shard_manifest),
        counts=_counts(shard_manifest["counts"]),
        rejected=evaluation["rejected"],
        n_rejected=_unscored(evaluation["statuses"]),
        meanings=_meanings(evaluation["metrics"]),
        tool_version=evaluation["tool_version"],
    )


def _title(evaluation: Mapping[str, Any]) -> str:
    methods = sorted({model["method"] for model in evaluation["models"]})
    datasets = sorted({row["dataset"] for row in evaluation["metrics"]["categories"]} - {""})
    return f"{', '.join(methods)} on {', '.join(datasets)}"


def _facts(evaluation: Mapping[str, Any], score_manifest: Mapping[str, Any], table: pa.Table) -> list[tuple[str, str]]:
    """Name and value of what a reader must know before the figures."""
    label = table["label"].to_numpy()
    categories = [row["category"] for row in evaluation["metrics"]["categories"]]
    splits = "split " + ", ".join(score_manifest["splits"]) if score_manifest["splits"] else "all splits"
    normal, anomalous = np.sum(label == NORMAL), np.sum(label == ANOMALOUS)
    facts = [
        ("images", f"{len(label):,} ({splits}): {normal:,} normal, {anomalous:,} anomalous"),
        ("categories", f"{len(categories)}: {_listed(categories)}"),
        ("data", f"{evaluation['shards']['uri']} (manifest {evaluation['shards']['digest'][:12]})"),
    ]
    models = [_model_facts(model) for model in evaluation["models"]]
    if len(models) > 1:
        facts.append(("models", f"{len(models)}, each for its own categories"))
    for name in dict.fromkeys(name for model in models for name in model):
        values = {model.get(name) for model in models}
        facts.append((name, models[0][name] if len(values) == 1 else "differs between the models; see Models"))
    return facts


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """What a model is, by name."""
    config, bank = model["config"], model["provenance"].get("bank")
    facts = {
        "method": model["method"] + (f", preset {config['preset']}" if "preset" in config else ""),
        "backbone": f"{config['backbone']['name']}, {config['backbone']['precision']}",
        "weights": config["backbone"]["weights"],
        "input": _input_words(from_plain(InputPolicy, config["input"])),
    }
    if bank is not None:
        ratio, index = config["bank"]["coreset_ratio"], config["bank"]["index"]
        facts["memory bank"] = (
            f"{bank['rows']:,} of {bank['patches']:,} patches of {bank['images']:,} images "
            f"(coreset ratio {ratio:g}), {index} index"
        )
    threshold = model["threshold"]
    facts["threshold"] = (
        "none"
        if threshold is None
        else (
            f"{threshold['value']:.4g}, from {threshold['n_normals']:,} held-out normal images: at most "
            f"{100 * threshold['target_fpr']:g} % false positives with {100 * threshold['confidence']:g} % confidence"
        )
    )
    return facts


def _input_words(policy: InputPolicy) -> str:
    if policy.resize == "stretch":
        words = f"stretched to {policy.size} × {policy.size}"
    else:
        words = f"shorter side {policy.size}, centre crop {policy.crop}"
    if policy.pad is not None:
        words += f", padded to {policy.pad}"
    return f"{words}, {policy.interpolation}; masks {policy.mask_resize}"


def _unscored(statuses: Mapping[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status != "ok")


def _notices(
    evaluation: Mapping[str, Any], shard_manifest: Mapping[str, Any], table: pa.Table
) -> list[tuple[str, str]]:
    """What limits the figures: "warning" or "note", and a sentence."""
    warnings, notes = [], []
    models, statuses, threshold = evaluation["models"], evaluation["statuses"], evaluation["threshold"]
    if any(model["config"]["backbone"]["weights"] == "random" for model in models):
        warnings.append(
            "The backbone's weights are random: these figures show that the chain works, not how good the method is."
        )
    unscored = _unscored(statuses)
    if unscored:
        reasons = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if status != "ok")
        warnings.append(
            f"{unscored:,} of {_number(sum(statuses.values()), 'sample')} without a score ({reasons}): counted in no "
            f"figure, listed under Rejected samples."
        )
    crossing, conflicting = (
        shard_manifest["summary"][f"duplicates_{kind}"]["groups"] for kind in ("across_splits", "with_other_label")
    )
    if crossing:
        warnings.append(
            f"Identical images lie in more than one split ({_number(crossing, 'group')} of them): some of what was "
            f"tested on may have been trained on."
        )
    if conflicting:
        warnings.append(
            f"Identical images have different labels ({_number(conflicting, 'group')} of them): some labels are wrong."
        )
    if threshold is None:
        notes.append("There is no threshold, so nothing is decided and no rate is given.")
    elif threshold["union"] is not None and above_target(threshold["union"], threshold):
        warnings.append(
            f"The threshold flags {percent(threshold['union']['false_positive_rate'])} % of the normal images; it was "
            f"set for at most {100 * threshold['target_fpr']:g} %, on normal images that these may differ from."
        )
    notes += [f"From fitting the model: {text}." for text in _model_notices(models)]
    notes += _undefined(evaluation["metrics"]["categories"], table)
    notes += [text[0].upper() + text[1:] + "." for text in evaluation.get("notes", [])]
    if evaluation.get("pixel_mode") == "binned":
        notes.append(
            f"Pixel metrics of the union are off by at most {largest_error(evaluation):.2g} percentage points."
        )
    return [*(("warning", text) for text in warnings), *(("note", text) for text in notes)]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _model_notices(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """What fitting had to say, each once."""
    texts = [model["provenance"].get("notice") for model in models]
    return [text.rstrip(".") for text in dict.fromkeys(texts) if text]


def _undefined(rows: Sequence[Mapping[str, Any]], table: pa.Table) -> list[str]:
    """Which pixel metrics are undefined, where, and why; the evaluation's notes say it of categories of one kind."""
    sentences = []
    if table["map_offset"].null_count == len(table):
        sentences.append(
            "There are no pixel metrics: the scores hold no anomaly maps; jobs/score.py --maps true keeps them."
        )
        return sentences
    without = [r["category"] for r in rows if r.get("pixel_auroc") is None and 0 < r["n_anomalous"] < r["n_images"]]
    if without:
        sentences.append(f"Pixel metrics are undefined for {_listed(without)}: no anomalous image has a mask.")
    return sentences


def _headline(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that are looked for first: name, value with unit, what it is of."""
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
        promised = f"of {rates['n_normal']:,} normal images; set for ≤ {100 * threshold['target_fpr']:g} %"
        tiles.append(("false positives", f"{percent(rates['false_positive_rate'])} %", promised))
        tiles.append(
            ("detected", f"{percent(rates['detection_rate'])} %", f"of {rates['n_anomalous']:,} anomalous images")
        )
    return tiles


def _groups(gallery: Gallery, scope_names: Sequence[str]) -> list[dict[str, Any]]:
    """The gallery as the page shows it: every card says in which scopes it appears, by their number."""
    number = {name: index for index, name in enumerate(scope_names)}

    def card(entry: Card) -> dict[str, Any]:
        own = [number[entry.sample["category"]]] if len(scope_names) > 1 else []
        return {"scopes": ([0] if entry.overall else []) + own, "entry": entry}

    groups = [
        ("Anomalous images with the lowest scores", "worst first", gallery.missed),
        ("Normal images with the highest scores", "worst first", gallery.alarms),
        ("Typical anomalous images", "of each defect type, next to its median score", gallery.typical),
    ]
    return [{"title": t, "note": n, "cards": list(map(card, cards))} for t, n, cards in groups if cards]


def _model_details(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's facts, and all of its config and provenance, one name and value a line."""
    plain = {key: model[key] for key in ("config", "threshold", "provenance")}
    return {
        "digest": model["digest"],
        "categories": ", ".join(model["categories"]),
        "facts": _model_facts(model),
        "details": [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in flatten(plain).items()],
    }


def _data(evaluation: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is known of the shard set and the scores."""
    summary = manifest["summary"]
    span = {key: " to ".join(str(v) for v in dict.fromkeys(summary[key])) for key in ("height", "width")}
    rejected = ", ".join(f"{count:,} {status}" for status, count in manifest["rejected"].items()) or "none"
    rows = [
        ("source", f"{manifest['source']} ({manifest['layout']} layout)"),
        ("shard set", f"{evaluation['shards']['uri']}"),
        ("manifest SHA-256", evaluation["shards"]["digest"]),
        ("size", f"{manifest['bytes'] / 1e6:,.1f} MB in {len(manifest['files']):,} parts"),
        ("image sizes", f"height {span['height']}, width {span['width']}; {summary['distinct_sizes']:,} distinct"),
        ("rejected by ingest", rejected),
        ("groups of identical images", f"{summary['duplicates']['groups']:,}"),
        ("… in more than one split", with_examples(summary["duplicates_across_splits"])),
        ("… with different labels", with_examples(summary["duplicates_with_other_label"])),
    ]
    for problem, found in summary["masks"].items():
        rows.append((f"masks {problem.replace('_', ' ')}", f"{found['count']:,}"))
    rows.append(("scores", f"{evaluation['scores']['uri']}"))
    rows.append(("scores SHA-256", evaluation["scores"]["digest"]))
    return rows

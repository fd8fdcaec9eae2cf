"""Notices on the page: what limits the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.headline import largest_error
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.metric_text import percent
from pipelines.reporting.outcomes import counted, joined
from pipelines.reporting.page_facts import listed
from pipelines.reporting.page_tables import above_target

RANDOM_WEIGHTS = (
    "The backbone's weights are random: these figures show that the chain works, not how good the method is."
)


def any_random(models: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a model's encoder has random weights."""
    return any(model["config"]["backbone"]["weights"] == "random" for model in models)


def shared_notices(inputs: Sequence[ReportInput], shard_manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the notices of all inputs, warnings first; one that does not hold for all names those it holds for."""
    holders: dict[tuple[str, str], list[str]] = {}
    for entry in inputs:
        if entry.evaluation is not None:
            for notice in notices(entry.evaluation, shard_manifest, entry.table):
                holders.setdefault(notice, []).append(entry.name)
    shown = [
        (kind, text if len(names) == len(inputs) else f"{joined(names)}: {text}")
        for (kind, text), names in holders.items()
    ]
    return sorted(shown, key=lambda notice: notice[0] != "warning")


def notices(evaluation: Mapping[str, Any], shard_manifest: Mapping[str, Any], table: pa.Table) -> list[tuple[str, str]]:
    """Return what limits the figures: "warning" or "note", and a sentence."""
    warnings, notes = [], []
    models, statuses, threshold = evaluation["models"], evaluation["statuses"], evaluation["threshold"]
    if any_random(models):
        warnings.append(RANDOM_WEIGHTS)
    unscored = count_unscored(statuses)
    if unscored:
        reasons = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if status != "ok")
        warnings.append(
            f"{unscored:,} of {counted(sum(statuses.values()), 'sample')} without a score ({reasons}): counted in no "
            f"figure, listed under Rejected samples."
        )
    crossing, conflicting = (
        shard_manifest["summary"][f"duplicates_{kind}"]["groups"] for kind in ("across_splits", "with_other_label")
    )
    if crossing:
        warnings.append(
            f"Identical images lie in more than one split ({counted(crossing, 'group')} of them): some of what was "
            f"tested on may have been trained on."
        )
    if conflicting:
        warnings.append(
            f"Identical images have different labels ({counted(conflicting, 'group')} of them): some labels are wrong."
        )
    if threshold is None:
        notes.append("There is no threshold, so nothing is decided and no rate is given.")
    elif threshold["union"] is not None and above_target(threshold["union"], threshold):
        warnings.append(
            f"The threshold flags {percent(threshold['union']['false_positive_rate'])} % of the normal images; it was "
            f"set for at most {100 * threshold['target_fpr']:.3g} %, on normal images that these may differ from."
        )
    notes += [f"From fitting the model: {text}." for text in _model_notices(models)]
    notes += _undefined(evaluation["metrics"]["categories"], table)
    notes += [text[0].upper() + text[1:] + "." for text in evaluation.get("notes", [])]
    if evaluation.get("pixel_mode") == "binned":
        notes.append(
            f"Pixel metrics of the union are off by at most {largest_error(evaluation):.2g} percentage points."
        )
    return [*(("warning", text) for text in warnings), *(("note", text) for text in notes)]


def _model_notices(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what fitting had to say, each once."""
    texts = [model["provenance"].get("notice") for model in models]
    return [text.rstrip(".") for text in dict.fromkeys(texts) if text]


def _undefined(rows: Sequence[Mapping[str, Any]], table: pa.Table) -> list[str]:
    """Say where pixel metrics are undefined, and why; the evaluation's notes say it of categories of one kind."""
    sentences = []
    if table["map_offset"].null_count == len(table):
        sentences.append(
            "There are no pixel metrics: the scores hold no anomaly maps; jobs/score.py --maps all keeps them."
        )
        return sentences
    scored = pc.equal(table["status"].cast(pa.string()), "ok")
    if pc.any(pc.and_(scored, pc.is_null(table["map_offset"]))).as_py():
        return sentences  # maps of flagged images only; a note of the evaluation says it
    without = [r["category"] for r in rows if r.get("pixel_auroc") is None and 0 < r["n_anomalous"] < r["n_images"]]
    if without:
        sentences.append(f"Pixel metrics are undefined for {listed(without)}: no anomalous image has a mask.")
    return sentences


def count_unscored(statuses: Mapping[str, int]) -> int:
    """Return how many samples have no score."""
    return sum(count for status, count in statuses.items() if status != "ok")

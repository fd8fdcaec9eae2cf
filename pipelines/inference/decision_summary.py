"""The summary of decisions: rates met on the images of the test split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import binom

from pipelines.inference.options import DecideOptions
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.thresholds import FAIL, PASS, REVIEW, DecisionRule

ALL = "all"
"""Name of the row of all categories together."""

DIFFERING = "–"
"""In place of the kind of thresholds where they differ between categories."""

RATES = ("false_positive_rate", "normal_review_rate", "detection_rate", "anomalous_review_rate", "review_rate")
"""Shares in a row of the summary; None where there is no such image."""


def summarise(
    counts: Mapping[tuple[Any, ...], int], held_out: Mapping[str, int], rule: DecisionRule, options: DecideOptions
) -> dict[str, Any]:
    """Summarise what the rule does to the images of the test split, by category and over all.

    Args:
        counts: test images by category, label and decision.
        held_out: by category, how many normal images the thresholds were fitted to.
        rule, options: how it was decided.
    """
    every = [bands for bands in (rule.common, *rule.categories.values()) if bands is not None]
    rows = []
    for name in sorted({category for category, _, _ in counts}):
        of_category = {key: count for key, count in counts.items() if key[0] == name}
        rows.append(_summary_row(name, of_category, held_out.get(name, 0), rule, own_bands=name in rule.categories))
    if len(rows) > 1:
        rows.append(_summary_row(ALL, counts, sum(held_out.values()), rule, own_bands=False))
    return {
        "scores_kind": rule.kind,
        "target_fpr": max(bands.fail.target_fpr for bands in every),
        "review_fpr": max(bands.review.target_fpr for bands in every),
        "confidence": options.confidence,
        "promised": all(bands.fail.promised for bands in every),
        "source": every[0].fail.source,
        "categories": rows,
        "notes": [note for row in rows if row["category"] != ALL for note in _notes(row, rule)],
    }


def _summary_row(
    name: str, counts: Mapping[tuple[Any, ...], int], held_out: int, rule: DecisionRule, own_bands: bool
) -> dict[str, Any]:
    """Return counts of images, and shares of those with a score."""

    def number(label: int | None = None, decision: str | None = None) -> int:
        return sum(
            count
            for (_, its_label, its_decision), count in counts.items()
            if its_decision is not None and label in (None, its_label) and decision in (None, its_decision)
        )

    def share(decision: str, label: int | None = None) -> float | None:
        return number(label, decision) / number(label) if number(label) else None

    bands = rule.categories[name] if own_bands else rule.common
    differing = bands is None or (name == ALL and bool(rule.categories))
    return {
        "category": name,
        "thresholds": DIFFERING if differing else "own" if own_bands else "common",
        "unseen_normals": held_out,
        "review_above": None if differing or bands is None else bands.review.value,
        "fail_above": None if differing or bands is None else bands.fail.value,
        "images": sum(counts.values()),
        "not_scored": sum(counts.values()) - number(),
        "normal": number(NORMAL),
        "anomalous": number(ANOMALOUS),
        **{decision: number(decision=decision) for decision in (PASS, REVIEW, FAIL)},
        "normal_failed": number(NORMAL, FAIL),
        "false_positive_rate": share(FAIL, NORMAL),
        "normal_review_rate": share(REVIEW, NORMAL),
        "detection_rate": share(FAIL, ANOMALOUS),
        "anomalous_review_rate": share(REVIEW, ANOMALOUS),
        "review_rate": share(REVIEW),
    }


def _notes(row: Mapping[str, Any], rule: DecisionRule) -> list[str]:
    """Return a sentence if nothing is promised of a category, or if more of its normal test images fail than chance
    explains at the rate that is promised."""
    fail = rule.bands(row["category"]).fail
    if not fail.promised:
        return [f"{row['category']}: {fail.promise()}"]
    target = fail.target_fpr
    failed, count = row["normal_failed"], row["normal"]
    chance = float(binom.sf(failed - 1, count, target))
    if not count or chance > 0.05:
        return []
    whose = "" if row["thresholds"] == "own" else " by thresholds that are not its own"
    return [
        f"{row['category']}: {failed} of {count} normal test images fail{whose}; at a true rate of {100 * target:g} % "
        f"so many or more would with probability {chance:.2g}, so these images differ from the normals the threshold "
        f"was fitted to"
    ]

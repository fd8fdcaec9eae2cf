"""The scales of heat maps: one for all pictures that share a model and a threshold, never one a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.samples import read_samples, text_column
from unianom import visual
from unianom.data.image import decode_map
from unianom.data.schema import ANOMALOUS
from unianom.data.splits import hash_order
from unianom.thresholds import threshold_of

SCALE_MAPS = 64
"""Number of maps of normal images, and as many of others, that set a scale."""

LIKE_SCORES = 0.1
"""Image scores and the maxima of their maps are taken to be the same values where they differ by no more than this
share of the scale in the median."""

ORDERED_LIKE_SCORES = 0.95
"""Where they are not the same, such as a distance and its square, the threshold's place on the maps is estimated if
their ranks are correlated at least so much."""

NEIGHBOURS = 3
"""Images on each side of the threshold that its place is estimated from."""

THRESHOLD_AT_LEAST = 0.5
"""Share of the scale below the threshold, where its place is known: few glaring defects do not make all others dark."""

ScaleKey = tuple[str, float | None]
"""A model's digest and its threshold for a category."""


@dataclass(frozen=True)
class MarkedScale:
    """A scale, and where the decision threshold lies on it.

    Attributes:
        heat: its range of anomaly values.
        threshold: the anomaly value at the threshold; None where there is no threshold, or none that maps can show.
        exact: whether that is the threshold itself, or estimated from images on both sides of it.
    """

    heat: visual.HeatScale
    threshold: float | None
    exact: bool = True

    @property
    def position(self) -> float | None:
        """Share of the scale below the threshold; None where it is not on it."""
        if self.threshold is None or not self.heat.low <= self.threshold <= self.heat.high:
            return None
        return (self.threshold - self.heat.low) / (self.heat.high - self.heat.low)


def scale_key(entry: ReportInput, digest: str, category: str) -> ScaleKey:
    """Return the key of the scale of a category's pictures."""
    model = next(model for model in entry.models if model["digest"] == digest)
    threshold = threshold_of(model, category)
    return digest, None if threshold is None else threshold["value"]


def heat_scales(entry: ReportInput) -> dict[ScaleKey, MarkedScale]:
    """Return the scales of all pictures of an input; none where it has no maps."""
    table = entry.table.filter(pc.is_valid(entry.table["map_offset"]))
    groups: dict[ScaleKey, list[int]] = {}
    for row, (digest, category) in enumerate(zip(text_column(table, "model"), text_column(table, "category"))):
        groups.setdefault(scale_key(entry, digest, category), []).append(row)
    wanted = {key: _drawn_by_name(table.take(rows)) for key, rows in groups.items()}
    ids = {sample_id for group in wanted.values() for sample_id in group}
    columns = ("anomaly_map", "map_offset", "map_scale")
    maps = {
        row["sample_id"]: decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
        for row in read_samples(entry.scores, ids, columns)
    }
    return {key: _scale(group, maps, key[1]) for key, group in wanted.items()}


def _drawn_by_name(table: pa.Table) -> dict[str, tuple[bool, float]]:
    """Return samples drawn by the hash of their names: whether each counts as anomalous, and its score."""
    rows = {row["sample_id"]: row for row in table.select(["sample_id", "label", "score"]).to_pylist()}
    chosen: dict[str, tuple[bool, float]] = {}
    for anomalous in (False, True):
        ids = [sample_id for sample_id, row in rows.items() if (row["label"] == ANOMALOUS) == anomalous]
        chosen |= {i: (anomalous, rows[i]["score"]) for i in hash_order(ids, seed=0)[:SCALE_MAPS]}
    return chosen


def _scale(
    samples: Mapping[str, tuple[bool, float]], maps: Mapping[str, np.ndarray], threshold: float | None
) -> MarkedScale:
    """Return the scale of some samples.

    The threshold, where its place is known, lies in the upper half: what stays below it never has the last colour, and
    what is above it is bright.
    """
    pixels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for sample_id, (anomalous, _) in samples.items():
        pixels[anomalous].append(maps[sample_id][::4, ::4].ravel())
    heat = visual.heat_scale(*(np.concatenate([*group, []]) for group in pixels))
    if threshold is None:
        return MarkedScale(heat, None)
    score = np.array([score for _, score in samples.values()])
    highest = np.array([maps[sample_id].max() for sample_id in samples])
    exact = bool(np.median(np.abs(highest - score)) <= LIKE_SCORES * (heat.high - heat.low))
    value = threshold if exact else _value_at(threshold, score, highest)
    if value is None:
        return MarkedScale(heat, None)
    high = max(value, min(heat.high, heat.low + (value - heat.low) / THRESHOLD_AT_LEAST))
    return MarkedScale(visual.HeatScale(heat.low, high if high > heat.low else heat.high), value, exact)


def _value_at(threshold: float, score: np.ndarray, highest: np.ndarray) -> float | None:
    """Estimate the anomaly value at which images reach a threshold; None where maps do not tell.

    Args:
        threshold: on the scale of the scores.
        score: (n,) of images.
        highest: (n,) maxima of their maps.
    """
    order = np.argsort(score, kind="stable")
    below, above = order[score[order] <= threshold], order[score[order] > threshold]
    if len(below) == 0 or len(above) == 0:
        return None
    ranks = np.stack([np.argsort(np.argsort(of, kind="stable"), kind="stable") for of in (score, highest)])
    if np.asarray(np.corrcoef(ranks))[0, 1] < ORDERED_LIKE_SCORES:
        return None
    return float(np.median(highest[below[-NEIGHBOURS:]]) + np.median(highest[above[:NEIGHBOURS]])) / 2

"""The pictures of a report: each chosen image once, and over it the heat map of each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.reporting.gallery import Judged
from pipelines.reporting.heat_scales import MarkedScale, ScaleKey, heat_scales, scale_key
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.outcomes import verdict
from pipelines.reporting.sample_view import SampleView, place_map, sample_view
from pipelines.reporting.samples import STORED, data_uri, read_samples
from unianom import visual
from unianom.data.image import InputPolicy, decode_map
from unianom.data.shards import ShardSet
from unianom.options import from_plain

UNSEEN_SHARE = 0.35
"""Brightness of what a model did not see of an image, as a share of its own."""

OUTLINE_WIDTH = 2
"""Pixels of the outline of a mask, in a picture that is wide enough for it."""


@dataclass(frozen=True)
class Reading:
    """What one model made of a sample.

    Attributes:
        model: its name in the report.
        verdict: see `outcomes.verdict`.
        score, margin: of the image; the margin has one decimal, and no minus before a zero.
        overlay: data URI of the picture with the heat map; None where the scores hold no map.
    """

    model: str
    verdict: str
    score: float
    margin: float
    overlay: str | None


@dataclass(frozen=True)
class Card:
    """A sample as the page shows it.

    Attributes:
        sample_id, category, defect, label: of the sample; the label is -1 where it is not known.
        image: data URI of the plain picture.
        ratio: its width by its height.
        has_mask: whether the outline of a mask is drawn on the overlays.
        hidden: whether a model did not see all of it.
        readings: one of each model.
    """

    sample_id: str
    category: str
    defect: str | None
    label: int
    image: str
    ratio: float
    has_mask: bool
    hidden: bool
    readings: list[Reading]


@dataclass(frozen=True)
class Pictures:
    """Cards by row of `Judged`, and the scales of each input in their order."""

    cards: Mapping[int, Card]
    scales: Sequence[Mapping[ScaleKey, MarkedScale]]

    @property
    def have_maps(self) -> bool:
        """Return whether any heat map is shown."""
        return any(reading.overlay for card in self.cards.values() for reading in card.readings)


def draw_pictures(inputs: Sequence[ReportInput], shards: ShardSet, samples: Judged, rows: Iterable[int]) -> Pictures:
    """Read the images, masks and maps of some samples, and draw them.

    Args:
        inputs: of the report.
        shards: of the images.
        samples: all that could be shown.
        rows: those that are.
    """
    chosen = {str(samples.sample_id[row]): row for row in rows}
    if not chosen:
        return Pictures({}, [{} for _ in inputs])
    scales = [heat_scales(entry) for entry in inputs]
    columns = ("anomaly_map", "map_offset", "map_scale")
    # encoded maps are small; each is decoded where it is drawn
    maps = [{row["sample_id"]: row for row in read_samples(e.scores, set(chosen), columns)} for e in inputs]
    policies = [{m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in e.models} for e in inputs]
    cards = {}
    for stored in read_samples(shards, set(chosen), STORED):
        row = chosen[stored["sample_id"]]
        view = sample_view(stored)
        label, category = int(samples.label[row]), str(samples.category[row])
        readings, hidden = [], False
        for number, entry in enumerate(inputs):
            scored = entry.table.slice(int(samples.rows[row, number]), 1).to_pylist()[0]
            overlay = None
            if (map_row := maps[number].get(stored["sample_id"])) and map_row["anomaly_map"] is not None:
                scale = scales[number][scale_key(entry, scored["model"], category)]
                overlay, whole = _overlay(view, map_row, policies[number][scored["model"]], scale.heat)
                hidden |= not whole
            margin = round(float(samples.margin[row, number]), 1) + 0.0
            readings.append(Reading(entry.name, verdict(label, scored["decision"]), scored["score"], margin, overlay))
        cards[row] = Card(
            sample_id=stored["sample_id"],
            category=category,
            defect=samples.defect[row],
            label=label,
            image=_picture(_outlined(view, view.image) if all(r.overlay is None for r in readings) else view.image),
            ratio=view.width / view.height,
            has_mask=view.mask is not None and bool(view.mask.any()),
            hidden=hidden,
            readings=readings,
        )
    return Pictures(cards, scales)


def _overlay(
    view: SampleView, map_row: Mapping[str, Any], policy: InputPolicy, scale: visual.HeatScale
) -> tuple[str, bool]:
    """Return an image with its heat map as a data URI, and whether the model saw all of it."""
    anomaly_map = decode_map(map_row["anomaly_map"], map_row["map_offset"], map_row["map_scale"])
    placed, seen = place_map(anomaly_map, view, policy)
    drawn = visual.overlay(view.image, placed, scale)
    drawn[~seen] = np.rint(view.image[~seen] * UNSEEN_SHARE).astype(np.uint8)
    return _picture(_outlined(view, drawn)), bool(seen.all())


def _outlined(view: SampleView, pixels: np.ndarray) -> np.ndarray:
    """Draw the outline of the mask, if there is one."""
    if view.mask is None or not view.mask.any():
        return pixels
    return visual.draw_outline(pixels, view.mask, OUTLINE_WIDTH if min(pixels.shape[:2]) > 128 else 1)


def _picture(pixels: np.ndarray) -> str:
    return data_uri("webp", visual.webp(pixels))

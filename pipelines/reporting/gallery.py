"""Gallery of a report: the choice of its images, and their heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.samples import STORED, as_model_input, data_uri, read_samples, shown_size, text_column
from unianom import visual
from unianom.data.image import InputPolicy, decode_map
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet, ShardSet
from unianom.data.splits import hash_order
from unianom.options import from_plain
from unianom.thresholds import threshold_of

SCALE_MAPS = 64
"""Number of maps of normal images, and as many of anomalous ones, that set the scale of the heat maps."""


@dataclass(frozen=True)
class GallerySample:
    """A sample chosen for the gallery.

    Attributes:
        row: in the table of scores.
        overall: whether it is also shown with all categories together.
    """

    row: int
    overall: bool


@dataclass(frozen=True)
class GallerySamples:
    """The samples of a gallery, in the order they are shown.

    Attributes:
        missed: anomalous, the lowest margins first.
        alarms: normal, the highest margins first.
        typical: anomalous and not among `missed`, those next to the median of their defect type.
    """

    missed: list[GallerySample]
    alarms: list[GallerySample]
    typical: list[GallerySample]


@dataclass(frozen=True)
class Card:
    """A sample of the gallery.

    Attributes:
        sample: its row of the table of scores.
        overall: whether it is also shown with all categories together.
        margin: see `margins`; one decimal, and no minus before a zero.
        verdict: what became of it: "missed", "found", "false alarm", "passed", "review", or "" without a decision.
        pictures: caption and data URI of each picture.
        has_mask: whether the outline of its mask is drawn.
    """

    sample: Mapping[str, Any]
    overall: bool
    margin: float
    verdict: str
    pictures: list[tuple[str, str]]
    has_mask: bool


@dataclass(frozen=True)
class Gallery:
    """Cards of `GallerySamples`, and the scale of their heat maps; no scale if the scores hold no maps."""

    missed: list[Card]
    alarms: list[Card]
    typical: list[Card]
    scale: visual.HeatScale | None


def margins(table: pa.Table, models: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Return how far each score lies above its model's threshold for its category: (n,), in standard deviations of
    normal scores.

    The unit is the spread of the scores that the model gave to normal images (to all, if there are none), so that
    models whose raw scores differ can be compared. A model without a threshold is measured from the median of those
    scores instead.
    """
    known = {model["digest"]: model for model in models}
    model, label, score = text_column(table, "model"), table["label"].to_numpy(), table["score"].to_numpy()
    category = text_column(table, "category")
    margin = np.zeros(len(score))
    for digest in sorted(set(model)):
        scored = model == digest
        usual = score[scored & (label == NORMAL)] if np.any(scored & (label == NORMAL)) else score[scored]
        for name in sorted(set(category[scored])):
            own, threshold = scored & (category == name), threshold_of(known[digest], name)
            start = np.median(usual) if threshold is None else threshold["value"]
            margin[own] = (score[own] - start) / (usual.std() or 1.0)
    return margin


def choose(table: pa.Table, margin: np.ndarray, count: int) -> GallerySamples:
    """Choose the samples of a gallery.

    Args:
        table: scores, as `labelled` gives them.
        margin: (n,) of each, see `margins`.
        count: worst misses and worst false alarms overall; half as many (rounded up) of each category, and a quarter
            as many, at least one, of each defect type.
    """
    if count == 0:
        return GallerySamples([], [], [])
    label, category, defect = table["label"].to_numpy(), text_column(table, "category"), text_column(table, "defect")
    rising = np.argsort(margin, kind="stable")
    falling = np.argsort(-margin, kind="stable")
    missed = _first(rising[label[rising] == ANOMALOUS], category, count)
    alarms = _first(falling[label[falling] == NORMAL], category, count)
    shown = {choice.row for choice in missed}
    failed = text_column(table, "decision") != "pass"
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in rising:
        if label[row] == ANOMALOUS and failed[row] and row not in shown:
            kinds.setdefault((category[row], defect[row] or ""), []).append(int(row))
    typical = []
    for _, rows in sorted(kinds.items()):
        middle = np.median(margin[rows])
        rows.sort(key=lambda row: abs(margin[row] - middle))
        typical += [GallerySample(row, number == 0) for number, row in enumerate(rows[: max(1, count // 4)])]
    return GallerySamples(missed, alarms, typical)


def _first(order: np.ndarray, category: np.ndarray, count: int) -> list[GallerySample]:
    """Return the first `count` of an order of rows, and the first of each category in it."""
    overall = set(order[:count].tolist())
    chosen = set(overall)
    for name in set(category[order]):
        chosen.update(order[category[order] == name][: (count + 1) // 2].tolist())
    return [GallerySample(row, row in overall) for row in order.tolist() if row in chosen]


def make_gallery(
    evaluation: Mapping[str, Any], table: pa.Table, scores: ScoreSet, shards: ShardSet, count: int
) -> Gallery:
    """Choose samples, read their images, masks and maps, and draw them."""
    margin = margins(table, evaluation["models"])
    choices = choose(table, margin, count)
    chosen = [*choices.missed, *choices.alarms, *choices.typical]
    samples = {choice.row: table.slice(choice.row, 1).to_pylist()[0] for choice in chosen}
    wanted = [sample["sample_id"] for sample in samples.values()]
    scaling = _scaling_samples(table) if chosen else {}
    maps = {
        row["sample_id"]: decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
        for row in read_samples(scores, {*wanted, *scaling}, ("anomaly_map", "map_offset", "map_scale"))
        if row["anomaly_map"] is not None
    }
    scale = None
    if scaling:
        pixels = {
            label: [maps[i][::4, ::4].ravel() for i, of_map in scaling.items() if of_map == label]
            for label in (NORMAL, ANOMALOUS)
        }
        scale = visual.heat_scale(*(np.concatenate([*pixels[label], []]) for label in (NORMAL, ANOMALOUS)))
    policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in evaluation["models"]}
    of_id = {sample["sample_id"]: sample for sample in samples.values()}
    drawn = {}
    for stored in read_samples(shards, set(wanted), STORED):
        sample_id = stored["sample_id"]
        drawn[sample_id] = _draw(stored, maps.get(sample_id), scale, policies[of_id[sample_id]["model"]])

    def cards(group: Iterable[GallerySample]) -> list[Card]:
        shown = []
        for choice in group:
            sample = samples[choice.row]
            pictures, has_mask = drawn[sample["sample_id"]]
            shown.append(
                Card(
                    sample,
                    choice.overall,
                    round(float(margin[choice.row]), 1) + 0.0,
                    verdict(sample),
                    pictures,
                    has_mask,
                )
            )
        return shown

    return Gallery(cards(choices.missed), cards(choices.alarms), cards(choices.typical), scale)


def _scaling_samples(table: pa.Table) -> dict[str, int]:
    """Return sample_id and label of the samples whose maps set the scale, drawn by the hash of their names."""
    with_map = table.filter(pc.is_valid(table["map_offset"]))
    chosen: dict[str, int] = {}
    for label in (NORMAL, ANOMALOUS):
        ids = with_map.filter(pc.equal(with_map["label"], label))["sample_id"].to_pylist()
        chosen |= dict.fromkeys(hash_order(ids, seed=0)[:SCALE_MAPS], label)
    return chosen


def verdict(sample: Mapping[str, Any]) -> str:
    """Return what became of a sample, in one word."""
    if sample["decision"] in (None, "review"):
        return sample["decision"] or ""
    failed = sample["decision"] == "fail"
    if sample["label"] == ANOMALOUS:
        return "found" if failed else "missed"
    return "false alarm" if failed else "passed"


def _draw(
    stored: Mapping[str, Any], anomaly_map: np.ndarray | None, scale: visual.HeatScale | None, policy: InputPolicy
) -> tuple[list[tuple[str, str]], bool]:
    """Return pictures of a sample as the model saw it, and whether its mask is among them."""
    seen, marked = as_model_input(stored, policy)
    image = shown_size(seen)
    mask = np.zeros(image.shape[:2], bool)
    if marked is not None:
        mask = shown_size(marked.astype(np.float32)) > 0
    pictures = [("image", data_uri("jpeg", visual.jpeg(image)))]
    if anomaly_map is not None and scale is not None:
        shown = shown_size(anomaly_map)
        over = visual.draw_outline(visual.overlay(image, shown, scale), mask)
        pictures.append(("anomaly map", data_uri("png", visual.heat_png(shown, scale))))
        pictures.append(("overlay", data_uri("jpeg", visual.jpeg(over))))
    elif mask.any():
        pictures.append(("mask", data_uri("jpeg", visual.jpeg(visual.draw_outline(image, mask)))))
    return pictures, bool(mask.any())

"""Contact sheets of a review queue: image and heat map of each sample side by side, with its score.

Only the images shown are read, and a few maps more of images that passed, which set the dark end of the heat scale.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.reporting.contact_sheet import font, sheet_png
from pipelines.reporting.samples import STORED, as_model_input, read_maps, read_samples
from unianom import visual
from unianom.data.image import InputPolicy
from unianom.data.shards import ScoreSet, ShardSet
from unianom.options import from_plain
from unianom.thresholds import ScoreKind

SIDE, GAP, LINE, TEXT, COLUMNS = 160, 12, 15, 11, 4
"""Pixels of a picture's side, between cards, of a line of text and of its letters, and cards in a row."""


def draw_queue(
    queues: Mapping[str, Sequence[Mapping[str, Any]]],
    ordinary: Iterable[str],
    scores: ScoreSet,
    shards: ShardSet,
    kind: ScoreKind,
) -> dict[str, bytes]:
    """Draw each list of a review queue as one picture.

    Args:
        queues: rows with sample_id, category, score, margin, decision and model, in order, by name of the list.
        ordinary: sample_ids of images that passed, whose maps set what counts as ordinary.
        scores, shards: where maps and images are.
        kind: whether maps are shown calibrated.

    Returns:
        PNG bytes by name of the list. Heat maps of a list share one scale; where the scores hold no maps, the image
        stands alone. The outline of a mask is drawn where there is one.
    """
    rows = {row["sample_id"]: row for queue in queues.values() for row in queue}
    maps = read_maps(scores, {*rows, *ordinary}, kind)
    policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in scores.manifest["models"]}
    stored = {row["sample_id"]: row for row in read_samples(shards, set(rows), STORED)}
    sheets = {}
    for name, queue in queues.items():
        scale = _scale(maps, [maps[row["sample_id"]] for row in queue if row["sample_id"] in maps], rows)
        pictures = {
            row["sample_id"]: _draw(stored[row["sample_id"]], maps.get(row["sample_id"]), scale, policies[row["model"]])
            for row in queue
        }
        sheets[name] = _sheet(queue, pictures)
    return sheets


def _scale(
    maps: Mapping[str, np.ndarray], shown: Sequence[np.ndarray], queued: Container[str]
) -> visual.HeatScale | None:
    """Return the scale of one sheet, from its maps and from those that are in no list; None without maps."""
    if not shown:
        return None
    background = [m[::4, ::4].ravel() for name, m in maps.items() if name not in queued]
    return visual.heat_scale(np.concatenate([*background, []]), np.concatenate([m[::4, ::4].ravel() for m in shown]))


def _draw(
    stored: Mapping[str, Any], anomaly_map: np.ndarray | None, scale: visual.HeatScale | None, policy: InputPolicy
) -> list[Image.Image]:
    """Return the image as the model saw it, and with its heat map and the outline of its mask laid over it."""
    seen, marked = as_model_input(stored, policy)
    pixels = _sized(seen)
    over = pixels
    if anomaly_map is not None and scale is not None:
        over = visual.overlay(pixels, _sized(anomaly_map.astype(np.float32)), scale)
    if marked is not None:
        over = visual.draw_outline(over, _sized(marked.astype(np.float32)) > 0.5)
    return [Image.fromarray(pixels), Image.fromarray(over)]


def _sized(pixels: np.ndarray) -> np.ndarray:
    """Return pixels, S×S×3 uint8 or S×S float32, at SIDE."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _sheet(queue: Sequence[Mapping[str, Any]], pictures: Mapping[str, list[Image.Image]]) -> bytes:
    """Draw a sheet of cards: the two pictures of each sample, its decision, score and name."""
    columns = min(COLUMNS, len(queue))
    width, height = 2 * SIDE + GAP, SIDE + 2 * LINE + GAP
    rows = -(-len(queue) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(queue):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        for place, picture in enumerate(pictures[row["sample_id"]]):
            sheet.paste(picture, (left + place * SIDE, top))
        ink = {"fail": visual.ANOMALOUS_COLOUR, "review": "#8a6d00", "pass": visual.NORMAL_COLOUR}[row["decision"]]
        head = f"{number + 1}  {row['decision']}  {row['score']:.4g}  ({row['margin']:+.2f} σ)"
        pen.text((left, top + SIDE + 1), head, fill=ink, font=font(TEXT, bold=True))
        name = row["sample_id"].split("/", 1)[-1]
        pen.text((left, top + SIDE + LINE), _fitting(visual.drawable(name), 2 * SIDE), fill="#3a4150", font=font(TEXT))
    return sheet_png(sheet)


def _fitting(text: str, width: int) -> str:
    """Return a text, shortened from the left until it is not wider than so many pixels."""
    if font(TEXT).getlength(text) <= width:
        return text
    while text and font(TEXT).getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"

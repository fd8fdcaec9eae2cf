"""Contact sheets of clusters: the images nearest to each centre, and their heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.reporting.contact_sheet import font, sheet_png
from pipelines.reporting.heat_scales import SCALE_MAPS
from pipelines.reporting.samples import STORED, as_model_input, read_samples
from unianom import visual
from unianom.data.image import InputPolicy
from unianom.data.shards import ShardSet
from unianom.data.splits import hash_order

GOOD = "good"
"""Type of normal images."""

CELL, CAPTION, TITLE, GAP = 128, 14, 24, 4
"""Pixels of a contact sheet: side of a picture, height of its caption and of a cluster's title, space between."""


def cluster_sheet(
    shards: ShardSet,
    rows: Sequence[Mapping[str, Any]],
    clusters: Sequence[Mapping[str, Any]],
    anomaly_maps: Callable[[Sequence[int]], np.ndarray],
    policy: InputPolicy,
    shown: int,
) -> bytes:
    """Draw the clusters of a category as one picture.

    For each there are a title and the images nearest to its centre, as the model saw them (with the outline of the
    mask, where there is one), above their heat maps.

    Args:
        shards: where the images are.
        rows: the images of the category, with sample_id, type, cluster and distance from its centre.
        clusters: the clusters, in order, with cluster, images, majority, share and matched.
        anomaly_maps: returns the maps, n×S×S, of images by their row.
        policy: of the model.
        shown: images of each cluster.

    Returns:
        PNG bytes.
    """
    scale = _scale(rows, anomaly_maps)
    nearest = []
    for entry in clusters:
        members = [n for n, row in enumerate(rows) if row["cluster"] == entry["cluster"]]
        nearest.append(sorted(members, key=lambda n: (rows[n]["distance"], rows[n]["sample_id"]))[:shown])
    drawn = [n for group in nearest for n in group]
    maps = dict(zip(drawn, anomaly_maps(drawn), strict=True))
    wanted = {rows[n]["sample_id"] for n in drawn}
    stored = {row["sample_id"]: row for row in read_samples(shards, wanted, STORED)}
    block = TITLE + 2 * (CELL + GAP) + CAPTION
    sheet = Image.new("RGB", (shown * (CELL + GAP) + GAP, len(nearest) * block + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (entry, group) in enumerate(zip(clusters, nearest, strict=True)):
        y = number * block
        draw.text((GAP, y + 5), visual.drawable(_title(entry)), fill="#3a4150", font=font(12))
        for column, n in enumerate(group):
            x = GAP + column * (CELL + GAP)
            image, over = _pictures(stored[rows[n]["sample_id"]], maps[n], scale, policy)
            sheet.paste(image, (x, y + TITLE))
            sheet.paste(over, (x, y + TITLE + CELL + GAP))
            caption = rows[n]["type"] or "unknown"
            draw.text((x, y + TITLE + 2 * CELL + GAP + 1), visual.drawable(caption), fill="#6b7280", font=font(9))
    return sheet_png(sheet)


def _title(entry: Mapping[str, Any]) -> str:
    words = f"cluster {entry['cluster'] + 1}: {entry['images']} images"
    if entry["majority"] is not None:
        words += f", {100 * entry['share']:.0f} % {entry['majority']}"
    return words + (f"; stands for {entry['matched']}" if entry["matched"] is not None else "")


def _scale(rows: Sequence[Mapping[str, Any]], anomaly_maps: Callable[[Sequence[int]], np.ndarray]) -> visual.HeatScale:
    """Return one scale for a sheet, from some maps of normal images and as many of anomalous ones."""
    number = {row["sample_id"]: n for n, row in enumerate(rows)}
    values = []
    for normal in (True, False):
        ids = [row["sample_id"] for row in rows if (row["type"] == GOOD) == normal]
        chosen = [number[sample_id] for sample_id in hash_order(ids, seed=0)[:SCALE_MAPS]]
        values.append(anomaly_maps(chosen)[:, ::4, ::4].ravel())
    return visual.heat_scale(*values)


def _pictures(
    stored: Mapping[str, Any], anomaly_map: np.ndarray, scale: visual.HeatScale, policy: InputPolicy
) -> tuple[Image.Image, Image.Image]:
    """Return the image with the outline of its mask, and its overlay, each CELL pixels a side."""
    image, mask = as_model_input(stored, policy)
    over = visual.overlay(image, anomaly_map, scale)
    if mask is not None:
        image = visual.draw_outline(image, mask, max(1, policy.side // CELL))
    small = [Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BILINEAR) for pixels in (image, over)]
    return small[0], small[1]

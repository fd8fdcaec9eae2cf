"""Anomaly maps of single images, as pictures.

A map alone says where an image is anomalous, not how much: stretched to its own range, noise on a normal image is as
bright as a defect. What is known of how much is the image score against its threshold. So the brightest pixel of a map
is as bright as its image's score is high: half way at the threshold, full at `SPREADS` standard deviations of normal
scores above it, and dark as far below.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

from unianom.data.image import encode_map, encode_png
from unianom.visual import HeatScale, overlay

MapKind = Literal["none", "overlay", "heat", "raw"]
"""Which picture of an anomaly map is wanted: none; the heat map over the network's input; the heat map alone; or the
values themselves as a 16-bit grey PNG, of which a pixel v stands for offset + scale · v."""

SPREADS = 4.0
"""Standard deviations of normal scores between the threshold and full brightness."""

FAINTEST = 0.05
"""Brightness of the brightest pixel of a map, at least."""


def brightness(score: float, fail_above: float, spread: float) -> float:
    """Return how bright the brightest pixel of a map is, 0 to 1.

    Args:
        score: of the image; the one that is judged.
        fail_above: its threshold.
        spread: standard deviation of normal scores, above zero.
    """
    return float(np.clip(0.5 + (score - fail_above) / (2 * SPREADS * spread), FAINTEST, 1.0))


def draw_map(kind: MapKind, pixels: np.ndarray, anomaly_map: np.ndarray, bright: float | None) -> bytes:
    """Return a picture of a map as PNG.

    Args:
        kind: "overlay" or "heat".
        pixels: the network's input, S×S×3 uint8.
        anomaly_map: S×S float32.
        bright: as `brightness` gives it; None draws the map on its own range.
    """
    low, high = float(np.median(anomaly_map)), float(anomaly_map.max())
    top = low + (high - low) / (1.0 if bright is None else bright)
    scale = HeatScale(low, top if top > low else low + 1)
    return encode_png(overlay(pixels, anomaly_map, scale) if kind == "overlay" else scale.colours(anomaly_map))


def map_fields(kind: MapKind, pixels: np.ndarray, anomaly_map: np.ndarray, bright: float | None) -> dict[str, Any]:
    """Return what an answer says of a map: its kind, the PNG in base64, and with "raw" its offset and scale."""
    if kind == "raw":
        png, offset, step = encode_map(anomaly_map)
        values: dict[str, Any] = {"offset": offset, "scale": step}
    else:
        png, values = draw_map(kind, pixels, anomaly_map, bright), {}
    return {"kind": kind, "png": base64.b64encode(png).decode(), **values}

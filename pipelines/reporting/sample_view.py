"""Where on an image a model looked: its whole picture, small enough for a page, with mask and anomaly map in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from unianom.data.image import ImageLimits, InputPolicy, decode_image, decode_mask, reduce_mask

SHOWN_SIDE = 320
"""Pixels of the longer side of a picture; smaller images stay as they are."""


@dataclass(frozen=True, eq=False)
class SampleView:
    """An image as a report shows it.

    Attributes:
        image: H×W×3 uint8, upright and whole, in its own aspect.
        mask: H×W bool; None where there is none.
        height, width: of the stored image, upright, in pixels.
    """

    image: np.ndarray
    mask: np.ndarray | None
    height: int
    width: int


def sample_view(stored: Mapping[str, Any], side: int = SHOWN_SIDE) -> SampleView:
    """Return a stored sample at most `side` pixels high and wide.

    Args:
        stored: its columns `samples.STORED`.
        side: of the picture, in pixels.
    """
    # it was within the limits of ingest and of scoring, so none apply here
    limits = ImageLimits(stored["height"] * stored["width"], max(len(stored["image"]), len(stored["mask"] or b"")))
    pixels = decode_image(stored["image"], limits).pixels
    height, width = pixels.shape[:2]
    share = min(1.0, side / max(height, width))
    shown = max(1, round(height * share)), max(1, round(width * share))
    mask = None
    if stored["mask"] is not None:
        # keeps every defect, however thin
        mask = reduce_mask(decode_mask(stored["mask"], limits=limits), *shown) > 0
    if shown != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize(shown[::-1], Image.Resampling.LANCZOS))
    return SampleView(pixels, mask, height, width)


def seen_box(height: int, width: int, policy: InputPolicy) -> tuple[float, float, float, float]:
    """Return top, left, bottom and right of what a model sees of an H×W image, as shares of its height and width."""
    if policy.resize == "stretch" or policy.crop is None:
        return 0.0, 0.0, 1.0, 1.0
    short = min(height, width)
    edges = []
    for side in (height, width):
        # the shorter side is scaled to `size`, the crop is cut from the middle
        hidden = (1 - policy.crop / (policy.size * side / short)) / 2
        edges.append(max(0.0, hidden))
    top, left = edges
    return top, left, 1 - top, 1 - left


def place_map(anomaly_map: np.ndarray, view: SampleView, policy: InputPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Lay a map where the model looked.

    Args:
        anomaly_map: S×S, as the model gave it, padding included.
        view: of the image.
        policy: of the model.

    Returns:
        The map, H×W float32 of the view, and H×W bool: where the model saw the image. The map is 0 elsewhere.
    """
    before = (policy.side - policy.cut) // 2
    inner = anomaly_map[before : before + policy.cut, before : before + policy.cut]
    high, wide = view.image.shape[:2]
    top, left, bottom, right = seen_box(view.height, view.width, policy)
    rows, columns = slice(round(top * high), round(bottom * high)), slice(round(left * wide), round(right * wide))
    size = (columns.stop - columns.start, rows.stop - rows.start)
    placed, seen = np.zeros((high, wide), np.float32), np.zeros((high, wide), bool)
    scaled = Image.fromarray(np.ascontiguousarray(inner, np.float32)).resize(size, Image.Resampling.BILINEAR)
    placed[rows, columns] = np.asarray(scaled)
    seen[rows, columns] = True
    return placed, seen

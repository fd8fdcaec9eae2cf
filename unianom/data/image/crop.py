"""The square of an image that a layout keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unianom.data.image.options import ImageLimits
from unianom.data.image.reduce import TOUCHING, reduce_mask
from unianom.errors import ImageError

if TYPE_CHECKING:
    from unianom.data.schema import Crop


@dataclass(frozen=True)
class CropWindow:
    """The square of one image that a crop keeps.

    Attributes:
        top, left: its first row and column; below 0 where it begins beyond the image.
        length: its height and width in pixels of the image. What lies beyond the image is black.
        side: height and width that it is resized to.
    """

    top: int
    left: int
    length: int
    side: int


def find_crop(pixels: np.ndarray, crop: Crop, limits: ImageLimits | None = None) -> CropWindow:
    """Find where a crop lies in an image.

    Args:
        pixels: H×W×3 uint8, upright.
        crop: what to cut out.
        limits: what the window may cost; of a thin strip it is far larger than the image.

    Raises:
        ImageError: status "unsupported" for an image that is smaller than a centre crop without padding, or too dark
            for a fundus crop; "too_large" for a window over `limits`.
    """
    height, width = pixels.shape[:2]
    if crop.kind == "fundus":
        window = _fundus_window(pixels, crop)
    elif min(height, width) < crop.side and not crop.pad:
        raise ImageError(
            "unsupported",
            f"{width} x {height} pixels, smaller than its layout's crop of {crop.side}; the layout's option crop=false "
            f"stores whole images",
        )
    else:
        window = CropWindow(_before(height, crop.side), _before(width, crop.side), crop.side, crop.side)
    if window.length**2 > (limits or ImageLimits()).max_pixels:
        raise ImageError(
            "too_large",
            f"its crop has {window.length} x {window.length} pixels, more than --limits.max_pixels allows",
        )
    return window


def _before(length: int, side: int) -> int:
    """Return pixels before the middle `side` of `length`, below 0 if that is less; as torchvision's CenterCrop
    counts."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)


def _fundus_window(pixels: np.ndarray, crop: Crop) -> CropWindow:
    from scipy import ndimage  # slow to import, and few images need it

    bright = pixels.sum(axis=2, dtype=np.uint16) > crop.threshold
    regions, count = ndimage.label(bright, TOUCHING)
    if not count:
        raise ImageError(
            "unsupported",
            f"no pixel has R + G + B above {crop.threshold}, so there is no retina to crop to; the layout's option "
            f"crop=false stores whole images",
        )
    region = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
    (y, height), (x, width) = _extent(region.sum(axis=1)), _extent(region.sum(axis=0))
    length = max(height, width)
    top, left = math.floor(y - length / 2), math.floor(x - length / 2)
    return CropWindow(top - crop.margin, left - crop.margin, length + 2 * crop.margin, crop.side)


def _extent(counts: np.ndarray) -> tuple[float, int]:
    """Return the centroid and length along one axis of a region that has so many pixels in each row."""
    rows = np.flatnonzero(counts)
    return float((counts * np.arange(len(counts))).sum() / counts.sum()), int(rows[-1] - rows[0]) + 1


def crop_image(pixels: np.ndarray, window: CropWindow) -> np.ndarray:
    """Return the window of an H×W×3 image; where its size changes, bilinear and antialiased."""
    cut = Image.fromarray(_cut_window(pixels, window))
    return np.asarray(cut.resize((window.side, window.side), Image.Resampling.BILINEAR))


def crop_mask(mask: np.ndarray, window: CropWindow) -> np.ndarray:
    """Return the window of an H×W mask, where `crop_image` has that of its image; resized as by `reduce_mask`."""
    return reduce_mask(_cut_window(mask, window), window.side, window.side)


def _cut_window(pixels: np.ndarray, window: CropWindow) -> np.ndarray:
    height, width = pixels.shape[:2]
    cut = np.zeros((window.length, window.length, *pixels.shape[2:]), np.uint8)
    top, bottom = max(window.top, 0), min(window.top + window.length, height)
    left, right = max(window.left, 0), min(window.left + window.length, width)
    cut[top - window.top : bottom - window.top, left - window.left : right - window.left] = pixels[
        top:bottom, left:right
    ]
    return cut

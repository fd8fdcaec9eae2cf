"""Pixels and anomaly maps as PNG."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode H×W or H×W×3 uint8, or H×W uint16, as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_map(anomaly_map: np.ndarray) -> tuple[bytes, float, float]:
    """Pack an anomaly map into a 16-bit PNG: 65,536 even steps between its own minimum and maximum.

    Args:
        anomaly_map: H×W float32.

    Returns:
        PNG bytes, offset and scale: value = offset + scale · pixel, off by at most scale / 2.

    Raises:
        ValueError: a value is not finite.
    """
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the anomaly map holds NaN or infinite values")
    offset, scale = float(np.float32(low)), float(np.float32((high - low) / 65535))
    if scale == 0:
        steps = np.zeros(anomaly_map.shape, np.uint16)
    else:
        steps = np.clip(np.rint((anomaly_map.astype(np.float64) - offset) / scale), 0, 65535).astype(np.uint16)
    return encode_png(steps), offset, scale


def decode_map(data: bytes, offset: float, scale: float) -> np.ndarray:
    """Unpack what `encode_map` packed, as H×W float32."""
    steps = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",))).astype(np.float64)
    return (offset + scale * steps).astype(np.float32)

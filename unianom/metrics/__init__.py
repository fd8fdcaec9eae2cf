"""Metrics as pure functions over arrays, and accumulators that are updated batch by batch and merged."""

from unianom.metrics.curves import Curve
from unianom.metrics.image import image_curves, image_metrics
from unianom.metrics.pixel import PixelAccumulator, PixelMetrics, pixel_metrics
from unianom.metrics.region import AuproVariant, aupro

__all__ = [
    "AuproVariant",
    "Curve",
    "PixelAccumulator",
    "PixelMetrics",
    "aupro",
    "image_curves",
    "image_metrics",
    "pixel_metrics",
]

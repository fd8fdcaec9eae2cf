"""Metrics as pure functions over arrays, and accumulators that are updated batch by batch and merged."""

from unianom.configs.metrics import AuproVariant
from unianom.metrics.curves import Curve
from unianom.metrics.image import image_curves, image_metrics
from unianom.metrics.pixel import PixelAccumulator, PixelMetrics, pixel_metrics
from unianom.metrics.region import aupro
from unianom.metrics.streaming import BinnedMetrics, BinnedPixelAccumulator

__all__ = [
    "AuproVariant",
    "BinnedMetrics",
    "BinnedPixelAccumulator",
    "Curve",
    "PixelAccumulator",
    "PixelMetrics",
    "aupro",
    "image_curves",
    "image_metrics",
    "pixel_metrics",
]

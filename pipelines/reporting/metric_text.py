"""Metrics as text: short names, and shares in percent."""

from __future__ import annotations

from collections.abc import Iterable

UNDEFINED = "–"

SHORT_NAMES = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "image_f1_max": "I-F1max",
    "image_accuracy_at_f1_max": "I-Acc",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "pixel_f1_max": "P-F1max",
    "dsc": "DSC",
    "iou": "IoU",
    "soft_dice": "soft DSC",
    "soft_iou": "soft IoU",
}
"""Metrics, in the order of their columns, and their usual short names; AUPRO is named by its variant."""


def percent(value: float | None) -> str:
    """Return a share in percent with one decimal, or a dash where it is undefined."""
    return UNDEFINED if value is None else f"{100 * value:.1f}"


def short_name(key: str) -> str:
    """Return the name of a metric in the heading of a column."""
    return SHORT_NAMES.get(key) or key.replace("aupro", "AUPRO")


def aupro_keys(metrics: Iterable[str]) -> list[str]:
    """Return AUPRO's keys in a row of results: variants and limits other than the usual ones are part of the name."""
    return [key for key in metrics if key.startswith("aupro") and not key.endswith("_error")]

"""The threshold of a model for a category, as score manifests and evaluations hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def threshold_entry(model: Mapping[str, Any], category: str | None) -> Mapping[str, Any] | None:
    """Return the threshold that judges a category: its own where the model has thresholds by category, else the
    model's; None where there is none."""
    own = (model.get("category_thresholds") or {}).get(category)
    return own if own is not None else model.get("threshold")


def threshold_of(model: Mapping[str, Any], category: str | None) -> float | None:
    """Return the value of the threshold that judges a category."""
    entry = threshold_entry(model, category)
    return None if entry is None else float(entry["value"])

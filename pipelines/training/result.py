"""What comes of fitting."""

from __future__ import annotations

from dataclasses import dataclass

from unianom.thresholds import Threshold


@dataclass(frozen=True)
class FitResult:
    """One fitted model.

    Attributes:
        folder: its model folder.
        categories: those it was fitted on.
        fresh: whether this run wrote it.
        summary: what it was made of, in words.
        metrics: what it was made of, in numbers.
        threshold: the stored threshold, or None.
        notice: why there is no threshold, else "".
    """

    folder: str
    categories: list[str]
    fresh: bool
    summary: str
    metrics: dict[str, float]
    threshold: Threshold | None
    notice: str

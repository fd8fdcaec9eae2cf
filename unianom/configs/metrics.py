"""Variants of metrics that options name."""

from __future__ import annotations

from typing import Literal, get_args

from unianom.errors import OptionError

AuproVariant = Literal["exact", "legacy_global_200", "legacy_per_image"]
"""See `unianom.metrics.region.aupro`."""


def check_aupro_options(limit: float, variant: str) -> None:
    """Raise OptionError unless both are ones `aupro` knows."""
    if variant not in get_args(AuproVariant):
        raise OptionError(f"unknown AUPRO variant '{variant}'; choose one of {', '.join(get_args(AuproVariant))}")
    if not 0 < limit <= 1:
        raise OptionError(f"AUPRO limit is {limit}; it is the highest false-positive rate, above 0 and at most 1")

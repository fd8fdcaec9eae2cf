"""Values, names and counts of a campaign in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

UNDEFINED = "–"
"""Stands in tables where there is no value."""


def in_words(value: Any) -> str:
    """Return a value as a command line takes it, numbers to six digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(in_words, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def short_names(options: Sequence[str]) -> dict[str, str]:
    """Return for each dotted name as many of its last parts as tell it from the others."""
    short = {}
    for option in options:
        parts = option.split(".")
        tails = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [f".{other}" for other in options if other != option]
        short[option] = next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), option)
    return short


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def four_digits(value: float | None) -> str:
    """Return a number to four digits."""
    return UNDEFINED if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds in the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"

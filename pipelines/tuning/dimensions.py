"""What is tried for one option: single values, or a range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unianom.errors import OptionError


@dataclass(frozen=True)
class Choice:
    """One of some values.

    Attributes:
        values: numbers, text, booleans, None, lists, or groups of options as dicts.
    """

    values: tuple[Any, ...]

    def sample(self, rng: np.random.Generator) -> Any:
        """Draw one of them."""
        return self.values[int(rng.integers(len(self.values)))]

    def grid(self) -> list[Any]:
        """Return all of them."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two.

    Attributes:
        low, high: both included.
        log: whether its logarithm is drawn evenly.
        integer: whether it is whole.
        steps: how many values a grid has.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    steps: int = 5

    def __post_init__(self) -> None:
        ordered = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
        if not ordered or not isinstance(self.steps, int) or self.steps < 2:
            raise OptionError(f"a range needs low < high and steps >= 2, got {self.low}, {self.high}, {self.steps}")
        if self.integer and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise OptionError(f"a range of whole numbers needs whole limits, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise OptionError(f"a logarithmic range must be above zero, got {self.low}")

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value evenly, rounded to four digits."""
        return self._at(rng.random())

    def grid(self) -> list[Any]:
        """Return `steps` values from low to high."""
        return list(dict.fromkeys(self._at(step / (self.steps - 1)) for step in range(self.steps)))

    def _at(self, share: float) -> float:
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return self.rounded(value)

    def rounded(self, value: float) -> float:
        """Return a value made whole, or of four digits, so that a recipe can be read; never outside the range."""
        if self.integer:
            return round(value)  # whole limits keep it inside
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True)
class Halves:
    """A list as the campaign is given it, its first and its second half: layers of whatever encoder."""

    def of(self, given: Sequence[Any]) -> Choice:
        """Return the choice for a list."""
        middle = (len(given) + 1) // 2
        found = (tuple(given), tuple(given[:middle]), tuple(given[middle:]))
        return Choice(tuple(dict.fromkeys(half for half in found if half)))


Domain = Choice | Range


@dataclass(frozen=True)
class Dimension:
    """One option and what is tried for it.

    Attributes:
        name: of the option, dotted, such as "bank.coreset_ratio"; or of a group, whose values are then dicts.
        domain: what is tried; `Halves` only in default spaces, where the given list is not known.
        why: what it does, in a few words.
    """

    name: str
    domain: Any
    why: str = ""

"""What each option was in all settings of a campaign, as a column of numbers or of levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.tuning.wording import in_words, is_number

Floats = NDArray[np.float64]

LOG_SPAN = 30
"""An axis is logarithmic above this ratio of its largest to its smallest value."""

MOST_LEVELS = 32
"""Levels of an option that a forest tells apart."""


@dataclass(frozen=True)
class Column:
    """What one option was in each of N settings.

    Attributes:
        option: its dotted name.
        numbers: (N,) float64, NaN where the value is None or absent; empty if the option is no number.
        levels: the different values in words, in order; empty if the option is a number.
        index: (N,) int64 place among the levels; empty if the option is a number.
    """

    option: str
    numbers: Floats
    levels: tuple[str, ...]
    index: NDArray[np.int64]

    @property
    def varies(self) -> bool:
        """Whether there are two different values."""
        if self.levels:
            return len(self.levels) > 1
        return len(np.unique(self.numbers)) > 1  # NaN counts as one value

    @property
    def log(self) -> bool:
        """Whether its axis is logarithmic."""
        return not self.levels and needs_log_axis(self.numbers)

    def encoded(self) -> Floats:
        """Return (N, K) numbers for a forest: the value itself and whether there is none, or one column a level."""
        if not self.levels:
            absent = np.isnan(self.numbers)
            filled = np.where(absent, np.nanmedian(self.numbers), self.numbers)
            return np.column_stack([filled, absent]) if absent.any() else filled[:, None]
        count = np.bincount(self.index, minlength=len(self.levels))
        common = np.sort(np.argsort(-count, kind="stable")[:MOST_LEVELS])  # rare ones are all zeros
        return (self.index[:, None] == common).astype(np.float64)


def columns_of(values: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the options that vary, in the order in which they first come; an absent one counts as None."""
    names = dict.fromkeys(name for row in values for name in row)
    return [column for name in names if (column := _column(name, [row.get(name) for row in values])).varies]


def _column(option: str, values: Sequence[Any]) -> Column:
    known = [value for value in values if value is not None]
    if known and all(map(is_number, known)):
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        return Column(option, numbers, (), np.zeros(0, np.int64))
    levels = {in_words(value): value for value in values}
    ordered = sorted(levels, key=lambda word: (0, levels[word], "") if is_number(levels[word]) else (1, 0, word))
    place = {word: number for number, word in enumerate(ordered)}
    return Column(option, np.zeros(0), tuple(ordered), np.array([place[in_words(value)] for value in values], np.int64))


def objectives_of(rows: Sequence[Mapping[str, Any]], key: str = "objective") -> Floats:
    """Return the (N,) objectives, or other numbers, of rows; NaN where there is none."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def measured_only(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows with an objective."""
    return [row for row, known in zip(rows, np.isfinite(objectives_of(rows)), strict=True) if known]


def needs_log_axis(values: Floats) -> bool:
    """Return whether positive values span so far that they are told apart on a logarithmic axis only."""
    known = np.unique(values[np.isfinite(values)])
    if not len(known) or known[0] <= 0 or known[-1] <= LOG_SPAN * known[0]:
        return False
    # many evenly drawn values come near 0 by chance; their middle would lie at the far end of a logarithmic axis
    middle = float(np.quantile(known, 0.5, method="lower"))
    return bool(scaled(middle, known[0], known[-1], log=True) < 0.75)


def scaled(values: ArrayLike, low: float, high: float, log: bool) -> Floats:
    """Return values as shares of the way from low to high, or of that of their logarithms; 0.5 where both are one."""
    table = np.asarray(values, np.float64)
    if high == low:
        return np.where(np.isnan(table), table, 0.5)
    return np.log(table / low) / math.log(high / low) if log else (table - low) / (high - low)


def most_telling(columns: Sequence[Column], objective: Floats, most: int) -> list[Column]:
    """Return at most so many options: those that differ most in objective.

    That is the variation between levels, or between eighths by count, less what it would be by chance.
    """

    def between(column: Column) -> float:
        part = column.index if column.levels else eighths(column.numbers)
        groups = [objective[part == n] for n in np.unique(part)]
        found = sum(len(group) * (group.mean() - objective.mean()) ** 2 for group in groups)
        by_chance = (len(groups) - 1) / max(len(objective) - 1, 1) * len(objective) * objective.var()
        return float(found - by_chance)

    kept = np.argsort([-between(column) for column in columns], kind="stable")[:most]
    return [columns[place] for place in np.sort(kept)]


def eighths(numbers: Floats) -> NDArray[np.int64]:
    """Return (N,) 1 to 8, from the lowest to the highest eighth by count; 0 where there is no number."""
    edges = np.nanquantile(numbers, np.linspace(0, 1, 9)[1:-1])
    return np.where(np.isnan(numbers), 0, np.searchsorted(edges, numbers) + 1)

"""Settings as lines across their options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from pipelines.tuning.figures.drawing import (
    FAINT,
    INK,
    MARKED,
    below_in_words,
    empty_figure,
    floor_of,
    short_number,
    wrap,
    write_caption,
)
from pipelines.tuning.option_columns import (
    Column,
    Floats,
    columns_of,
    measured_only,
    most_telling,
    objectives_of,
    scaled,
)
from pipelines.tuning.wording import counted, in_words, short_names

LINES, BEST_SHARE, OPTION_AXES = 500, 0.1, 9
"""Lines that are drawn at most, share of them in colour, and axes of options at most."""

RISING = LinearSegmentedColormap.from_list("rising", ["#7fc4b4", "#3f83c9", "#2b3a8c"])
"""Colours of the best lines, the darkest for the best; none is near the grey of the rest or the orange of the chosen
one."""

Ticks = list[tuple[float, str]]
"""Heights on an axis from 0 to 1, and what is written there."""


def parallel_coordinates(settings: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None = None) -> Figure:
    """Draw each setting as a line across its options to its objective, the best tenth in colour above grey others.

    Args:
        settings: at most 500 lines are drawn; of the grey ones a seeded choice.
        best: the setting that was chosen, drawn in orange; may be another than that of the largest objective.
    """
    title = "Settings, from their options to the objective"
    settings = measured_only(settings)
    # the chosen one takes its place on the axes with the others
    every = [*settings, *([best] if best is not None and measured_only([best]) else [])]
    y = objectives_of(every)
    columns = columns_of([setting["values"] for setting in every])
    if not columns:
        return empty_figure(title, "no option varies")
    drawn = most_telling(columns, y, OPTION_AXES)
    names = short_names([column.option for column in columns])
    n = len(settings)
    generator = np.random.default_rng(0)
    order = np.argsort(-y[:n], kind="stable")
    top = order[: min(math.ceil(BEST_SHARE * n), round(BEST_SHARE * LINES))]
    rest = order[len(top) :]
    if len(rest) > LINES - len(top):
        rest = generator.choice(rest, LINES - len(top), replace=False)

    figure = Figure(figsize=(max(1.3 * (len(drawn) + 1) + 0.5, 4.2), 4.0), layout="constrained")
    axes = figure.add_subplot()
    heights = []
    for place, column in enumerate(drawn):
        height, ticks = _coordinate(column)
        if column.levels:  # lines of one level lie beside each other
            height = height + generator.uniform(-0.012, 0.012, len(height))
        heights.append(height)
        _draw_coordinate(axes, place, wrap(names[column.option], 15, 3), ticks)
    floor, high = floor_of(y), float(y.max())
    heights.append((np.maximum(y, floor) - floor) / (high - floor) if high > floor else np.full(len(y), 0.5))
    _draw_coordinate(axes, len(drawn), "objective", _number_ticks(y[y >= floor], floor, high, log=False))
    points = np.stack([np.broadcast_to(np.arange(len(heights)), (len(y), len(heights))), np.array(heights).T], axis=2)

    alpha = 0.8 if len(rest) < 50 else 0.35
    axes.add_collection(LineCollection(list(points[rest]), colors=FAINT, linewidths=0.5, alpha=alpha, zorder=1))
    rising = top[::-1]  # the best on top
    colours = RISING(np.linspace(0, 1, len(rising)) if len(rising) > 1 else np.ones(1))
    axes.add_collection(LineCollection(list(points[rising]), colors=colours, linewidths=1.1, alpha=0.85, zorder=2))
    if len(every) > n:
        axes.plot(*points[-1].T, color=MARKED, linewidth=2.2, zorder=3, label="chosen")
    axes.set_xlim(-0.75, len(drawn) + 0.15)
    axes.set_ylim(-0.06, 1.2)
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold", color=INK)
    axes.set_axis_off()
    first = "best" if len(top) == 1 else f"best {len(top):,}"
    words = f"in colour: the {first} of {counted(n, 'setting')}; grey: {counted(len(rest), 'other')}"
    if len(rest) < n - len(top):
        words += f", drawn at random from {n - len(top):,}"
    if len(drawn) < len(columns):
        words += f"; the {len(drawn)} of {len(columns)} options that tell most"
    words += "; orange: the chosen one" if len(every) > n else ""
    write_caption(figure, words + below_in_words(y[:n], floor))
    return figure


def _coordinate(column: Column) -> tuple[Floats, Ticks]:
    """Return heights of an option's values on its axis from 0 to 1, and the ticks beside it."""
    if column.levels:
        heights = np.linspace(0, 1, len(column.levels))
        step = math.ceil(len(heights) / 10)
        ticks = [(height, word) for height, word in zip(heights, column.levels, strict=True)]
        return heights[column.index], ticks[::step]
    known = column.numbers[np.isfinite(column.numbers)]
    low, high = known.min(), known.max()
    at = scaled(column.numbers, low, high, column.log)
    ticks = _number_ticks(known, low, high, column.log)
    if len(known) < len(column.numbers):  # None has a place of its own below the numbers
        at = np.where(np.isfinite(at), 0.14 + 0.86 * at, 0)
        ticks = [(0, in_words(None)), *((0.14 + 0.86 * height, word) for height, word in ticks)]
    return at, ticks


def _number_ticks(values: Floats, low: float, high: float, log: bool) -> Ticks:
    """Return ticks: the values themselves where they are few and apart, else round numbers."""
    ticks = np.unique(values)
    if len(ticks) > 6 or (len(ticks) > 1 and np.diff(scaled(ticks, low, high, log)).min() < 0.07):
        if log:
            steps = (1, 2, 5) if high < 100 * low else (1,)
            ticks = np.asarray(LogLocator(subs=steps, numticks=6).tick_values(low, high))
        else:
            ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
    heights = scaled(ticks, low, high, log)
    return [(float(height), short_number(float(tick), 4)) for height, tick in zip(heights, ticks, strict=True)]


def _draw_coordinate(axes: Axes, place: int, name: str, ticks: Ticks) -> None:
    axes.plot([place, place], [0, 1], color=INK, linewidth=0.8, zorder=4)
    axes.text(place, 1.05, name, fontsize=7.5, color=INK, ha="center", va="bottom", parse_math=False)
    for height, word in ticks:
        axes.plot([place - 0.02, place], [height, height], color=INK, linewidth=0.8, zorder=4)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
        style: dict[str, Any] = {"fontsize": 6.5, "ha": "right", "va": "center", "bbox": box, "linespacing": 0.95}
        axes.text(place - 0.04, height, wrap(word, 16), color=INK, zorder=5, parse_math=False, **style)

"""The objective against each option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pipelines.tuning.figures.drawing import (
    MARKED,
    PLAIN,
    below_in_words,
    draw_log_axis,
    empty_figure,
    floor_of,
    limit_axis,
    short_number,
    wrap,
    write_caption,
)
from pipelines.tuning.option_columns import (
    Column,
    Floats,
    columns_of,
    eighths,
    measured_only,
    most_telling,
    objectives_of,
)
from pipelines.tuning.wording import counted, in_words, short_names
from unianom import visual

PANELS, STRIPS = 12, 8
"""Panels that are drawn at most, and strips of a panel."""


def slices_figure(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the objective against each option that varies, one panel each, with medians.

    The 12 options that differ most in objective are drawn.
    """
    title = "Objective by option"
    settings = measured_only(settings)
    columns = columns_of([setting["values"] for setting in settings])
    if not columns:
        return empty_figure(title, "no option varies")
    y = objectives_of(settings)
    drawn = most_telling(columns, y, PANELS)
    names = short_names([column.option for column in columns])
    across = min(4, len(drawn))
    down = math.ceil(len(drawn) / across)
    figure = Figure(figsize=(max(2.3 * across, 3.4), 2.3 * down + 0.3), layout="constrained")
    floor = floor_of(y)
    generator = np.random.default_rng(0)
    first = figure.add_subplot(down, across, 1)
    for number, column in enumerate(drawn):
        axes = first if number == 0 else figure.add_subplot(down, across, number + 1, sharey=first)
        visual.quiet(axes, wrap(names[column.option], 26), "", "objective" if number % across == 0 else "")
        axes.title.set_fontsize(8)
        _draw_slice(axes, column, np.maximum(y, floor), generator)
        if number % across:
            axes.tick_params(labelleft=False)
    limit_axis(first, floor, float(y.max()))
    words = f"{counted(len(settings), 'setting')}; orange: medians"
    if len(drawn) < len(columns):
        words += f"; the {len(drawn)} of {len(columns)} options that tell most"
    write_caption(figure, words + below_in_words(y, floor))
    return figure


def _draw_slice(axes: Axes, column: Column, y: Floats, generator: np.random.Generator) -> None:
    """Draw points of one option and the median of each level, or of each eighth of its values."""
    n = len(y)
    points: dict[str, Any] = {
        "s": 14 if n < 100 else 5 if n < 1000 else 2.5,
        "color": PLAIN,
        "linewidths": 0,
        "alpha": 0.8 if n < 100 else 0.35,
    }
    x = column.numbers
    if column.levels or np.isnan(x).any() or len(np.unique(x)) <= STRIPS:
        levels, index = _strips(column, y)
        axes.scatter(index + generator.uniform(-0.22, 0.22, n), y, **points)
        for place in range(len(levels)):
            own = y[index == place]
            if len(own) > 1:
                axes.plot([place - 0.32, place + 0.32], [np.median(own)] * 2, color=MARKED, linewidth=1.8)
        words = [wrap(word, 16, 1) for word in levels]
        steep = sum(map(len, words)) > 26
        style: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if steep else {}
        axes.set_xticks(range(len(words)), words, parse_math=False, **style)
        axes.set_xlim(-0.6, len(words) - 0.4)
        axes.grid(visible=False, axis="x")
        return
    axes.scatter(x, y, **points)
    part = eighths(x)
    medians = [(np.median(x[part == p]), np.median(y[part == p])) for p in np.unique(part)]
    axes.plot(*zip(*medians, strict=True), "o-", color=MARKED, linewidth=1.3, markersize=3)
    if column.log:
        draw_log_axis(axes, x)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=bool((x % 1 == 0).all())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _strips(column: Column, y: Floats) -> tuple[list[str], NDArray[np.int64]]:
    """Return words and (N,) place of at most nine strips.

    Strips are levels, the rare and the worse together as "others"; different numbers if they are few, else eighths;
    None comes first.
    """
    if not column.levels:
        x = column.numbers
        values = np.unique(x[np.isfinite(x)])
        if len(values) <= STRIPS:
            words, place = [short_number(float(v), 4) for v in values], np.searchsorted(values, x) + 1
        else:
            _, place = np.unique(eighths(x), return_inverse=True)  # fewer where many values are equal
            words = [f"≤ {short_number(float(x[place == n].max()))}" for n in range(1, place.max() + 1)]
        if not np.isnan(x).any():
            return words, place - 1
        return [in_words(None), *words], np.where(np.isnan(x), 0, place)
    levels, index = list(column.levels), column.index
    if len(levels) <= STRIPS + 1:
        return levels, index
    # the best of those that were tried more than a few times
    rank = [(min(int((index == n).sum()), 5), float(np.median(y[index == n]))) for n in range(len(levels))]
    kept = sorted(sorted(range(len(levels)), key=lambda n: rank[n], reverse=True)[:STRIPS])
    places = np.full(len(levels), STRIPS, np.int64)
    places[kept] = np.arange(STRIPS)
    return [*(levels[n] for n in kept), f"{len(levels) - STRIPS} others"], places[index]

"""Settings on validation images against the same settings on test images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.tuning.figures.drawing import (
    INK,
    MARKED,
    PLAIN,
    draw_legend,
    empty_figure,
    floor_of,
    wrap,
    write_caption,
)
from pipelines.tuning.rank_correlation import rank_correlation
from pipelines.tuning.wording import counted
from unianom import visual


def agreement_figure(
    validation: Sequence[float | None],
    test: Sequence[float | None],
    default_index: int | None,
    chosen_index: int | None,
    names: Sequence[str],
) -> Figure:
    """Draw the objectives of settings on the test set against those on validation images, with rank correlation.

    Args:
        validation: objective of each setting without test data, from left to right.
        test: its objective on the test set, upwards.
        default_index: which is the default setting, if any is.
        chosen_index: which the campaign chose.
        names: of the settings; those of the two are written in the key.
    """
    title = "Chosen without test data, measured on it"
    x, y = (np.array([math.nan if v is None else v for v in side], np.float64) for side in (validation, test))
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return empty_figure(title, "no setting has both objectives")
    floors = floor_of(x[known]), floor_of(y[known])
    low = known & ((x < floors[0]) | (y < floors[1]))
    drawn = np.maximum(x, floors[0]), np.maximum(y, floors[1])
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    others = known.copy()
    # where both are one, the smaller mark lies on the larger
    marks = ((default_index, "default", "s", INK, 8.0), (chosen_index, "chosen", "D", MARKED, 5.5))
    for index, word, marker, colour, size in marks:
        if index is not None and known[index]:
            others[index] = False
            style: dict[str, Any] = {"markersize": size, "zorder": 3, "linestyle": "none"}
            label = f"{word}: {wrap(str(names[index]), 26, 1)}"
            axes.plot(drawn[0][index], drawn[1][index], marker=marker, color=colour, label=label, **style)
    small: dict[str, Any] = {"s": 18 if known.sum() < 300 else 5, "alpha": 0.6 if known.sum() < 300 else 0.35}
    if others.any():
        axes.scatter(drawn[0][others], drawn[1][others], color=PLAIN, linewidths=0, label="other settings", **small)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    visual.quiet(axes, title, "validation objective", "test objective")
    draw_legend(axes)
    edge = f"; {counted(int(low.sum()), 'lower setting')} at the lower edges" if low.any() else ""
    write_caption(figure, _correlation_words(rank_correlation(x, y)) + edge)
    return figure


def _correlation_words(found: Mapping[str, Any]) -> str:
    words = counted(found["n"], "setting")
    if found["spearman"] is None:
        return f"{words}; no rank correlation, as one side does not vary"
    words += f"; Spearman's ρ {found['spearman']:.2f}"
    if found["spearman_interval"]:
        low, high = found["spearman_interval"]
        words += f" (95 %: {low:.2f} to {high:.2f})"
    return f"{words}, Kendall's τ {found['kendall']:.2f}"

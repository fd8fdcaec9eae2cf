"""Bars of the importance of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipelines.tuning.figures.drawing import FAINT, INK, PLAIN, empty_figure, wrap, write_caption
from pipelines.tuning.wording import short_names
from unianom import visual

BARS = 20
"""Options that are drawn at most."""


def importance_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw bars of `importance`, with one standard deviation to either side; the first 20 options."""
    title = "Importance of the options"
    if not rows:
        return empty_figure(title, "too few settings to tell, or all equally good")
    drawn = list(rows)[:BARS]
    names = short_names([row["option"] for row in rows])
    figure = Figure(figsize=(5.2, 0.9 + 0.26 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    place = np.arange(len(drawn))
    sd = [row["sd"] for row in drawn]
    bars: dict[str, Any] = {"ecolor": INK, "error_kw": {"linewidth": 0.9}}
    axes.barh(place, [row["importance"] for row in drawn], height=0.62, color=PLAIN, xerr=sd, **bars)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(place, [wrap(names[row["option"]], 34, 1) for row in drawn], parse_math=False)
    axes.invert_yaxis()
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    visual.quiet(axes, title, "R² lost when the option is shuffled", "")
    axes.grid(visible=False, axis="y")
    if len(drawn) < len(rows):
        write_caption(figure, f"the first {len(drawn)} of {len(rows)} options")
    return figure

"""What the figures of a campaign have in common: colours, captions, axes."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipelines.tuning.option_columns import Floats, scaled
from pipelines.tuning.wording import counted
from unianom import visual

MARKED, PLAIN, INK, FAINT = "#dd6b33", "#3f83c9", "#3a4150", "#9aa3b0"
"""Colours: of what was chosen, of the other points, of writing, of what stands behind."""


def empty_figure(title: str, words: str) -> Figure:
    """Return a figure that says why it is empty."""
    figure = Figure(figsize=(4.6, 1.2), layout="constrained")
    axes = figure.add_subplot()
    visual.quiet(axes, title, "", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=FAINT)
    return figure


def wide_figure() -> tuple[Figure, Axes]:
    """Return a wide figure with one panel."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    return figure, figure.add_subplot()


def write_caption(figure: Figure, words: str) -> None:
    """Write small type below a figure with constrained layout."""
    words = textwrap.fill(words, int(18 * figure.get_figwidth()))
    figure.supxlabel(words, fontsize=7, color=INK, x=0.01, ha="left", parse_math=False)


def draw_legend(axes: Axes) -> None:
    """Draw a legend beside the axes, where it covers nothing."""
    style: dict[str, Any] = {"fontsize": 7, "frameon": False, "labelcolor": INK, "handlelength": 1.4}
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def name_point(axes: Axes, x: float, y: float, name: str, every: Floats) -> None:
    """Write a name above a point, on the side that has room."""
    low, high = every.min(), every.max()
    right = high > low and scaled(x, low, high, axes.get_xscale() == "log") > 0.5
    axes.annotate(
        wrap(name, 28, 1),
        (x, y),
        xytext=(3 if right else -3, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=7,
        color=INK,
        fontweight="bold",
        zorder=5,
        parse_math=False,
    )


def wrap(word: str, width: int, lines: int = 2) -> str:
    """Break a name or a value after spaces and punctuation, and cut out its middle where it is still too long."""
    if len(word) > width * lines:
        head = width * lines // 2 - 1
        word = f"{word[:head]}…{word[-head:]}"
    found = [""]
    for part in re.findall(r"[^\s_.,/-]*[\s_.,/-]?", word):
        if found[-1] and len(found[-1]) + len(part.rstrip()) > width and len(found) < lines:
            found.append("")
        found[-1] += part
    return "\n".join(line.strip() for line in found)


def floor_of(values: Floats) -> float:
    """Return where the axis of an objective starts.

    That is the least value, or a higher one where a few failures would flatten what is worth seeing.
    """
    low, most, high = np.quantile(values, (0, 0.1, 1))
    return float(low if most == high else max(low, most - 1.5 * (high - most)))


def limit_axis(axes: Axes, floor: float, high: float) -> None:
    """Let the y axis go from floor to high, with a margin."""
    margin = 0.05 * (high - floor) or 0.01 * max(abs(high), 0.1)
    axes.set_ylim(floor - margin, high + margin)


def below_in_words(values: Floats, floor: float) -> str:
    """Return what a caption says of values that are drawn on the lower edge."""
    count = int((values < floor).sum())
    return f"; {counted(count, 'lower value')} at the lower edge" if count else ""


def draw_log_axis(axes: Axes, values: Floats) -> None:
    """Make the x axis logarithmic, with a few plain numbers on it."""
    axes.set_xscale("log")
    decades = math.log10(values.max() / values.min())
    steps = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float, digits: int = 3) -> str:
    """Return a number to some digits as text.

    Whole numbers below a million are written out; exponents have no needless zeros.
    """
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].replace("+", ""), f"{value:.{digits}g}")

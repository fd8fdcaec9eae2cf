"""How the objective grew, within trials and from trial to trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.tuning.figures.drawing import (
    FAINT,
    INK,
    MARKED,
    PLAIN,
    below_in_words,
    draw_legend,
    empty_figure,
    floor_of,
    limit_axis,
    name_point,
    wide_figure,
    wrap,
    write_caption,
)
from pipelines.tuning.option_columns import objectives_of
from pipelines.tuning.statuses import STATUSES
from pipelines.tuning.wording import counted
from unianom import visual


def history_figure(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how the objective of each trial grew; those stopped early end in a cross.

    Without intermediate reports, draw the objective of each trial in turn and the best so far.
    """
    curves = [
        np.array([(r["progress"], r["objective"]) for r in trial.get("reports") or () if _known(r)], np.float64)
        for trial in trials
    ]
    if not any(len(curve) > 1 for curve in curves):
        return _history_in_turn(trials)
    figure, axes = wide_figure()
    final = [(curve, trial) for curve, trial in zip(curves, trials, strict=True) if len(curve)]
    ends = np.array([curve[-1, 1] for curve, _ in final])
    y = objectives_of([trial for _, trial in final])
    best = int(np.nanargmax(np.where(np.isfinite(y), y, ends - 1e6)))
    alpha = min(0.7, max(0.05, 35 / len(final)))
    lines = [curve for curve, _ in final if len(curve) > 1]
    axes.add_collection(LineCollection(lines, colors=FAINT, linewidths=0.8, alpha=alpha, zorder=1))
    reported = np.concatenate([curve[:, 1] for curve, _ in final])
    floor, high = floor_of(reported), float(reported.max())
    small = len(final) >= 300
    for status, marker, colour in (("done", "o", PLAIN), ("stopped", "x", INK)):
        points = np.array([curve[-1] for curve, trial in final if trial["status"] == status]).reshape(-1, 2)
        style: dict[str, Any] = {"markersize": (2 if small else 3.5), "markeredgewidth": 0.8, "zorder": 3}
        if len(points):
            words = "finished" if status == "done" else "stopped early"
            place = np.maximum(points[:, 1], floor)
            axes.plot(points[:, 0], place, marker, color=colour, alpha=0.8, label=words, **style)
    curve, trial = final[best]
    axes.plot(*curve.T, color=MARKED, linewidth=1.8, zorder=4, label=f"best: {wrap(str(trial['trial']), 28, 1)}")
    axes.plot(*curve[-1], "X" if trial["status"] == "stopped" else "o", color=MARKED, markersize=6, zorder=4)
    axes.set_xlim(-2, 102)
    limit_axis(axes, floor, high)
    visual.quiet(axes, "Objective while training", "progress in %", "objective")
    draw_legend(axes)
    write_caption(figure, _ended(trials) + below_in_words(ends, floor))
    return figure


def _known(report: Mapping[str, Any]) -> bool:
    value = report.get("objective")
    return value is not None and math.isfinite(value)


def _history_in_turn(trials: Sequence[Mapping[str, Any]]) -> Figure:
    y = objectives_of(trials)
    known = np.flatnonzero(np.isfinite(y))
    if not len(known):
        return empty_figure("Objective of each trial", "no trial has an objective")
    figure, axes = wide_figure()
    floor = floor_of(y[known])
    number = np.arange(1, len(y) + 1)
    style: dict[str, Any] = {"markersize": 4 if len(known) < 300 else 1.8, "zorder": 2}
    axes.plot(number[known], np.maximum(y[known], floor), "o", color=PLAIN, alpha=0.7, label="trial", **style)
    running = np.maximum(np.fmax.accumulate(y), floor)
    axes.step(number, running, where="post", color=MARKED, linewidth=1.5, zorder=3, label="best so far")
    best = int(np.nanargmax(y))
    axes.plot(number[best], y[best], "o", color=MARKED, markersize=5, zorder=4)
    name_point(axes, number[best], y[best], str(trials[best]["trial"]), number.astype(np.float64))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0.5 - 0.01 * len(y), len(y) + 0.5 + 0.01 * len(y))
    limit_axis(axes, floor, float(y[best]) + 0.06 * (float(y[best]) - floor))
    visual.quiet(axes, "Objective of each trial", "trial", "objective")
    draw_legend(axes)
    write_caption(figure, _ended(trials) + below_in_words(y[known], floor))
    return figure


def _ended(trials: Sequence[Mapping[str, Any]]) -> str:
    """Return how many trials ended in which way, in words."""
    counts = {status: sum(trial["status"] == status for trial in trials) for status in STATUSES}
    found = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
    return f"{counted(len(trials), 'trial')}: {found}"

"""Accuracy of trials against their cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.tuning.figures.drawing import (
    FAINT,
    MARKED,
    below_in_words,
    draw_log_axis,
    empty_figure,
    floor_of,
    limit_axis,
    name_point,
    write_caption,
)
from pipelines.tuning.option_columns import measured_only, needs_log_axis, objectives_of
from pipelines.tuning.pareto import pareto_front
from pipelines.tuning.wording import counted
from unianom import visual

COSTS = {"latency_ms": "latency in ms per image", "memory_mb": "memory in MB"}


def pareto_figure(trials: Sequence[Mapping[str, Any]], front: Collection[str]) -> Figure:
    """Draw the objective of each trial against its latency and against its memory.

    Args:
        trials: those without an objective, or without the cost, take no part.
        front: names of the trials on the common front; drawn in orange, while the line of a panel joins the trials
            that none beats in the two values of that panel.
    """
    title = "What an objective costs"
    trials = measured_only(trials)
    keys = [key for key in COSTS if np.isfinite(objectives_of(trials, key)).any()]
    if not keys:
        return empty_figure(title, "no latency or memory was measured")
    figure = Figure(figsize=(3.6 * len(keys), 3.2), layout="constrained")
    on_front = set(front)
    y = objectives_of(trials)
    floor = floor_of(y)
    first = figure.add_subplot(1, len(keys), 1)
    for number, key in enumerate(keys):
        axes = first if number == 0 else figure.add_subplot(1, len(keys), number + 1, sharey=first)
        cost = objectives_of(trials, key)
        member = np.array([trial["trial"] in on_front for trial in trials])
        joined = np.flatnonzero(pareto_front(np.column_stack([y, cost]), (True, False)))
        joined = joined[np.lexsort((y[joined], cost[joined]))]
        drawn = np.maximum(y, floor)
        size = 16 if len(trials) < 300 else 6
        axes.step(cost[joined], drawn[joined], where="post", color=MARKED, linewidth=1.1, zorder=2)
        axes.scatter(cost[~member], drawn[~member], s=size, color=FAINT, linewidths=0, alpha=0.7)
        axes.scatter(cost[member], drawn[member], s=22, color=MARKED, linewidths=0, zorder=3)
        known = np.isfinite(cost)
        if needs_log_axis(cost):
            draw_log_axis(axes, cost[known])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        best = int(np.argmax(np.where(known, y, -np.inf)))
        name_point(axes, cost[best], y[best], str(trials[best]["trial"]), cost[known])
        limit_axis(axes, floor, y.max() + 0.06 * (y.max() - floor))  # room for the name
        visual.quiet(axes, COSTS[key].split(" in ")[0].capitalize(), COSTS[key], "objective" if number == 0 else "")
        axes.tick_params(labelleft=number == 0)
    words = (
        f"{counted(len(trials), 'trial')}; orange: on the common front; line: what none beats in the two values shown"
    )
    write_caption(figure, words + below_in_words(y, floor))
    return figure

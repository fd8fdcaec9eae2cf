"""Figures of campaigns on made-up settings, by what is drawn on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipelines.tuning.figures.agreement import agreement_figure
from pipelines.tuning.figures.history import history_figure
from pipelines.tuning.figures.importance import importance_figure
from pipelines.tuning.figures.parallel import RISING, parallel_coordinates
from pipelines.tuning.figures.pareto import pareto_figure
from pipelines.tuning.figures.slices import slices_figure
from tests.pipelines.tuning.made import LAYERS, many_settings, setting, trial
from unianom import visual

GREY, ORANGE, BLUE = "#9aa3b0", "#dd6b33", "#3f83c9"


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Warnings of NumPy and Matplotlib are faults here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def caption(figure: Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.findobj(Text) if text.get_text()]


def lines_in(figure: Figure, colour: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if same_color(line.get_color(), colour)]


def drawn(figure: Figure) -> None:
    """Every figure must come out as a picture."""
    assert visual.png(figure).startswith(b"\x89PNG")


def segments(figure: Figure) -> tuple[int, list[Any]]:
    """Number of grey lines, and the coloured ones of parallel coordinates with their colours."""
    grey, coloured = (c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    return len(grey.get_segments()), coloured.get_segments()


def test_parallel_coordinates_draw_at_most_500_lines_with_the_best_on_top() -> None:
    settings = many_settings(4000)
    settings[7]["objective"] = None
    best = max((row for row in settings if row["objective"]), key=lambda row: row["objective"])
    figure = parallel_coordinates(settings, best)
    grey, coloured = segments(figure)
    assert (grey, len(coloured)) == (450, 50)
    assert "best 50 of 3,999 settings; grey: 450 others, drawn at random from 3,949" in caption(figure)
    # 8 options that vary, then the objective; the fixed one has no axis
    assert all(line.shape == (9, 2) for line in coloured)
    found = words(figure)
    assert "objective" in found
    assert "fixed" not in found
    assert {"false", "true", "null", "[layer2, layer3]", "top-$k$"} <= set(found)
    # the last of the coloured is the best, which lies at the top of the objective
    assert coloured[-1][-1][1] == 1
    (chosen,) = lines_in(figure, ORANGE)
    assert chosen.get_ydata()[-1] == 1
    # a logarithmic axis: 10⁻³·⁵ lies in the middle of what was drawn from 10⁻⁵ to 10⁻²
    rate = list(settings[0]["values"]).index("optimiser.rate")
    rates = [row["values"]["optimiser.rate"] for row in settings]
    expected = math.log(best["values"]["optimiser.rate"] / min(rates)) / math.log(max(rates) / min(rates))
    assert chosen.get_ydata()[rate] == pytest.approx(expected)
    assert visual.png(figure) == visual.png(parallel_coordinates(settings, best))


@pytest.mark.parametrize(("count", "coloured"), [(1, 1), (3, 1), (25, 3), (500, 50)])
def test_parallel_coordinates_colour_a_tenth(count: int, coloured: int) -> None:
    settings = [setting(n, {"k": n % 5, "a.b": LAYERS[n % 3]}, n / 600) for n in range(count)]
    settings.append(setting(count, {"k": 7}, None))
    if count == 1:
        settings.append(setting(count + 1, {"k": 8, "a.b": LAYERS[1]}, 0.0))
        count = 2
    grey, found = segments(parallel_coordinates(settings))
    assert (grey, len(found)) == (count - coloured, coloured)
    drawn(parallel_coordinates(settings))


def test_figures_show_the_options_that_tell_most() -> None:
    generator = np.random.default_rng(0)
    settings = []
    for number in range(200):
        values: dict[str, Any] = {f"group.noise{n}": float(generator.random()) for n in range(15)}
        values |= {"group.signal": float(generator.random()), "levels": str(generator.integers(150))}
        settings.append(setting(number, values, values["group.signal"]))
    figure = slices_figure(settings)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 12
    assert "signal" in titles
    assert "the 12 of 17 options that tell most" in caption(figure)
    assert "the 9 of 17 options that tell most" in caption(parallel_coordinates(settings))
    assert "signal" in words(parallel_coordinates(settings))


def test_slices_show_medians_and_logarithmic_axes() -> None:
    figure = slices_figure(many_settings(4000))
    panels = {axes.get_title(loc="left").replace("\n", ""): axes for axes in figure.axes}
    assert len(panels) == 8
    assert [name for name, axes in panels.items() if axes.get_xscale() == "log"] == ["bank.fraction", "rate"]
    pooling = panels["pooling"]
    assert [tick.get_text() for tick in pooling.get_xticklabels()] == ["max", "mean", "top-$k$"]
    medians = [line.get_ydata()[0] for line in pooling.lines]
    settings = many_settings(4000)
    for word, median in zip(("max", "mean", "top-$k$"), medians, strict=True):
        own = [row["objective"] for row in settings if row["values"]["pooling"] == word]
        assert median == pytest.approx(np.median(own))
    assert [tick.get_text() for tick in panels["k"].get_xticklabels()] == ["1", "3", "5", "9"]
    # None, then the eighths
    ticks = [tick.get_text() for tick in panels["top.fraction"].get_xticklabels()]
    assert (ticks[0], len(ticks)) == ("null", 9)
    assert all(tick.startswith("≤ ") for tick in ticks[1:])
    assert len(panels["rate"].lines[0].get_xdata()) == 8
    drawn(figure)


def test_slices_join_rare_levels() -> None:
    """Twelve levels: the eight of highest median among the frequent ones stay."""
    settings = [setting(n, {"level": f"l{n % 12:02d}"}, (n % 12) / 20) for n in range(120)]
    settings.append(setting(120, {"level": "once"}, 0.99))
    figure = slices_figure(settings)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == [*(f"l{n:02d}" for n in range(4, 12)), "5 others"]


@pytest.mark.parametrize("figure_of", [parallel_coordinates, slices_figure])
def test_figures_of_no_choice_say_so(figure_of: Any) -> None:
    for settings in ([], [setting(0, {"k": 1}, 0.5)], [setting(0, {"k": 1}, None), setting(1, {"k": 2}, None)]):
        figure = figure_of(settings)
        assert "no option varies" in words(figure)
        drawn(figure)


def test_failures_do_not_flatten_the_rest() -> None:
    settings = [setting(n, {"k": n % 5}, 0.9 + n / 1000) for n in range(95)]
    settings += [setting(95 + n, {"k": n}, 0.01) for n in range(5)]
    figure = slices_figure(settings)
    assert figure.axes[0].get_ylim()[0] > 0.7
    assert "5 lower values at the lower edge" in caption(figure)
    heights = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in figure.axes[0].collections])
    assert len(heights) == 100
    assert heights.min() > figure.axes[0].get_ylim()[0]


def test_importance_figure() -> None:
    rows = [{"option": f"method.part{n}.k", "importance": 1 / (n + 1), "sd": 0.01} for n in range(25)]
    figure = importance_figure(rows)
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [row["importance"] for row in rows[:20]]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()][:2] == ["part0.k", "part1.k"]
    assert caption(figure) == "the first 20 of 25 options"
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first on top
    drawn(figure)
    drawn(importance_figure(rows[:1]))
    assert "too few settings to tell, or all equally good" in words(importance_figure([]))


def test_pareto_figure_joins_the_front_of_each_panel() -> None:
    costs = [(0.9, 10, 500), (0.95, 30, 400), (0.8, 5, 900), (0.7, 700, 100), (0.6, 600, 600)]
    trials = [trial(n, "done", [], y, latency_ms=ms, memory_mb=mb) for n, (y, ms, mb) in enumerate(costs)]
    trials += [trial(5, "failed", [], None, latency_ms=1.0), trial(6, "done", [], 0.99, latency_ms=None)]
    front = [f"t{n}" for n in range(4)]
    figure = pareto_figure(trials, front)
    latency, memory = figure.axes
    assert (latency.get_xscale(), memory.get_xscale()) == ("log", "linear")
    assert [line.get_xdata().tolist() for line in lines_in(figure, ORANGE)] == [[5, 10, 30], [100, 400]]
    assert [line.get_ydata().tolist() for line in lines_in(figure, ORANGE)] == [[0.8, 0.9, 0.95], [0.7, 0.95]]
    marked = [c for c in latency.collections if same_color(c.get_facecolor()[0], ORANGE)]
    assert len(marked[0].get_offsets()) == 4
    # the best of those whose cost is known
    assert [text.get_text() for text in latency.texts] == ["t1"]
    assert latency.get_xlabel() == "latency in ms per image"
    drawn(figure)
    only = pareto_figure([trial(0, "done", [], 0.5, memory_mb=3.0)], ["t0"])
    assert [axes.get_xlabel() for axes in only.axes] == ["memory in MB"]
    drawn(only)
    assert "no latency or memory was measured" in words(pareto_figure([trial(0, "done", [], 0.5)], []))
    assert "no latency or memory was measured" in words(pareto_figure([], []))


def test_history_ends_stopped_trials_in_a_cross() -> None:
    trials = [
        trial(0, "done", [0.5, 0.7, 0.8], 0.8),
        trial(1, "stopped", [0.4], 0.4),
        trial(2, "stopped", [0.45, 0.5], 0.5),
        trial(3, "failed", [], None),
        trial(4, "crashed", [0.6, 0.65], None),
    ]
    trials[0]["reports"].append({"progress": 40, "objective": None})
    figure = history_figure(trials)
    axes = figure.axes[0]
    (grey,) = (c for c in axes.collections if isinstance(c, LineCollection))
    assert [len(segment) for segment in grey.get_segments()] == [3, 2, 2]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[10, 0.4], [20, 0.5]]]
    best = lines_in(figure, ORANGE)[0]
    assert best.get_xydata().tolist() == [[10, 0.5], [20, 0.7], [30, 0.8]]
    assert best.get_label() == "best: t0"
    assert axes.get_xlabel() == "progress in %"
    assert caption(figure) == "5 trials: 1 done, 2 stopped, 1 failed, 1 crashed"
    drawn(figure)


def test_history_without_reports_is_by_trial_with_the_best_so_far() -> None:
    objectives = [0.5, None, 0.4, 0.7, 0.6]
    trials = [trial(n, "failed" if y is None else "done", [y] if y else [], y) for n, y in enumerate(objectives)]
    figure = history_figure(trials)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "trial"
    (points,) = (line for line in axes.lines if same_color(line.get_color(), BLUE))
    assert points.get_xdata().tolist() == [1, 3, 4, 5]
    assert lines_in(figure, ORANGE)[0].get_ydata().tolist() == [0.5, 0.5, 0.5, 0.7, 0.7]
    assert [text.get_text() for text in axes.texts] == ["t3"]
    late = [trial(0, "failed", [], None), trial(1, "done", [], 0.5)]
    assert lines_in(history_figure(late), ORANGE)[0].get_xydata().tolist()[-1] == [2, 0.5]
    drawn(history_figure(late))
    assert "no trial has an objective" in words(history_figure([trial(0, "failed", [], None)]))


@pytest.mark.parametrize("reports", [True, False])
def test_history_of_thousands_of_trials(reports: bool) -> None:
    generator = np.random.default_rng(0)
    values = generator.random((5000, 3))
    trials = [trial(n, "done", row.tolist() if reports else [], float(row[2])) for n, row in enumerate(values)]
    drawn(history_figure(trials))


def test_agreement_figure_marks_the_two() -> None:
    validation_set, test = [0.1, 0.2, 0.3, 0.4, None], [0.5, 0.7, 0.6, 0.8, 0.9]
    figure = agreement_figure(validation_set, test, 0, 3, [f"$s{n}" for n in range(5)])
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("validation objective", "test objective")
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert marks == {"default: $s0": [[0.1, 0.5]], "chosen: $s3": [[0.4, 0.8]]}
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[0.2, 0.7], [0.3, 0.6]]
    assert caption(figure).startswith("4 settings; Spearman's ρ 0.80 (95 %: ")
    assert caption(figure).endswith("Kendall's τ 0.67")
    drawn(figure)
    drawn(agreement_figure([0.5], [0.6], 0, 0, ["x"]))
    drawn(agreement_figure([0.5, 0.5], [0.6, 0.7], None, 4 - 3, ["x", "y"]))
    assert "no setting has both objectives" in words(agreement_figure([None], [0.6], 0, 0, ["x"]))


def test_best_lines_differ_from_grey() -> None:
    """The colours of the best are neither the grey of the rest nor the orange of the chosen one."""
    for colour in RISING(np.linspace(0, 1, 9)):
        for other in (GREY, ORANGE):
            assert np.abs(np.asarray(colour[:3]) - to_rgba(other)[:3]).sum() > 0.25

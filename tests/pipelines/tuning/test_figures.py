"""Campaigns on made-up settings: numbers against other implementations, figures by what is drawn on them."""

from __future__ import annotations

import csv
import io
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from pipelines.reporting.sections import read_section
from pipelines.tuning import figures
from pipelines.tuning.figures import (
    agreement_figure,
    category_gain,
    columns_of,
    history_figure,
    importance,
    importance_figure,
    parallel_coordinates,
    pareto_figure,
    pareto_front,
    print_campaign,
    rank_correlation,
    section,
    setting_rows,
    short_names,
    slices_figure,
    trial_rows,
)
from unianom import files, visual

GREY, ORANGE, BLUE = "#9aa3b0", "#dd6b33", "#3f83c9"

LAYERS = (["layer2", "layer3"], ["layer1", "layer2", "layer3"], ["blocks.3", "blocks.6", "blocks.9", "blocks.11"])


def setting(number: int, values: dict[str, Any], objective: float | None, **more: Any) -> dict[str, Any]:
    metrics = {} if objective is None else {"image_auroc": objective}
    made = {"trial": f"trial-{number:04d}", "values": values, "objective": objective, "metrics": metrics}
    return {**made, "by_category": {}, **more}


def many_settings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of every kind of option; the objective hangs on the rate and the pooling."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        values = {
            "method.bank.fraction": float(10 ** generator.uniform(-3, -0.5)),
            "method.backbone.layers": LAYERS[generator.integers(3)],
            "method.k": int(generator.choice([1, 3, 5, 9])),
            "method.bank.normalise_embeddings_before_they_are_searched": bool(generator.integers(2)),
            "smoothing.sigma": float(generator.uniform(0, 8)),
            "top.fraction": None if generator.random() < 0.3 else float(10 ** generator.uniform(-4, -1)),
            "optimiser.rate": float(10 ** generator.uniform(-5, -2)),
            "pooling": str(generator.choice(["max", "mean", "top-$k$"])),
            "fixed": 3,
        }
        rate = math.log10(values["optimiser.rate"])
        objective = 0.98 - 0.02 * (rate + 3.5) ** 2 - 0.03 * (values["pooling"] == "mean")
        made.append(setting(number, values, objective + generator.normal(0, 0.002)))
    return made


def trial(number: int, status: str, objectives: list[float], objective: float | None, **more: Any) -> dict[str, Any]:
    reports = [{"progress": 10 * (place + 1), "objective": value} for place, value in enumerate(objectives)]
    made = {"trial": f"t{number}", "status": status, "error": None, "values": {"k": number}, "reports": reports}
    return {**made, "objective": objective, "seconds": 2.5, "latency_ms": None, "memory_mb": None, **more}


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


# ---- options --------------------------------------------------------------------------------------------------------


def test_columns_tell_numbers_from_levels_and_leave_out_what_never_varies() -> None:
    rows = [
        {"n": 1, "none": None, "mixed": 2, "list": [1, 2], "flag": True, "same": [1], "late": 5},
        {"n": 10, "none": 0.5, "mixed": "auto", "list": [1], "flag": False, "same": [1]},
        {"n": 100, "none": 0.5, "mixed": 10, "list": [1, 2], "flag": True, "same": [1], "late": 5},
    ]
    columns = {column.option: column for column in columns_of(rows)}
    assert list(columns) == ["n", "none", "mixed", "list", "flag", "late"]
    assert columns["n"].numbers.tolist() == [1, 10, 100]
    assert columns["n"].log
    assert not columns["none"].log
    assert columns["mixed"].levels == ("2", "10", "auto")  # numbers by value, then words
    assert columns["list"].levels == ("[1, 2]", "[1]")
    assert columns["flag"].levels == ("false", "true")
    assert columns["late"].encoded().tolist() == [[5, 0], [5, 1], [5, 0]]
    assert columns["mixed"].encoded().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_an_axis_is_logarithmic_where_positive_values_span_more_than_thirty() -> None:
    def log(values: Any) -> bool:
        return columns_of([{"x": float(value)} for value in values])[0].log

    assert log([1, 31])
    assert log(10 ** np.random.default_rng(0).uniform(-4, -1, 4000))
    assert not log([1, 30])
    assert not log([0, 100])
    assert not log([-1, 100])
    # of many even draws some come near 0, which makes them no logarithmic choice
    assert not log(np.random.default_rng(0).uniform(0, 1, 4000))


def test_short_names_are_the_last_parts_that_tell_options_apart() -> None:
    found = short_names(["method.bank.k", "method.index.k", "k2", "a.size", "size"])
    assert found == {"method.bank.k": "bank.k", "method.index.k": "index.k", "k2": "k2", "a.size": "a.size"} | {
        "size": "size"
    }


# ---- what the numbers say -------------------------------------------------------------------------------------------


def test_importance_finds_what_matters_and_gives_noise_about_nothing() -> None:
    generator = np.random.default_rng(0)
    values, objective = [], []
    for _ in range(300):
        row = {
            "rate": float(10 ** generator.uniform(-5, -1)),
            "layers": LAYERS[generator.integers(3)],
            "noise": float(generator.random()),
            "noisy_list": LAYERS[generator.integers(3)],
            "noisy_many": str(generator.integers(60)),
            "fixed": "x",
        }
        values.append(row)
        objective.append(math.log10(row["rate"]) + 4 * (row["layers"] == LAYERS[1]))
    rows = importance(values, objective)
    assert [row["option"] for row in rows[:2]] == ["layers", "rate"]
    assert {row["option"] for row in rows} == {"rate", "layers", "noise", "noisy_list", "noisy_many"}
    found = {row["option"]: row["importance"] for row in rows}
    assert found["rate"] > 0.3
    assert found["layers"] > 0.5
    assert all(abs(found[name]) < 0.02 for name in ("noise", "noisy_list", "noisy_many"))
    assert all(row["sd"] >= 0 for row in rows)
    assert importance(values, objective) == rows
    assert importance(values, objective, seed=1) != rows


def test_importance_of_the_only_option_is_twice_the_variance() -> None:
    """Shuffled values are independent of the objective: E(y − y')² = 2 Var(y)."""
    values = [{"x": number % 2, "noise": number % 7} for number in range(400)]
    rows = importance(values, [float(row["x"]) for row in values])
    assert rows[0]["option"] == "x"
    assert rows[0]["importance"] == pytest.approx(2, abs=0.1)
    assert rows[1]["importance"] == pytest.approx(0, abs=1e-12)


def test_importance_holds_out_whole_trials() -> None:
    """Trials differ by luck; an option that each trial has a value of its own of must not pass for the reason."""
    generator = np.random.default_rng(0)
    luck, rates = generator.normal(size=40), generator.random(40)
    rows = [
        {"trial": f"t{t}", "values": {"rate": rates[t], "k": k}, "objective": luck[t] + 0.08 * k}
        for t in range(40)
        for k in range(20)
    ]
    values, objective = [row["values"] for row in rows], [row["objective"] for row in rows]
    plain = {row["option"]: row["importance"] for row in importance(values, objective)}
    grouped = importance(values, objective, groups=[row["trial"] for row in rows])
    held = {row["option"]: row["importance"] for row in grouped}
    assert plain["rate"] > 1
    assert held["rate"] < 0.1
    assert held["k"] > 0.2
    single = importance(values, objective, groups=["t0"] * len(rows))
    assert {row["option"]: row["importance"] for row in single}["rate"] > 1  # no trial to hold out


def test_importance_says_nothing_of_few_settings_or_one_objective() -> None:
    values = [{"x": number} for number in range(8)]
    objective = [float(number) for number in range(8)]
    assert importance(values[:7], objective[:7]) == []
    assert importance(values, [*objective[:7], math.nan]) == []
    assert importance(values, [*objective[:7], None]) == []
    assert importance(values, [0.5] * 8) == []
    assert importance([{"x": 1}] * 8, objective) == []
    assert importance([], []) == []
    assert [row["option"] for row in importance(values, objective)] == ["x"]


def test_importance_of_five_thousand_settings_is_quick() -> None:
    settings = many_settings(5000)
    start = time.process_time()
    rows = importance([row["values"] for row in settings], [row["objective"] for row in settings])
    assert time.process_time() - start < 20  # some 2 s on a core
    assert {row["option"] for row in rows[:2]} == {"optimiser.rate", "pooling"}
    assert all(abs(row["importance"]) < 0.01 for row in rows[2:])


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.tuples(
            st.lists(
                st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf, math.nan]), min_size=k, max_size=k), max_size=12
            ),
            st.lists(st.booleans(), min_size=k, max_size=k),
        )
    )
)
def test_the_front_is_that_of_comparing_all_pairs(case: tuple[list[list[float]], list[bool]]) -> None:
    rows, larger = case

    def beats(first: list[float], second: list[float]) -> bool:
        pairs = [(a, b) if up else (-a, -b) for a, b, up in zip(first, second, larger, strict=True)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    valid = [not any(map(math.isnan, row)) for row in rows]
    expected = [
        valid[n] and not any(beats(other, row) for m, other in enumerate(rows) if valid[m])
        for n, row in enumerate(rows)
    ]
    assert pareto_front(np.array(rows, np.float64).reshape(len(rows), len(larger)), larger).tolist() == expected


def test_the_front_keeps_ties_and_never_holds_nan() -> None:
    values = [[0.9, 10], [0.9, 10], [0.95, 20], [0.94, 20], [math.nan, 1], [0.8, 10]]
    assert pareto_front(values, (True, False)).tolist() == [True, True, True, False, False, False]
    with pytest.raises(ValueError, match=r"shape \(6, 2\) do not fit 1 directions"):
        pareto_front(values, (True,))


def test_rank_correlation_is_that_of_scipy() -> None:
    generator = np.random.default_rng(0)
    validation_set = generator.integers(0, 12, 40).astype(float)  # with ties
    test = validation_set + generator.normal(0, 3, 40).round()
    found = rank_correlation([*validation_set, math.nan, 1.0], [*test, 0.5, math.nan])
    assert found["n"] == 40
    assert found["spearman"] == pytest.approx(stats.spearmanr(validation_set, test).statistic, abs=1e-12)
    assert found["kendall"] == pytest.approx(stats.kendalltau(validation_set, test, variant="b").statistic, abs=1e-12)
    resample = np.random.default_rng(0)
    again = [
        stats.spearmanr(validation_set[drawn], test[drawn]).statistic for drawn in resample.integers(0, 40, (1000, 40))
    ]
    assert found["spearman_interval"] == pytest.approx(np.quantile(again, (0.025, 0.975)).tolist(), abs=1e-12)
    assert found == rank_correlation([*validation_set, math.nan, 1.0], [*test, 0.5, math.nan])


def test_rank_correlation_by_hand() -> None:
    """Five pairs with one swap of neighbours: ρ = 1 − 6·2 / (5·24), τ = (9 − 1) / 10."""
    found = rank_correlation([1, 2, 3, 4, 5], [10, 20, 40, 30, 50])
    assert found["spearman"] == pytest.approx(0.9)
    assert found["kendall"] == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [2, 4, 9]) == {
        "n": 3,
        "spearman": pytest.approx(1),
        "kendall": pytest.approx(1),
        "spearman_interval": None,
    }
    low, high = rank_correlation([1, 1, 1, 2], [4, 3, 2, 1])["spearman_interval"]  # most resamples are constant
    assert -1 - 1e-9 <= low <= high <= 1


@pytest.mark.parametrize("pairs", [([], []), ([1], [2]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([None, 2], [1, 3])])
def test_rank_correlation_is_none_where_undefined(pairs: tuple[Any, Any]) -> None:
    found = rank_correlation(*pairs)
    assert (found["spearman"], found["kendall"], found["spearman_interval"]) == (None, None, None)


def test_gain_by_category() -> None:
    settings = [
        setting(0, {"k": 1}, None, by_category={"bolt": 0.9, "nut": 0.7}),  # mean 0.8
        setting(1, {"k": 2}, None, by_category={"bolt": 0.8, "nut": 0.85}),  # mean 0.825: the common one
        setting(2, {"k": 3}, None, by_category={"bolt": 0.99}),  # not the common one, as it lacks nuts
        setting(3, {"k": 4}, None, by_category={"bolt": None, "nut": 0.95}),
    ]
    bolt, nut, mean = category_gain(settings)
    assert bolt == {
        "category": "bolt",
        "common": 0.8,
        "own": 0.99,
        "gain": pytest.approx(0.19),
        "trial": "trial-0002",
        "values": {"k": 3},
    }
    assert (nut["common"], nut["own"], nut["values"]) == (0.85, 0.95, {"k": 4})
    assert mean["category"] == "mean"
    assert [mean[key] for key in ("common", "own", "gain")] == pytest.approx([0.825, 0.97, 0.145])
    assert mean["values"] == {"k": 2}


def test_no_gain_without_a_common_setting() -> None:
    assert category_gain([]) == []
    assert category_gain([setting(0, {}, 0.5)]) == []
    apart = [setting(0, {}, None, by_category={"bolt": 0.9}), setting(1, {}, None, by_category={"nut": 0.9})]
    assert category_gain(apart) == []


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_rows_are_flat_and_fit_csv() -> None:
    trials = [
        trial(0, "stopped", [0.4, 0.5], 0.5, values={"a.b": [1, "x"], "c": None, "d": True, "e": "text", "f": 2}),
        trial(1, "failed", [], None, values={"f": 0.25}, error="no memory", latency_ms=3.5),
    ]
    lines = list(csv.DictReader(io.StringIO(files.csv_bytes(trial_rows(trials)).decode())))
    first = {"trial": "t0", "status": "stopped", "progress": "20", "objective": "0.5", "seconds": "2.5"}
    assert lines[0] == {
        **first,
        **{"latency_ms": "", "memory_mb": "", "error": ""},
        **{"a.b": '[1, "x"]', "c": "null", "d": "true", "e": "text", "f": "2"},
    }
    # what a trial has no option of is empty
    assert {lines[1][key] for key in ("a.b", "c", "d", "e", "progress", "objective")} == {""}
    assert (lines[1]["f"], lines[1]["error"], lines[1]["latency_ms"]) == ("0.25", "no memory", "3.5")

    rows = setting_rows([setting(3, {"k": 5, "flag": False}, 0.75, by_category={"nut": 0.7})])
    assert rows == [
        {
            "trial": "trial-0003",
            "objective": 0.75,
            "k": 5,
            "flag": "false",
            "image_auroc": 0.75,
            "nut/objective": 0.7,
        }
    ]


# ---- figures --------------------------------------------------------------------------------------------------------


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
    for colour in figures._RISING(np.linspace(0, 1, 9)):
        for other in (GREY, ORANGE):
            assert np.abs(np.asarray(colour[:3]) - to_rgba(other)[:3]).sum() > 0.25


# ---- forms ----------------------------------------------------------------------------------------------------------


def content(**changes: Any) -> dict[str, Any]:
    settings = [setting(n, {"method.k": n, "layers": ["a", "b"]}, 0.9 - n / 100) for n in range(7)]
    made = {
        "method": "patchcore",
        "search": "random",
        "objective": {"metrics": {"image_auroc": 1.0}, "validation": "120 held-out normals and 60 synthetic anomalies"},
        "counts": {"trials": 12, "done": 7, "stopped": 1, "failed": 2, "crashed": 1, "settings": 70},
        "seconds": 3725.0,
        "best": {**settings[0], "confirmed": 0.8875},
        "top": settings,
        "default": setting(99, {"method.k": 9}, 0.8, trial="default"),
        "importance": [{"option": "method.k", "importance": 1.25, "sd": 0.0625}],
        "front": ["trial-0000"],
        "category_gain": category_gain([setting(0, {}, 0.5, by_category={"bolt": 0.9, "nut": 0.8})]),
        "errors": [{"trial": f"trial-{n}", "error": "[red]no memory"} for n in range(7)],
    }
    return json.loads(json.dumps({**made, **changes}))


def test_a_report_reads_the_section(tmp_path: Path) -> None:
    (tmp_path / "importance.png").write_bytes(visual.png(importance_figure(content()["importance"])))
    made = section("Tuning", content(), {"importance.png": "Which options matter"})
    files.write_json(tmp_path / "section.json", made)
    read = read_section(str(tmp_path))
    assert read.title == "Tuning"
    assert [title for title, _ in read.figures] == ["Which options matter"]
    tables = {title: (columns, rows) for title, columns, rows in read.tables}
    columns, rows = tables["Best settings"]
    assert columns == ["", "default", "best", "2", "3", "4", "5"]
    found = {row[0]: row[1:] for row in rows}
    assert found["trial"] == ["default", *(f"trial-{n:04d}" for n in range(5))]  # the best one once
    assert found["objective"] == ["0.8000", "0.9000", "0.8900", "0.8800", "0.8700", "0.8600"]
    assert found["confirmed"] == ["", "0.8875", "", "", "", ""]
    assert found["layers"] == ["–", *["[a, b]"] * 5]
    assert tables["Importance of the options"][1] == [["method.k", "1.250", "0.062"]]
    assert tables["Gain of a setting for each category"][1][-1] == ["mean", "0.8500", "0.8500", "+0.0000", ""]
    assert len(tables["Trials without a result"][1]) == 7
    assert read.text[0] == (
        "70 settings of patchcore in 12 trials (random), 1 h 2 min. Objective: image_auroc on 120 held-out normals and "
        "60 synthetic anomalies."
    )
    assert "1 trial not run; the same command continues." in read.text


def test_a_section_of_nothing_holds_no_tables() -> None:
    counts = {"trials": 2, "done": 0, "stopped": 0, "failed": 0, "crashed": 0, "settings": 0}
    weights = {"metrics": {"image_auroc": 1.0, "aupro": 0.5}, "validation": "images"}
    empty = content(
        best=None,
        top=[],
        default=None,
        importance=[],
        category_gain=[],
        errors=[],
        counts=counts,
        objective=weights,
        search={"algorithm": "asha", "seed": 0},
        seconds=75.2,
    )
    made = section("Tuning", empty, {})
    assert made["tables"] == []
    assert made["text"] == [
        "0 settings of patchcore in 2 trials (algorithm asha, seed 0), 1 min 15 s. Objective: 1 · image_auroc + "
        "0.5 · aupro on images.",
        "2 trials not run; the same command continues.",
        "No setting was measured, so there is no best one.",
    ]
    print_campaign(empty)


def test_print_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    print_campaign(content())
    text = capsys.readouterr().out
    assert "best settings" in text
    assert "trial-0004" in text
    assert "trial-0005" not in text
    assert text.count("[a, b]") == 5  # which the terminal's markup would swallow
    assert ["12", "7", "1", "2", "1", "70", "1", "h", "2", "min"] in [line.split() for line in text.splitlines()]
    assert "note: 2 trials failed" in text
    assert "  trial-4: [red]no memory" in text
    assert "  and 2 more" in text


def test_a_campaign_without_top_prints_its_best(capsys: pytest.CaptureFixture[str]) -> None:
    told = content(best={**content()["best"], "confirmed": {"objective": 0.7777}})
    del told["top"]
    print_campaign(told)
    text = capsys.readouterr().out
    assert "trial-0000" in text
    assert "0.7777" in text

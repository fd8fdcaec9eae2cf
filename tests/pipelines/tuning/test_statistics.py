"""What the settings of a campaign say, in numbers, against other implementations."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.tuning.category_gain import category_gain
from pipelines.tuning.importance import importance
from pipelines.tuning.option_columns import columns_of
from pipelines.tuning.pareto import pareto_front
from pipelines.tuning.rank_correlation import rank_correlation
from pipelines.tuning.wording import short_names
from tests.pipelines.tuning.made import LAYERS, many_settings, setting


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Warnings of NumPy and Matplotlib are faults here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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

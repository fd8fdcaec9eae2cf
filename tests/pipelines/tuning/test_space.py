"""What is tried: spaces against the configs they belong to, and drawn values against formulas."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.tuning.default_spaces import SPACES
from pipelines.tuning.dimensions import Choice, Dimension, Halves, Range
from pipelines.tuning.space import (
    draw,
    grid,
    grid_size,
    key_of,
    read_value,
    settings_of,
    space_of,
    split_space,
    with_values,
)
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.calibration import CalibrationConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.revdist import RevDistConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.configs.uninet import UniNetConfig
from unianom.errors import OptionError
from unianom.methods import METHODS

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use, too."""

POSTPROCESS = {
    "uninet": ["alpha", "beta", "score_blur"],
    "onenip": ["alpha", "score_pool"],
    "unias": ["levels", "fuse_at", "level_blur", "reduce"],
    "uniad": ["map_form", "reduce", "score_pool"],
    "revdist": ["map.fuse", "map.blur", "map.score_share"],
    "recontrast": ["map.fuse", "map.blur", "map.score_share"],
    "uniformaly": ["k_ratio", "neighbours", "blur_sigma"],
    "patchcore": ["neighbours", "reweight", "reweight_neighbours", "blur_sigma"],
}
"""Of every default space the options that no training is needed for, in order."""


def default_config(name: str) -> Any:
    return CalibrationConfig() if name == "cada" else METHODS[name].Config()


def domains(space: tuple[Dimension, ...]) -> dict[str, Any]:
    return {dimension.name: dimension.domain for dimension in space}


# ---- the default spaces ---------------------------------------------------------------------------------------------


def test_every_method_and_calibration_have_a_space() -> None:
    assert set(SPACES) == {*METHODS, "cada"}


@pytest.mark.parametrize("name", SPACES)
def test_a_default_space_fits_the_default_options(name: str) -> None:
    space = space_of(name, default_config(name), {})
    for found, default in zip(space, SPACES[name], strict=True):
        assert (found.name, found.why) == (default.name, default.why)
        assert found == default or isinstance(default.domain, Halves)
    names = [dimension.name for dimension in space]
    assert len(set(names)) == len(names)
    for dimension in space:
        assert dimension.why
        for value in dimension.domain.grid():
            changed = with_values(default_config(name), {dimension.name: value})
            assert read_value(changed, dimension.name) == value


@pytest.mark.parametrize("name", POSTPROCESS)
def test_what_is_read_and_what_is_trained_for(name: str) -> None:
    trial, postprocess = split_space(SPACES[name], METHODS[name].postprocess_options)
    assert [dimension.name for dimension in postprocess] == POSTPROCESS[name]
    assert set(trial) | set(postprocess) == set(SPACES[name])
    assert not set(trial) & set(postprocess)
    assert trial, "without one there would be a single trial"


@pytest.mark.parametrize("name", SPACES)
def test_the_default_options_lie_in_or_near_the_space(name: str) -> None:
    """Nobody should be surprised that the published setting is far outside of what is tried by default."""
    config = default_config(name)
    for dimension in space_of(name, config, {}):
        value, domain = read_value(config, dimension.name), dimension.domain
        if isinstance(domain, Range):
            assert domain.low <= value <= domain.high
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers = [number for number in domain.values if number is not None]
            assert min(numbers) <= value <= max(numbers), dimension.name
        else:
            assert value in domain.values, dimension.name


# ---- changed by the user --------------------------------------------------------------------------------------------


def test_lists_ranges_single_values_and_nulls() -> None:
    changes = {
        "temperature": [0.5, 1.5],
        "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "steps": 3},
        "training_sizes": [[256], [256, 288], [256]],
        "margin": 1.0,
        "balance": None,
        "training.iterations": {"low": 100, "high": 300, "integer": True, "steps": 2},
    }
    config = UniNetConfig()
    space = space_of("uninet", config, changes)
    assert [dimension.name for dimension in space] == [
        "training.learning_rate",
        "training.encoder_learning_rate",
        "temperature",
        "margin",
        "alpha",
        "beta",
        "score_blur",
        "training_sizes",
        "training.iterations",
    ]
    own = domains(space)
    assert own["temperature"] == Choice((0.5, 1.5))
    assert own["training.learning_rate"] == Range(1e-4, 1e-2, log=True, steps=3)
    assert own["training_sizes"] == Choice(((256,), (256, 288))), "what is named twice is tried once"
    assert own["margin"] == Choice((1.0,))
    assert own["training.iterations"] == Range(100, 300, integer=True, steps=2)
    whys = {dimension.name: dimension.why for dimension in space}
    assert whys["temperature"] == {dimension.name: dimension.why for dimension in SPACES["uninet"]}["temperature"]
    assert config == UniNetConfig(), "the config itself stays as it is"


def test_null_for_an_option_that_is_not_in_the_space_changes_nothing() -> None:
    config = UniFormalyConfig()
    assert space_of("uniformaly", config, {"mask": None}) == space_of("uniformaly", config, {})


def test_layers_are_those_given_and_their_halves() -> None:
    def tried(blocks: tuple[int, ...]) -> list[Any]:
        return domains(space_of("uniformaly", UniFormalyConfig(blocks=blocks), {}))["blocks"].grid()

    assert tried((2, 3, 4, 5, 6, 7, 8, 9)) == [(2, 3, 4, 5, 6, 7, 8, 9), (2, 3, 4, 5), (6, 7, 8, 9)]
    assert tried((1, 4, 5)) == [(1, 4, 5), (1, 4), (5,)]
    assert tried((7,)) == [(7,)]


def test_groups_of_options_are_one_value() -> None:
    groups = [{"name": "resnet18.tv_in1k"}, {"name": "resnet10t", "weights": "random"}]
    space = space_of("patchcore", PatchCoreConfig(), {"backbone": groups, "bank.coreset_ratio": None})
    (backbone,) = [dimension for dimension in space if dimension.name == "backbone"]
    assert backbone.domain.grid() == groups
    assert len({key_of({"backbone": group}) for group in backbone.domain.grid()}) == 2
    assert sorted(map(key_of, draw([backbone], 9, 0))) == sorted(key_of({"backbone": group}) for group in groups)
    config = with_values(PatchCoreConfig(), {"backbone": backbone.domain.grid()[1], "patch_size": 1})
    assert config.backbone == BackboneConfig("resnet10t", weights="random")
    assert (config.patch_size, config.bank) == (1, BankConfig())


def test_one_group_alone_is_fixed() -> None:
    changes = {"bank": {"index": "ivf_flat", "nprobe": 4}}
    space = space_of("uniformaly", UniFormalyConfig(), changes)
    assert domains(space)["bank"].grid() == [{"index": "ivf_flat", "nprobe": 4}]


def test_an_option_of_a_group_and_the_rest_of_the_group() -> None:
    """The group must not take back what is said of its option."""
    space = space_of("uniformaly", UniFormalyConfig(), {"bank": [{"index": "flat"}, {"index": "ivf_flat"}]})
    for values in draw(space, 20, 0):
        bank = with_values(UniFormalyConfig(), values).bank
        assert (bank.coreset_ratio, bank.index) == (values["bank.coreset_ratio"], values["bank"]["index"])
    with pytest.raises(OptionError, match=r"space\.bank: bank\.coreset_ratio is searched alone, too"):
        space_of("uniformaly", UniFormalyConfig(), {"bank": [{"coreset_ratio": 0.2}, {"coreset_ratio": 0.3}]})
    alone = {"bank": [{"coreset_ratio": 0.2}, {"coreset_ratio": 0.3}], "bank.coreset_ratio": None}
    assert "bank" in domains(space_of("uniformaly", UniFormalyConfig(), alone))


def test_whole_numbers_for_an_option_with_fractions_are_what_the_default_is() -> None:
    """Else the options as given would be tried twice, as 1.0 and as 1."""
    space = space_of("uninet", UniNetConfig(), {"margin": [1, 2], "temperature": 2})
    default = read_value(UniNetConfig(), "margin")
    keys = [key_of({"margin": value}) for value in domains(space)["margin"].values]
    assert keys[0] == key_of({"margin": default})
    assert domains(space)["temperature"].values == (2.0,)
    assert isinstance(domains(space)["temperature"].values[0], float)
    whole = domains(space_of("uniformaly", UniFormalyConfig(), {"neighbours": [1, 2]}))["neighbours"].values
    assert [type(value) for value in whole] == [int, int]
    flags = domains(space_of("patchcore", PatchCoreConfig(), {"reweight": [True, False]}))["reweight"].values
    assert [type(value) for value in flags] == [bool, bool]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temprature": [1.0]}, "no option 'temprature'; did you mean 'temperature'"),
        ({"training.learningrate": [1.0]}, r"did you mean 'training\.learning_rate'"),
        ({"training.learning_rate.x": [1.0]}, r"no option 'training\.learning_rate\.x'"),
        ({"qqqqqqqq": [1.0]}, "no option 'qqqqqqqq'$"),
        ({"qqqqqqqq": None}, "no option 'qqqqqqqq'$"),
        ({"temperature": []}, r"space\.temperature: an empty list"),
        ({"temperature": [1.0, "hot"]}, r"space\.temperature: temperature='hot'"),
        ({"temperature": [1.0, 0.0]}, r"space\.temperature: temperature=0\.0"),
        ({"balance": {"low": 0.5, "high": 1.5}}, r"space\.balance: balance=1\.25"),
        ({"balance": {"low": 0.5}}, r"space\.balance: balance=\{'low': 0\.5\}"),
        ({"balance": {"low": 0.5, "high": 0.9, "stepps": 3}}, r"space\.balance: a range has .* not stepps"),
        ({"balance": {"low": 0.9, "high": 0.5}}, r"space\.balance: a range needs low < high"),
        ({"balance": {"low": "a", "high": 0.5}}, r"space\.balance: "),
        ({"balance": {"low": 0.1, "high": 0.5, "steps": 1}}, r"space\.balance: .*steps >= 2"),
        ({"balance": {"low": 0.1, "high": 0.5, "steps": 2.5}}, r"space\.balance: .*steps >= 2"),
        ({"balance": {"low": 0.0, "high": 0.5, "log": True}}, r"space\.balance: a logarithmic range must be above"),
        ({"balance": {"low": 0.1, "high": 3, "integer": True}}, r"space\.balance: .*whole limits"),
        ({"backbone": [{"nam": "resnet18"}]}, r"space\.backbone: .*no option 'nam'; did you mean 'name'"),
        ({"preset": ["paper", "reference"]}, r"space\.preset: .*--method\.preset"),
    ],
)
def test_what_a_method_does_not_have_or_take_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        space_of("uninet", UniNetConfig(), changes)


@pytest.mark.parametrize("low", [float("nan"), float("-inf")])
def test_a_range_must_be_finite(low: float) -> None:
    with pytest.raises(OptionError, match="low < high"):
        Range(low, 1.0)


# ---- values ---------------------------------------------------------------------------------------------------------


@PATIENT
@given(
    low=st.floats(1e-8, 1e3),
    factor=st.floats(1.01, 1e6),
    log=st.booleans(),
    integer=st.booleans(),
    seed=st.integers(0, 99),
)
def test_samples_and_grids_stay_inside(low: float, factor: float, log: bool, integer: bool, seed: int) -> None:
    high = low * factor
    if integer:
        low, high = float(round(low) + 1), float(round(high) + 3)
    domain = Range(low, high, log, integer, steps=4)
    rng = np.random.default_rng(seed)
    values = [*domain.grid(), *(domain.sample(rng) for _ in range(20))]
    assert all(low <= value <= high for value in values)
    assert [domain.grid()[0], domain.grid()[-1]] == pytest.approx([low, high], rel=1e-3)
    assert domain.grid() == sorted(set(domain.grid()))
    if integer:
        assert all(isinstance(value, int) for value in values)


@pytest.mark.parametrize("log", [False, True])
def test_samples_are_even_in_the_value_or_its_logarithm(log: bool) -> None:
    domain, rng = Range(1e-3, 10.0, log), np.random.default_rng(0)
    values = np.array([domain.sample(rng) for _ in range(4000)])
    expected = stats.loguniform(1e-3, 10.0) if log else stats.uniform(1e-3, 10.0 - 1e-3)
    assert stats.kstest(values, expected.cdf).pvalue > 0.01
    # the same by hand: of a logarithmic range the quarter lies a decade above its beginning
    quarter = 1e-3 * 10 if log else 1e-3 + (10 - 1e-3) / 4
    assert (values < quarter).mean() == pytest.approx(0.25, abs=0.02)
    assert all(float(f"{value:.4g}") == value for value in values), "a recipe can be read"


def test_grids_by_hand() -> None:
    assert Range(0.0, 1.0).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Range(1e-4, 1.0, log=True, steps=5).grid() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert Range(1, 3, integer=True, steps=5).grid() == [1, 2, 3]
    assert Range(1, 100, log=True, integer=True, steps=3).grid() == [1, 10, 100]
    assert Range(0.1, 0.9, steps=2).grid() == [0.1, 0.9]
    assert Range(0.0, 1.0, steps=4).grid() == [0.0, 0.3333, 0.6667, 1.0]
    assert Choice((3, None, (1, 2))).grid() == [3, None, (1, 2)]


def test_every_choice_is_drawn_as_often() -> None:
    domain, rng = Choice(("a", "b", "c", "d")), np.random.default_rng(1)
    drawn = [domain.sample(rng) for _ in range(2000)]
    assert stats.chisquare([drawn.count(value) for value in domain.values]).pvalue > 0.01


TWO = (Dimension("a", Choice((1, 2, 3))), Dimension("b.c", Choice(((1, 2), (3,)))))
OPEN = (*TWO, Dimension("rate", Range(1e-5, 1e-1, log=True)))


def test_a_grid_has_all_combinations_the_last_option_fastest() -> None:
    made = list(grid(TWO))
    expected = itertools.product((1, 2, 3), ((1, 2), (3,)))
    assert made == [{"a": a, "b.c": c} for a, c in expected]
    assert grid_size(TWO) == len(made) == 6
    assert grid_size(OPEN) == 6 * 5 == len(list(grid(OPEN)))
    assert list(grid(())) == [{}]


def test_drawn_settings_differ_and_a_seed_names_them() -> None:
    drawn = draw(OPEN, 50, 3)
    assert len({key_of(values) for values in drawn}) == 50
    assert draw(OPEN, 50, 3) == drawn
    assert draw(OPEN, 50, 4) != drawn
    assert all(list(values) == ["a", "b.c", "rate"] for values in drawn)


@PATIENT
@given(seed=st.integers(0, 1000), fewer=st.integers(0, 8), more=st.integers(8, 12))
def test_fewer_draws_are_the_first_of_more(seed: int, fewer: int, more: int) -> None:
    for space in (TWO, OPEN):
        assert draw(space, fewer, seed) == draw(space, more, seed)[:fewer]


def test_a_finite_space_is_drawn_to_its_end() -> None:
    drawn = draw(TWO, 100, 0)
    assert sorted(map(key_of, drawn)) == sorted(map(key_of, grid(TWO)))
    assert draw((), 4, 0) == [{}]


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Range(1, 4, integer=True), [1, 2, 3, 4]),
        (Range(1.0, 1.003), [1.0, 1.001, 1.002, 1.003]),  # four digits
    ],
)
def test_a_range_of_few_values_is_drawn_to_its_end(domain: Range, values: list[float]) -> None:
    drawn = draw([Dimension("n", domain)], 24, 0)
    assert sorted(value["n"] for value in drawn) == values


def test_settings_are_the_whole_grid_where_it_is_no_larger() -> None:
    assert settings_of(TWO, 6, 0) == list(grid(TWO))
    assert settings_of(TWO, 5, 1) == draw(TWO, 5, 1)
    assert settings_of((), 10, 0) == [{}]
    ranged = (Dimension("blur_sigma", Range(1.0, 9.0)), TWO[0])
    found = settings_of(ranged, 200, 0)
    assert found == draw(ranged, 200, 0)
    assert len({values["blur_sigma"] for values in found}) > 100, "a range is more than the steps of its grid"


# ---- configs --------------------------------------------------------------------------------------------------------


def test_values_reach_nested_options_and_nothing_else() -> None:
    config = RevDistConfig(backbone=BackboneConfig("resnet18", weights="random"))
    values = {"map.fuse": "mean", "training.learning_rate": 0.25, "map.score_share": 0.03}
    changed = with_values(config, values)
    expected = dataclasses.replace(
        config,
        map=dataclasses.replace(config.map, fuse="mean", score_share=0.03),
        training=dataclasses.replace(config.training, learning_rate=0.25),
    )
    assert changed == expected
    assert with_values(config, {}) == config
    for name, value in values.items():
        assert read_value(changed, name) == value


def test_values_a_config_refuses_are_told() -> None:
    with pytest.raises(OptionError, match=r"^k_ratio=2\.0 must be in"):
        with_values(UniFormalyConfig(), {"k_ratio": 2.0})
    with pytest.raises(OptionError, match=r"^space\.k_ratio: k_ratio=2\.0 must be in"):
        with_values(UniFormalyConfig(), {"k_ratio": 2.0}, alone=True)
    with pytest.raises(OptionError, match="no option 'k_ration'"):
        with_values(UniFormalyConfig(), {"k_ration": 0.5})


def test_values_are_read_as_they_are_written() -> None:
    config = UniFormalyConfig(blocks=(0, 1))
    assert read_value(config, "blocks") == (0, 1)
    assert read_value(config, "bank.coreset_ratio") == config.bank.coreset_ratio
    assert read_value(config, "bank") == dataclasses.asdict(config.bank)


leaf = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=3)
plain = leaf | st.lists(leaf | st.lists(leaf, max_size=2), max_size=3) | st.dictionaries(st.text(max_size=3), leaf)


def as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_tuples(inner) for key, inner in reversed(value.items())}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@PATIENT
@given(st.dictionaries(st.text(max_size=3), plain, max_size=4))
def test_keys_are_the_same_for_lists_and_tuples_in_any_order(values: dict[str, Any]) -> None:
    assert key_of(values) == key_of(as_tuples(values))


def test_keys_tell_values_apart() -> None:
    values: list[dict[str, Any]] = [{}, {"a": None}, {"a": 1}, {"a": "1"}, {"a": [1]}, {"a": True}, {"b": 1}]
    assert len({key_of(value) for value in values}) == len(values)
    assert key_of({"b": (1, 2), "a": "ü"}) == '{"a": "ü", "b": [1, 2]}'

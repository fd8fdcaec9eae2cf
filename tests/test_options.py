import dataclasses
import math
import pickle
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from annotated_types import Interval

from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.methods import METHODS
from unianom.options import (
    AtLeastOne,
    AtLeastZero,
    NotNegative,
    Odd,
    OpenShare,
    Options,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    ValueRefused,
    flatten,
    from_plain,
    to_plain,
    with_values,
)


@dataclass(frozen=True)
class Inner:
    size: int = 3
    mean: tuple[float, float, float] | None = None

    def __post_init__(self):
        if self.size < 1:
            raise OptionError(f"size={self.size} must be positive")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    spare: Inner | None = None
    names: tuple[str, ...] = ()
    extra: dict[str, object] = field(default_factory=dict)


FULL = Outer("x", Inner(5, (0.1, 0.2, 0.3)), Inner(7), ("a", "b"), {"k": [1, {"l": (2,)}]})


def test_plain_data_by_hand():
    assert to_plain(FULL) == {
        "name": "x",
        "inner": {"size": 5, "mean": [0.1, 0.2, 0.3]},
        "spare": {"size": 7, "mean": None},
        "names": ["a", "b"],
        "extra": {"k": [1, {"l": [2]}]},
    }
    assert to_plain([Inner(2), None, "a"]) == [{"size": 2, "mean": None}, None, "a"]


@pytest.mark.parametrize("options", [FULL, Outer("y"), Outer("z", spare=Inner(2))])
def test_there_and_back(options):
    plain = to_plain(options)
    again = from_plain(Outer, yaml.safe_load(yaml.safe_dump(plain)))
    assert to_plain(again) == plain
    assert again.inner == options.inner
    assert again.spare == options.spare
    assert again.names == options.names


def test_what_is_left_out_takes_its_default():
    assert from_plain(Outer, {"name": "y", "inner": {"size": 4}}) == Outer("y", Inner(4))


@pytest.mark.parametrize("cls", [InputPolicy, *(method.Config for method in METHODS.values())])
def test_the_projects_own_options_there_and_back(cls):
    options = cls()
    assert from_plain(cls, to_plain(options)) == options


def test_unknown_options_name_the_nearest_known_one():
    with pytest.raises(OptionError, match=r"Outer has no option 'nmae'; did you mean 'name'\?"):
        from_plain(Outer, {"nmae": "x"})
    with pytest.raises(OptionError, match=r"Inner has no option 'sise'; did you mean 'size'\?"):
        from_plain(Outer, {"name": "x", "spare": {"sise": 2}})
    with pytest.raises(OptionError, match=r"Outer has no option 'qqq'$"):
        from_plain(Outer, {"name": "x", "qqq": 1})


def test_a_missing_option_is_named():
    with pytest.raises(OptionError, match="Outer needs the option 'name'"):
        from_plain(Outer, {"inner": {}})


def test_the_options_own_checks_run_again():
    with pytest.raises(OptionError, match="size=0"):
        from_plain(Outer, {"name": "x", "inner": {"size": 0}})


def test_flatten():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "f": {}, "g": None}
    assert flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": [3], "f": {}, "g": None}
    assert flatten(to_plain(FULL))["inner.mean"] == [0.1, 0.2, 0.3]


# ---- what fields take ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Limits(Options):
    positive: Positive = 1.0
    not_negative: NotNegative = 1.0
    share: Share = 0.5
    open_share: OpenShare = 0.5
    positive_share: PositiveShare = 0.5
    share_below_one: ShareBelowOne = 0.5
    at_least_one: AtLeastOne = 1
    at_least_zero: AtLeastZero = 0
    odd: Odd = 1
    side: Annotated[int, Interval(ge=1, le=64)] = 8
    some: AtLeastOne | None = None
    kind: Literal["max", "mean"] = "max"
    shares: tuple[OpenShare, ...] = ()
    pair: tuple[ShareBelowOne, ShareBelowOne] = (0.5, 0.5)
    weights: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    text: str = ""


@pytest.mark.parametrize(
    ("name", "taken", "refused", "words"),
    [
        ("positive", [1e-9, 3, 1e30], [0, -1.0, True, "1", None], "positive"),
        ("not_negative", [0, 0.5], [-1e-9, None], "at least 0"),
        ("share", [0, 1, 0.3], [-0.1, 1.1], "in [0, 1]"),
        ("open_share", [1e-6, 0.999], [0, 1, 0.0, 1.0], "in (0, 1)"),
        ("positive_share", [1, 1e-6], [0, 1.01], "in (0, 1]"),
        ("share_below_one", [0, 0.999], [1, -0.1], "in [0, 1)"),
        ("at_least_one", [1, 7], [0, 1.0, True], "at least 1"),
        ("at_least_zero", [0], [-1, 0.0], "at least 0"),
        ("odd", [1, 3], [2, 0, -1], "odd and at least 1"),
        ("side", [1, 64], [0, 65], "a whole number in [1, 64]"),
        ("some", [None, 1], [0, "one"], "at least 1 or null"),
        ("kind", ["max", "mean"], ["min", None], "one of max, mean"),
        ("shares", [(), (0.1, 0.9)], [(0.1, 1.0), [0.1], 0.1], "a list, each in (0, 1)"),
        ("pair", [(0, 0.9)], [(0.1,), (0.1, 0.2, 0.3), (0.1, 1)], "a list of 2, each in [0, 1)"),
        ("weights", [{"a": 1, "b": 0.5}], [{"a": "1"}, {1: 1.0}, []], "values by name"),
        ("flag", [True, False], [1, 0, None], "true or false"),
        ("text", ["", "a"], [1, None], "text"),
    ],
)
def test_fields_take_what_they_say(name, taken, refused, words):
    for value in taken:
        assert getattr(Limits(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(OptionError) as caught:
            Limits(**{name: value})
        assert str(caught.value) == f"{name}={value!r} must be {words}"


@pytest.mark.parametrize("name", ["positive", "not_negative", "share", "open_share", "positive_share"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(name, value):
    with pytest.raises(OptionError, match=rf"^{name}="):
        Limits(**{name: value})


# ---- presets and options that others decide --------------------------------------------------------------------------
@dataclass(frozen=True)
class Tuned(Options):
    presets: ClassVar = {"paper": {}, "code": {"rate": 0.5, "kernel": 3}}
    derived = ("share",)

    preset: Literal["paper", "code"] = "paper"
    rate: Positive = 2.0
    kernel: Odd = 7
    mode: Literal["plain", "wide"] = "plain"
    share: Share = 0.1
    inner: Limits = field(default_factory=Limits)

    @classmethod
    def resolve(cls, given):
        values = super().resolve(given)
        values.setdefault("share", 0.9 if values.get("mode") == "wide" else 0.1)
        return values

    def check(self):
        if self.kernel > 5 and self.mode == "wide":
            raise ValueRefused(f"kernel={self.kernel} must be at most 5 with mode=wide")


@pytest.mark.parametrize(
    ("given", "rate", "kernel", "share"),
    [
        ({}, 2.0, 7, 0.1),
        ({"preset": "code"}, 0.5, 3, 0.1),
        ({"preset": "code", "rate": 2.0}, 2.0, 3, 0.1),
        ({"preset": "code", "rate": None, "kernel": 5}, 0.5, 5, 0.1),
        ({"preset": "code", "mode": "wide"}, 0.5, 3, 0.9),
        ({"preset": "code", "mode": "wide", "share": 0.2}, 0.5, 3, 0.2),
    ],
)
def test_a_preset_fills_in_what_is_left_out_or_null(given, rate, kernel, share):
    made = Tuned(**given)
    assert (made.rate, made.kernel, made.share) == (rate, kernel, share)
    assert from_plain(Tuned, to_plain(made)) == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_preset_may_be_given_by_position():
    assert Tuned("code") == Tuned(preset="code")
    with pytest.raises(TypeError):
        Tuned("code", preset="paper")


def test_other_values_of_a_made_instance_are_not_filled_in_again():
    """`replace` gives every option, so a preset has nothing left to say."""
    made = dataclasses.replace(Tuned(preset="code", rate=7.0), preset="paper")
    assert (made.rate, made.kernel) == (7.0, 3)


def test_an_unknown_preset_is_refused():
    with pytest.raises(OptionError, match=r"^preset='codes' must be one of paper, code$"):
        Tuned(preset="codes")


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(OptionError, match=r"^kernel=7 must be at most 5 with mode=wide$"):
        Tuned(mode="wide")
    assert Tuned(mode="wide", kernel=5).share == 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": {"share": 2}}, "inner.share=2 must be in [0, 1]"),
        ({"kernel": 2}, "kernel=2 must be odd and at least 1"),
    ],
)
def test_the_group_of_a_refused_value_is_named(change, words):
    with pytest.raises(OptionError) as caught:
        from_plain(Tuned, change)
    assert str(caught.value) == words
    with pytest.raises(OptionError) as caught:
        with_values(Tuned(), flatten(change))
    assert str(caught.value) == words

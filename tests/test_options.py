from dataclasses import dataclass, field

import pytest
import yaml

from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.methods import METHODS
from unianom.options import flatten, from_plain, to_plain


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

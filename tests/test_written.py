from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from unianom.errors import OptionError
from unianom.written import Argument, Unquoted, dump_yaml, natural, plain_options, read_yaml, typed, words

NUMBERS_AND_SUCH = [
    "0",
    "007",
    "1e3",
    "0x10",
    "1_000",
    "1:30",
    "2020-01-01",
    ".5",
    "NO",
    "on",
    "null",
    "~",
    "True",
    ".inf",
]


@pytest.mark.parametrize("text", NUMBERS_AND_SUCH)
def test_where_text_is_wanted_what_was_written_is_the_text(text):
    for given in (
        read_yaml(text),
        read_yaml(f'"{text}"'),
        read_yaml(f"'{text}'"),
        Argument(text),
        Argument(f'"{text}"'),
    ):
        found = typed(given, str)
        assert (found, type(found)) == (text, str)
    for given in (
        read_yaml(f"[{text}, 'b']"),
        Argument(f"[{text}, b]"),
        Argument(f'["{text}",b]'),
        Argument(f"{text},b"),
    ):
        assert typed(given, tuple[str, ...]) == (text, "b")
    for given in (read_yaml(f"a: {text}"), read_yaml(f"a: '{text}'"), Argument(f"{{a: {text}}}")):
        assert typed(given, dict[str, str]) == {"a": text}
    assert typed(read_yaml(f"{{{text}: [{text}]}}"), dict[str, list[str]]) == {text: [text]}
    assert typed(read_yaml(f"'{text}'"), str | None) == text
    assert typed(read_yaml(text), Literal["off", text]) == text


@pytest.mark.parametrize("text", ["=", "<<"])
def test_signs_that_yaml_keeps_for_itself_are_text(text):
    for given in (Argument(text), Unquoted(text)):
        assert typed(given, str) == natural(given) == text


@pytest.mark.parametrize(
    ("given", "hint", "expected"),
    [
        ("5", int, 5),
        ("007", int, 7),
        ("5", float, 5.0),
        ("1e-3", float, 0.001),
        ("on", bool, True),
        ("false", bool, False),
        ("null", int | None, None),
        ("~", str | None, None),
        ("off", Literal["on", "off"], "off"),
        ("half", int | Literal["half"], "half"),
        ("3", int | Literal["half"], 3),
        ("[0.9, 1]", tuple[float, float], (0.9, 1.0)),
        ("[0, cat, 007, '1', no]", list[int | str], [0, "cat", "007", "1", "no"]),
        ("split_A", str | tuple[int | str, ...], "split_A"),
        ("[1]", str | tuple[int | str, ...], (1,)),
    ],
)
def test_other_types(given, hint, expected):
    for value in (read_yaml(given), Argument(given)):
        found = typed(value, hint)
        assert found == expected
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("given", "hint", "expected"),
    [
        ("[a]", str, "[a]"),
        ("{a: b}", str, "{a: b}"),
        ("a: b", str, "a: b"),
        ("", str, ""),
        ("", tuple[str, ...], ()),
        ("it's", str, "it's"),
        ("'it''s'", str, "it's"),
        ('"', str, '"'),
        ('"a" and "b"', str, '"a" and "b"'),
        ('"a,b"', tuple[str, ...], ("a,b",)),
        ("'01',b", tuple[str, ...], ("01", "b")),
        ("[x] y,z", tuple[str, ...], ("[x] y", "z")),
        ("0.5, 0.25", tuple[float, ...], (0.5, 0.25)),
        ("a: 1\nb: no", dict[str, str], {"a": "1", "b": "no"}),
    ],
)
def test_arguments_of_a_command_line(given, hint, expected):
    assert typed(Argument(given), hint) == expected


@pytest.mark.parametrize(
    ("given", "hint", "sentence"),
    [
        ("much", float, "expected a number, got 'much'"),
        ("1.5", int, "expected a whole number, got 1.5"),
        ("true", int, "expected a whole number, got True"),
        ("1", bool, "expected true or false, got 1"),
        ("[a]", str, r"expected text, got \['a'\]"),
        ("a", tuple[str, ...], "expected a list of text, got 'a'"),
        ("[a, {b: c}]", tuple[str, ...], "expected text, got {'b': 'c'}"),
        ("[1, 2]", tuple[int, int, int], "expected a list of 3 elements"),
        ("fat", Literal["flat", "ivf"], "expected 'flat' or 'ivf', got 'fat'"),
        ("{a: x}", dict[str, float], "a: expected a number, got 'x'"),
        ("", str, "expected text, got None"),
        ("'5'", int, "expected a whole number, got '5'"),
    ],
)
def test_what_does_not_fit_is_told(given, hint, sentence):
    with pytest.raises(OptionError, match=sentence):
        typed(read_yaml(given), hint)


def test_python_values_are_checked_not_turned_into_text():
    assert typed("0", str) == "0"
    assert typed(3, float) == 3.0
    for value, hint in ((0, str), (False, str), ("0", int), (True, int), ([0], tuple[str, ...])):
        with pytest.raises(OptionError):
            typed(value, hint)
    assert typed("5", int, quoted_numbers=True) == 5
    assert typed("5", int | str, quoted_numbers=True) == "5"


@pytest.mark.parametrize("text", NUMBERS_AND_SUCH)
def test_what_nobody_wants_as_text_is_what_yaml_takes_it_for(text):
    expected = {"007": 7, "1e3": 1000.0, "2020-01-01": "2020-01-01"}.get(text, yaml.safe_load(text))
    found = natural(read_yaml(f"[{text}, '{text}']"))
    assert found == [expected, text]
    assert list(map(type, found)) == [type(expected), str]


def test_dumped_values_read_back_as_they_were():
    plain = {"a": NUMBERS_AND_SUCH, "b": [1, 1000.0, None, True, 0.5], "c": {"x": "y: z", "ü": ""}}
    assert natural(read_yaml(dump_yaml(plain))) == plain
    written = read_yaml("[0, '0', 1e3, no, a]")
    again = read_yaml(dump_yaml(written))
    assert again == written
    assert list(map(type, again)) == list(map(type, written)) == [Unquoted, str, Unquoted, Unquoted, Unquoted]


@dataclass(frozen=True)
class Group:
    weights: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    mask: Literal["on", "off"] = "on"
    rate: float = 0.5
    backbone: Group = field(default_factory=Group)


def test_some_options_of_a_dataclass():
    values = read_yaml(
        "{mask: off, rate: 1, backbone: {weights: 007, extra: {a: 007, b: no}}, backbone.weights: [0, '1'], x: 1e3}"
    )
    assert plain_options(values, Options) == {
        "mask": "off",
        "rate": 1,
        "backbone": {"weights": "007", "extra": {"a": 7, "b": False}},
        "backbone.weights": ["0", "1"],
        "x": 1000.0,
    }
    assert plain_options(read_yaml("{rate: {low: 0, high: 1, log: no}}"), Options) == {
        "rate": {"low": 0, "high": 1, "log": False}
    }


def test_types_in_words():
    assert words(tuple[str, ...] | None) == "a list of text or null"
    assert words(dict[str, float]) == "options by name ({name: value})"


def test_no_tag_is_obeyed():
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")
    assert read_yaml("a: &x 1\nb: {<<: {c: *x}}") == {"a": "1", "b": {"c": "1"}}

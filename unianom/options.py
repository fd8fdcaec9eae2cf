"""Options: frozen dataclasses whose fields say what they take, and their plain form in YAML, JSON and MLflow.

@dataclass(frozen=True)
class FitOptions(Options):
    batch_size: AtLeastOne = 8
    confidence: OpenShare = 0.95

FitOptions(confidence=2)   # OptionError: confidence=2 must be in (0, 1)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

from annotated_types import Ge, Gt, Interval, Le, Lt, Predicate

from unianom.errors import OptionError

T = TypeVar("T")

# What numbers options take. A number that is not finite is refused everywhere.
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
"""In [0, 1]."""
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
"""In (0, 1)."""
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
"""In (0, 1]."""
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
"""In [0, 1)."""
AtLeastOne = Annotated[int, Ge(1)]
AtLeastZero = Annotated[int, Ge(0)]


def _odd(value: int) -> bool:
    return value % 2 == 1


Odd = Annotated[int, Ge(1), Predicate(_odd)]
"""An odd number of at least 1, such as the side of a kernel."""

PREDICATES: dict[Callable[[Any], bool], str] = {_odd: "odd"}
"""Predicates of fields in words, for messages and help; each says what its number must be."""

ADDED_LATER = {"added_later": True}
"""Metadata of a field that older outputs do not have."""


AS_WRITTEN = {"as_written": True}
"""Metadata of a field whose class takes the values inside as they are written: only it knows their types."""


def named(names: Iterable[str]) -> dict[str, Any]:
    """Return metadata of a text field that takes one of these names, which `--help` and shells then know."""
    return {"names": tuple(names)}


class ValueRefused(OptionError):
    """An option has a value that its field does not take. The message starts with the option's dotted name."""


class _ResolvedFirst(type):
    """Fills in, before an instance is made, what its preset or other options decide."""

    def __call__(cls: type[T], *args: Any, **given: Any) -> T:
        names = [field.name for field in dataclasses.fields(cls)][: len(args)]  # type: ignore[arg-type]
        if len(args) > len(names) or set(names) & set(given):
            return type.__call__(cls, *args, **given)  # type: ignore[no-any-return]  # raises the usual TypeError
        given = {**dict(zip(names, args, strict=True)), **given}
        return type.__call__(cls, **cls.resolve(given))  # type: ignore[attr-defined, no-any-return]


class Options(metaclass=_ResolvedFirst):
    """Base of option dataclasses: every value is checked against the type, choices and range of its field.

    Attributes:
        presets: by the name that the option `preset` has, values of options; what is given itself goes before them.
        derived: further options that `resolve` fills in where they are left out or null.
        usual: those that `--help` shows, by name; a group stands for its own usual ones. None shows all. `--help-all`
            shows all, and both those that are required.
        positional: those that a command line may also give without their names, in this order.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    derived: ClassVar[tuple[str, ...]] = ()
    usual: ClassVar[tuple[str, ...] | None] = None
    positional: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the values to make an instance of: those given, and what the preset says of options left out or null.

        Classes whose options depend on each other otherwise override this and name those options in `derived`.
        """
        left_open = open_options(cls)
        if not left_open:
            return given
        given = {name: value for name, value in given.items() if value is not None or name not in left_open}
        preset = given.get("preset", next((f.default for f in dataclasses.fields(cls) if f.name == "preset"), None))  # type: ignore[arg-type]
        return {**cls.presets.get(preset, {}), **given}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        check_values(self)
        self.check()

    def check(self) -> None:
        """Refuse values that do not go together; overridden where there are such.

        Raises:
            OptionError: what does not fit, and what to do.
        """


def open_options(cls: type) -> frozenset[str]:
    """Return the names of options that are filled in where they are left out or null: by a preset or by others."""
    if not issubclass(cls, Options):
        return frozenset()
    return frozenset(name for values in cls.presets.values() for name in values) | frozenset(cls.derived)


def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with their constraints."""
    return _hints(cls)  # type: ignore[arg-type]


@lru_cache(maxsize=512)
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def check_values(options: Any) -> None:
    """Refuse values that are not of their field's type, among its choices or in its range.

    Raises:
        ValueRefused: there is one; names it and says what it must be.
    """
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints_of(type(options))[field.name]
        if not fits(value, hint):
            raise ValueRefused(f"{field.name}={value!r} must be {in_words(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type, with what `Annotated` asks of it; a list will do for a tuple nowhere."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind is Annotated:
        return fits(value, inner[0]) and all(_meets(value, constraint) for constraint in inner[1:])
    if kind in (Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if kind is Literal:
        return value in inner
    if kind is tuple:
        each = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if kind is dict:
        return isinstance(value, dict) and all(fits(key, inner[0]) and fits(v, inner[1]) for key, v in value.items())
    if hint is float:  # a bool is an int to Python, and an int will do for a float
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def _meets(value: Any, constraint: Any) -> bool:
    if isinstance(constraint, Predicate):
        return bool(constraint.func(value))
    return all(compare(value) for compare, _ in _bounds(constraint))


def _bounds(constraint: Any) -> list[tuple[Callable[[Any], bool], Any]]:
    """Return comparisons of a constraint, each with itself as a single bound; a comparison with NaN is false."""
    parts = list(constraint) if isinstance(constraint, Interval) else [constraint]
    known: dict[type, Callable[[Any], Callable[[Any], bool]]] = {
        Gt: lambda c: lambda value: value > c.gt,
        Ge: lambda c: lambda value: value >= c.ge,
        Lt: lambda c: lambda value: value < c.lt,
        Le: lambda c: lambda value: value <= c.le,
    }
    return [(known[type(part)](part), part) for part in parts]


def in_words(hint: Any) -> str:
    """Say what a field takes, as after "must be": "in (0, 1]", "at least 1 or null", "one of max, mean"."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _constraints_in_words(inner[1:], plain=inner[0])
    if kind in (Union, types.UnionType):
        return " or ".join(map(in_words, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is tuple:
        several = inner[-1] is ...
        return f"a list, each {in_words(inner[0])}" if several else f"a list of {len(inner)}, each {in_words(inner[0])}"
    if kind is dict:
        return "values by name"
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _constraints_in_words(constraints: tuple[Any, ...], plain: Any) -> str:
    bounds = [bound for c in constraints if not isinstance(c, Predicate) for _, bound in _bounds(c)]
    low = next((b for b in bounds if isinstance(b, Gt | Ge)), None)
    high = next((b for b in bounds if isinstance(b, Lt | Le)), None)
    said = [PREDICATES[c.func] for c in constraints if isinstance(c, Predicate)]
    if low is not None and high is not None:
        left = f"({low.gt}" if isinstance(low, Gt) else f"[{low.ge}"
        right = f"{high.lt})" if isinstance(high, Lt) else f"{high.le}]"
        said.append(f"in {left}, {right}")
    elif low is not None:
        said.append("positive" if low == Gt(0) else f"above {low.gt}" if isinstance(low, Gt) else f"at least {low.ge}")
    elif high is not None:
        said.append(f"below {high.lt}" if isinstance(high, Lt) else f"at most {high.le}")
    whole = "a whole number " if plain is int and low is not None and high is not None else ""
    return whole + " and ".join(said)


def to_plain(options: Any) -> Any:
    """Convert dataclasses to dicts, tuples to lists, recursively. A field of metadata `ADDED_LATER` is left out at its
    default, so that options from before there was it are the same plain data still."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        return {
            field.name: to_plain(getattr(options, field.name))
            for field in dataclasses.fields(options)
            if not (field.metadata.get("added_later") and getattr(options, field.name) == field.default)
        }
    if isinstance(options, dict):
        return {key: to_plain(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [to_plain(value) for value in options]
    return options


def from_plain(cls: type[T], plain: dict[str, Any]) -> T:
    """Build an option dataclass from what `to_plain` gave; its own checks run again.

    Raises:
        OptionError: a key the dataclass does not have, one missing that it needs, or a value it refuses.
    """
    hints = hints_of(cls)
    for key in plain:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise OptionError(
                f"{cls.__name__} has no option '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in plain:
            raise OptionError(f"{cls.__name__} needs the option '{field.name}'")
    return cls(**{key: _from_plain_value(key, hints[key], value) for key, value in plain.items()})


def _from_plain_value(name: str, hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _from_plain_value(name, typing.get_args(hint)[0], value)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return None if value is None else _from_plain_value(name, choices[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        with inside_group(name):
            return from_plain(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    return value


@contextmanager
def inside_group(name: str) -> Iterator[None]:
    """Name the group of an option whose value is refused inside."""
    try:
        yield
    except ValueRefused as error:
        raise ValueRefused(f"{name}.{error}") from error


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one level with dotted keys, as MLflow's parameters want them."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def merged(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested plain data with some values changed."""
    result = dict(plain)
    for key, value in changes.items():
        inside = result.get(key)
        result[key] = merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return result


def with_values(config: Any, values: Mapping[str, Any], alone: bool = False) -> Any:
    """Return a config with other values of some options, by dotted name.

    Args:
        config: a frozen dataclass.
        values: by name.
        alone: whether only these are changed to see whether they are any good, so that their fault is told as such.

    Raises:
        OptionError: the values do not fit.
    """
    changes: dict[str, Any] = {}
    # groups before what is in them, which would be lost otherwise
    for name, value in sorted(values.items(), key=lambda pair: pair[0].count(".")):
        inside = changes
        *groups, last = name.split(".")
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[last] = to_plain(value)
    try:
        return from_plain(type(config), merged(to_plain(config), changes))
    except OptionError as error:
        if alone:
            raise OptionError(f"space.{next(iter(values))}: {error}") from error
        raise


def documented_arguments(*classes: type) -> str:
    """Return the lines below "Args:" of the docstrings of some classes, each once, indented for another docstring's."""
    texts = [(cls.__doc__ or "").split("Args:\n", 1)[1].rstrip() for cls in dict.fromkeys(classes)]
    return "\n".join(re.sub(r"(?m)^    ", "", text) for text in texts)

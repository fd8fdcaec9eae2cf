"""Frozen option dataclasses to plain data and back: the form they have in YAML, JSON and MLflow."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

from unianom.errors import OptionError

T = TypeVar("T")

ADDED_LATER = {"added_later": True}
"""Metadata of a field that older outputs do not have."""


def to_plain(options: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, recursively. A field of metadata `ADDED_LATER` is left out at its default,
    so that options from before there was it are the same plain data still."""
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
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in plain:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise OptionError(
                f"{cls.__name__} has no option '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in plain:
            raise OptionError(f"{cls.__name__} needs the option '{field.name}'")
    return cls(**{key: _value(hints[key], value) for key, value in plain.items()})


def _value(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return None if value is None else _value(choices[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_plain(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    return value


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one level with dotted keys, as MLflow's parameters want them."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def merged(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested plain data with some values changed."""
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

"""Options as they are written in YAML or typed on a command line, taken for the type that is wanted.

YAML says by itself what an unquoted `007`, `NO`, `null` or `1e3` is: a number, false, nothing. Where an option takes
text, such as the name of a folder, that is wrong and cannot be undone. Here unquoted values stay as written until the
type is known.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

import yaml

from unianom.errors import OptionError
from unianom.options import to_plain


class Unquoted(str):
    """A value without quotes in YAML: text, number, true, false or null, as its reader wants it."""

    __slots__ = ()


class Argument(Unquoted):
    """A value from a command line: as `Unquoted`, or YAML in quotes or brackets."""

    __slots__ = ()


class _Written(yaml.SafeLoader):
    """Reads YAML with unquoted values as written; otherwise as `yaml.safe_load`, so no tag runs code."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and value != "<<":
            return "!unquoted"
        return super().resolve(kind, value, implicit)


_Written.add_constructor("!unquoted", lambda loader, node: Unquoted(node.value))


class _Natural(yaml.SafeLoader):
    """What YAML itself takes unquoted values for, but that 1e3 is a number and a date is text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Natural` reads back as it was."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
for _class in (_Natural, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in pairs if not tag.endswith((":timestamp", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+0123456789.")
    )


def _represent_unquoted(dumper: _Dumper, text: Unquoted) -> yaml.ScalarNode:
    tag = dumper.resolve(yaml.ScalarNode, str(text), (True, False))
    return dumper.represent_scalar(tag, str(text))


_Dumper.add_representer(Unquoted, _represent_unquoted)
_Dumper.add_representer(Argument, _represent_unquoted)


def read_yaml(text: str | bytes) -> Any:
    """Read plain data from YAML, in which unquoted values stay `Unquoted`.

    Raises:
        yaml.YAMLError: not YAML, or a tag that is not plain data.
    """
    return yaml.load(text, Loader=_Written)


def dump_yaml(plain: Any, **style: Any) -> str:
    """Write plain data as YAML that reads back as the same, in the order of its keys; `style` as for `yaml.dump`."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def natural(value: Any) -> Any:
    """Return plain data with unquoted values as YAML itself takes them."""
    if isinstance(value, Argument):
        return natural(_opened(value))
    if isinstance(value, Unquoted):
        if re.fullmatch(r"[-+]?[0-9]+", value):
            return int(value)
        loader = _Natural("")
        tag = loader.resolve(yaml.ScalarNode, str(value), (True, False))
        try:
            return loader.construct_object(yaml.ScalarNode(tag, str(value)))  # type: ignore[no-untyped-call]
        except (ValueError, yaml.YAMLError):  # such as 0x_, and a lone "=" or "<<"
            return str(value)
    if isinstance(value, dict):
        return {str(key) if isinstance(key, str) else key: natural(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(natural, value))
    return value


def typed(value: Any, hint: Any, quoted_numbers: bool = False) -> Any:
    """Return a written value as the type that is wanted.

    Where text is wanted, what was written is the text. Values that are no text already, as Python holds them, are
    checked only.

    Args:
        value: plain data, with `Unquoted` and `Argument` where the type decides.
        hint: a type of an option: text, number, bool, null, Literal, tuple, list or dict of these, a dataclass (its
            options are then a dict still), Any (left as written), or a union.
        quoted_numbers: whether "5" is a number where no text is wanted.

    Raises:
        OptionError: the value does not fit.
    """
    kinds = list(_members(hint))
    if Any in kinds:
        return value
    if isinstance(value, Argument):
        value = _argument(value, kinds)
    scalar = natural(Unquoted(value.strip())) if isinstance(value, Unquoted) else value
    if scalar is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind not in (str, type(None)):
            found = _as(value, scalar, kind, str in kinds, quoted_numbers)
            if found is not _NO:
                return found
    if str in kinds and isinstance(value, str) and (value or not isinstance(value, Unquoted)):
        return str(value)
    raise OptionError(f"expected {words(hint)}, got {natural(value)!r}")


_NO = object()


def _as(value: Any, scalar: Any, kind: Any, or_text: bool, quoted_numbers: bool) -> Any:
    """Return the value as one type that is no union, or `_NO`."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        for wanted in (str(value) if isinstance(value, str) else value, scalar):
            for choice in choices:
                if type(choice) is type(wanted) and choice == wanted:
                    return choice
        return _NO
    if origin in (tuple, list) or kind in (tuple, list):
        return _sequence(value, kind, quoted_numbers)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            return _NO
        of = (typing.get_args(kind) or (Any, Any))[1]
        return {str(key): _inside(f"{key}: ", inner, of, quoted_numbers) for key, inner in value.items()}
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return value if isinstance(value, kind) else _NO  # type: ignore[arg-type]
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise OptionError(f"there is no option '{key}'; known: {', '.join(hints)}")
        return {str(key): _inside(f"{key}: ", inner, hints[key], quoted_numbers) for key, inner in value.items()}
    if quoted_numbers and not or_text and type(value) is str:
        scalar = natural(Unquoted(value))
    if or_text and isinstance(value, str) and _as_text(scalar) != value:
        return _NO  # such as 007, which is as well a name
    if kind is float and type(scalar) is int:
        return float(scalar)
    return scalar if type(scalar) is kind else _NO


def _sequence(value: Any, kind: Any, quoted_numbers: bool) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    origin, items = typing.get_origin(kind) or kind, typing.get_args(kind) or (Any, ...)
    if origin is tuple and items[-1] is not Ellipsis:
        if len(items) != len(value):
            raise OptionError(f"expected a list of {len(items)} elements, got {natural(value)!r}")
        return tuple(_inside("", inner, item, quoted_numbers) for inner, item in zip(value, items, strict=True))
    return origin(_inside("", inner, items[0], quoted_numbers) for inner in value)


def _inside(where: str, value: Any, hint: Any, quoted_numbers: bool) -> Any:
    try:
        return typed(value, hint, quoted_numbers)
    except OptionError as error:
        raise OptionError(f"{where}{error}") from None


def _as_text(scalar: Any) -> str:
    return str(scalar).lower() if isinstance(scalar, bool) else str(scalar)


def _members(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _members(part)
    else:
        yield hint


def _opened(text: Argument) -> Any:
    """Return an argument of which nothing else is known: text in quotes is text, brackets hold YAML."""
    start, end = text[:1], text[-1:]
    if len(text) > 1 and (start + end in ("[]", "{}") or (start == end and start in "'\"")):
        try:
            return read_yaml(str(text))
        except (yaml.YAMLError, RecursionError):
            return str(text)
    return Unquoted(text)


def _argument(text: Argument, kinds: list[Any]) -> Any:
    """Return an argument as YAML would hold it where one of these types is wanted."""
    origins = {typing.get_origin(kind) or kind for kind in kinds}
    if text == "" and (str in origins or origins & {list, tuple}):
        return "" if str in origins else []
    opened = _opened(text)
    if isinstance(opened, list) and origins & {list, tuple}:
        return opened
    groups = dict in origins or any(dataclasses.is_dataclass(kind) for kind in kinds)
    if groups and not origins & {list, tuple, str}:
        try:  # a dict over several lines, or what is none
            return read_yaml(str(text))
        except yaml.YAMLError as error:
            raise OptionError(f"expected YAML such as '{{name: value}}': {' '.join(str(error).split())}") from error
    if isinstance(opened, dict) and groups:
        return opened
    if not origins & {list, tuple} or str in origins or (natural(opened) is None and type(None) in kinds):
        # [a] is a name here, and quotes around the whole are YAML's
        return opened if isinstance(opened, str) else Unquoted(text)
    if type(opened) is str:
        return [opened]
    return [part if isinstance(part := _opened(Argument(piece)), str) else piece for piece in text.split(",")]


def words(hint: Any) -> str:
    """Name a type for an error message."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(words, typing.get_args(hint)))
    if origin in (tuple, list):
        items = typing.get_args(hint)
        if items[-1] is not Ellipsis and origin is tuple:
            return f"a list of {len(items)} elements"
        return f"a list of {words(items[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "options by name ({name: value})"
    known = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return known.get(hint, "a value")


def plain_options(values: Mapping[str, Any], options: type) -> dict[str, Any]:
    """Return written options of a dataclass as plain data: text where its options take text, else as YAML has it.

    Args:
        values: some of its options, by name, by dotted name or nested; a list may hold several values of one.
        options: the dataclass.
    """
    hints = dict(dotted_hints(options))

    def settled(name: str, value: Any) -> Any:
        if isinstance(value, dict) and name not in hints:
            return {str(key): settled(f"{name}.{key}", inner) for key, inner in value.items()}
        plain = natural(value)
        if name not in hints:
            return plain
        try:
            found = to_plain(typed(value, hints[name]))
        except OptionError:  # left to the checks of the options, or
            several = isinstance(value, list | tuple)
            return [settled(name, inner) for inner in value] if several else plain
        return plain if found == plain else natural(found)

    return {str(key): settled(str(key), value) for key, value in values.items()}


def dotted_hints(options: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield types of the options of a dataclass and of its groups, by dotted name."""
    for name, hint in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(hint):
            yield from dotted_hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint

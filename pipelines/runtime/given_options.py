"""Options as a command line and YAML files give them, made into their dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from pipelines.runtime.recipes import find_recipe, nearest_recipes
from unianom import files
from unianom.errors import OptionError, UnianomError
from unianom.options import hints_of, inside_group, merged, open_options, to_plain
from unianom.written import Argument, natural, read_yaml, typed


class GivenOptions:
    """The options of a dataclass as they are given, one after the other; later ones override.

    Args:
        options: the dataclass.

    Attributes:
        values: what was given so far, nested as the groups are.
        asks: "help", "help_all" or "print_config" where that is wanted instead, else "".
    """

    def __init__(self, options: type) -> None:
        self._options = options
        self._fields = dict(option_fields(options))
        parts = (name.split(".") for name in self._fields)
        self._groups = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
        self.values: dict[str, Any] = {}
        self.asks = ""

    def read(self, arguments: Sequence[str]) -> None:
        """Take arguments of a command line."""
        unknown: list[str] = []
        arguments, places = list(arguments), list(getattr(self._options, "positional", ()))
        while arguments:
            argument = arguments.pop(0)
            name, equals, text = argument.partition("=")
            name = self._known(name[2:]) if name.startswith("--") else ""
            if argument in ("-h", "--help", "--help-all", "--help_all"):
                self.asks = "help_all" if argument.endswith("all") else "help"
                return
            if name == "print_config":
                self.asks = name
                continue
            if not name and places and not argument.startswith("-"):
                self._set(places.pop(0), Argument(argument))
                continue
            if not name:
                unknown.append("--" + argument[2:].replace("-", "_") if argument.startswith("--") else argument)
                continue
            if not equals:
                if arguments and not arguments[0].startswith("--"):
                    text = arguments.pop(0)
                elif name in self._fields and self._fields[name][0] in (bool, bool | None):
                    text = "true"
                else:
                    raise OptionError(f"--{name}: expected a value")
            if name == "config":
                self.read_file(text)
            elif name in self._groups:
                self.take(_mapping(text, f"--{name}"), name + ".")
            else:
                self._set(name, Argument(text))
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            first = next((name for name in unknown if name.startswith("--")), "--")[2:].partition("=")[0]
            near = _nearest(first, [*self._fields, "config", "print_config", "help_all"]) if first else None
            raise OptionError(message + (f"; did you mean --{near}?" if near else ""))

    def _known(self, name: str) -> str:
        """Return the option that an argument names, with dashes as underscores; the key of a dict stays as it is,
        unless it is an option's name itself."""
        plain = name.replace("-", "_")
        if plain in self._fields or plain in self._groups or plain in ("config", "print_config"):
            return plain
        option = self._dict_of(plain)
        if not option:
            return ""
        key = name[len(option) + 1 :]
        return (
            f"{option}.{key.replace('-', '_') if typing.get_args(self._fields[option][0])[1] in (Any, float) else key}"
        )

    def _dict_of(self, name: str) -> str:
        """Return the option that holds a dict with the rest of the name as a key, or nothing."""
        for option, (hint, _) in self._fields.items():
            if name.startswith(option + ".") and name != option + "." and typing.get_origin(hint) is dict:
                return option
        return ""

    def read_file(self, uri: str) -> None:
        """Take a YAML file; where there is none of that name, the recipe of it."""
        try:
            recipe = None if "://" in uri or files.is_file(uri) else find_recipe(uri)
            text = files.read_bytes(recipe or uri).decode()
        except FileNotFoundError as error:
            near = nearest_recipes(uri)
            meant = f"; did you mean {' or '.join(near)}?" if near else "; recipes are listed in jobs/recipes"
            raise OptionError(f"--config: there is no file {uri}, and no recipe of that name{meant}") from error
        except (OSError, UnicodeDecodeError, UnianomError) as error:
            raise OptionError(f"--config: cannot read {uri}: {' '.join(str(error).split())}") from error
        self.take(_mapping(text, f"--config {uri}"))

    def take(self, values: dict[str, Any], prefix: str = "") -> None:
        """Take values by option; of a group a dict of those in it. `prefix`: of their names, ending in a dot."""
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name in self._groups:
                if not isinstance(value, dict):
                    inside = [option for option in self._fields if option.startswith(name + ".")]
                    names = dict.fromkeys(option[len(name) + 1 :].partition(".")[0] for option in inside)
                    raise OptionError(f"--{name}: expected options ({', '.join(names)}), got {natural(value)!r}")
                self.take(value, name + ".")
            elif name in self._fields or self._dict_of(name):
                self._set(name, value)
            else:
                near = _nearest(name, list(self._fields))
                raise OptionError(f"there is no option '{name}'" + (f"; did you mean --{near}?" if near else ""))

    def _set(self, name: str, value: Any) -> None:
        option = name if name in self._fields else self._dict_of(name)
        hint, metadata = self._fields[option]
        if option != name:
            key, hint = name[len(option) + 1 :], typing.get_args(hint)[1]
        try:
            value = typed(value, hint, quoted_numbers=True)
        except OptionError as error:
            raise OptionError(f"--{name}: {error}") from error
        if not metadata.get("as_written"):
            value = natural(value)
        if option != name:
            value = {**(self._get(option) or {}), key: value}
        self._put(option, value)

    def _get(self, name: str) -> Any:
        """Return what an option holds now: as given, else its default; None for a required one."""
        inside: Any = self.values
        for part in name.split("."):
            if part not in inside:
                break
            inside = inside[part]
        else:
            return inside
        cls, base = self._options, None
        for part in name.split("."):
            field = next(field for field in dataclasses.fields(cls) if field.name == part)  # type: ignore[arg-type]
            base, cls = default_of(field, base), hints_of(cls)[part]
        return None if base is dataclasses.MISSING else base

    def _put(self, name: str, value: Any) -> None:
        *groups, last = name.split(".")
        inside = self.values
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[last] = value

    def instance(self) -> Any:
        """Build the dataclass, whose own checks run.

        Raises:
            OptionError: a required option is missing, or a value is refused.
        """
        return _built(self._options, self.values)

    def printed(self) -> dict[str, Any]:
        """Return plain data that `--config` takes; null for required options that are not given."""
        plain = merged(_plain_defaults(self._options), to_plain(self.values))
        required = (f.name for f in dataclasses.fields(self._options) if default_of(f) is dataclasses.MISSING)  # type: ignore[arg-type]
        if all(plain[name] is not None for name in required):
            made = to_plain(self.instance())
            own = (name for name, (_, metadata) in self._fields.items() if metadata.get("as_written"))
            plain |= {name: made[name] for name in own if name in made}
        return plain


T = TypeVar("T")


def with_recipe(options: type[T], recipe: str, **values: Any) -> T:
    """Return options as `--config RECIPE` makes them on a command line, with others that override the recipe.

    Args:
        options: their dataclass, such as `train_options()["patchcore"]`.
        recipe: name of a recipe, such as "offline/patchcore", or a YAML file; path or URI.
        values: by option; of a group a dict of those that are given, or an instance, which gives all of them.

    Raises:
        OptionError: no such recipe; unknown, missing or refused options.
    """
    given = GivenOptions(options)
    given.read_file(recipe)
    given.take(to_plain(values))
    made: T = given.instance()
    return made


def _mapping(text: str, where: str) -> dict[str, Any]:
    """Return options by name from YAML."""
    try:
        values = read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = f"'{' '.join(text.split())[:60]}'" if text.strip() else "nothing"
        raise OptionError(f"{where}: expected YAML of the form 'option: value', got {found}")
    return values


def option_fields(options: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Mapping[str, Any]]]]:
    """Yield options by dotted name, with their type and what their field says of them."""
    hints = typing.get_type_hints(options)
    for option in dataclasses.fields(options):
        name = f"{prefix}{option.name}"
        hint = hints[option.name]
        if dataclasses.is_dataclass(hint):
            yield from option_fields(hint, name + ".")  # type: ignore[arg-type]
        else:
            yield name, (hint | None if option.name in open_options(options) else hint, option.metadata)


def default_of(field: dataclasses.Field[Any], base: Any = None) -> Any:
    """Return the default of an option: that of the group it is in, where the group has one, else that of its class;
    `MISSING` for a required one."""
    if base is not None and base is not dataclasses.MISSING:
        return getattr(base, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain_defaults(options: type, base: Any = None) -> dict[str, Any]:
    """Return plain defaults; null for required options, and for those that a preset or others fill in."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint, default = hints_of(options)[field.name], default_of(field, base)
        if dataclasses.is_dataclass(hint):
            plain[field.name] = _plain_defaults(hint, default)  # type: ignore[arg-type]
        elif default is dataclasses.MISSING or field.name in open_options(options):
            plain[field.name] = None
        else:
            plain[field.name] = to_plain(default)
    return plain


def _built(options: type, given: Mapping[str, Any], base: Any = None) -> Any:
    """Return an instance with the options that are given; the others are those of `base`, or defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint, default = hints_of(options)[field.name], default_of(field, base)
        if field.name in given:
            value = given[field.name]
            if dataclasses.is_dataclass(hint) and isinstance(value, dict):
                with inside_group(field.name):
                    value = _built(hint, value, default)  # type: ignore[arg-type]
            elif isinstance(value, tuple) and dataclasses.is_dataclass(typing.get_args(hint)[0]):
                with inside_group(field.name):
                    value = tuple(_built(typing.get_args(hint)[0], one) for one in value)
            values[field.name] = value
        elif default is dataclasses.MISSING:
            raise OptionError(f"the option --{field.name} is required")
    # what a preset filled into a default is filled in anew, for another may be given
    return options(**values) if base is None or open_options(options) else dataclasses.replace(base, **values)


def _nearest(unknown: str, names: Sequence[str]) -> str | None:
    """Return the known option that resembles an unknown one in its last part, in the same group if there is one; one of
    the same last part comes first."""
    group, _, leaf = unknown.rpartition(".")
    same = next((name for name in names if name.rpartition(".")[2] == leaf), None)
    if same is not None:
        return same
    for known in ([name for name in names if name.rpartition(".")[0] == group], names):
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = difflib.get_close_matches(unknown.rpartition(".")[2], leaves, 1)
        if near:
            return leaves[near[0]]
    return None

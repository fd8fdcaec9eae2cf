"""From the command line to one call: typed options, exit codes, errors of one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import os
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.table import Table

from pipelines.runtime.errors import reason, user_error, worker_error
from unianom import files
from unianom.errors import OptionError, UnianomError
from unianom.options import hints_of, in_words, inside_group, merged, open_options, to_plain
from unianom.written import Argument, dump_yaml, natural, read_yaml, typed

DONE, FAILED, WRONG_OPTIONS = 0, 1, 2

STOPS = {
    number: words
    for name, words in (
        ("SIGINT", "interrupted"),
        ("SIGTERM", "terminated"),
        ("SIGHUP", "hung up (its terminal was closed)"),
    )
    if (number := getattr(signal, name, None)) is not None  # Windows has no SIGHUP
}
"""Signals that end a job in good order, and what it then says."""

_AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""What is printed is data, in which [a] is no markup and :a: no picture."""

console = Console(soft_wrap=True, **_AS_IT_IS)
"""Where jobs print results."""


def run(main: Callable[[Any], None], options: type | dict[str, type], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, call `main` with the options, exit with 0 done, 1 failed or 2 wrong options.

    Args:
        main: takes an instance of the options class.
        options: a frozen dataclass, or several by the name that the command line starts with.
        argv: arguments; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    stops = _Stops()
    try:
        parsed = parse(options, arguments)
        main(parsed)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or stops.received is not None:
            stops.leave()
        if isinstance(error, SystemExit):
            raise
        if debug:
            traceback.print_exc()
            if (worker := worker_error(error)) is not None:
                print(f"in the worker:\n{worker.trace}", file=sys.stderr, flush=True)
        known = user_error(error)
        if isinstance(known, OptionError):
            _exit(WRONG_OPTIONS, str(known))
        if known is not None:
            _exit(FAILED, str(known))
        _exit(FAILED, f"{reason(error)} (unexpected; --debug shows where)")
    sys.exit(DONE)


class _Stops:
    """Makes every signal of `STOPS` end the job as Ctrl-C does: by a KeyboardInterrupt in the main thread.

    One that is ignored from the start, as under nohup, stays so.

    Attributes:
        received: the first that came; None if none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._leaving = False
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:
            os._exit(FAILED)  # asked twice: what Ray started on this machine ends by itself
        self.received = self.received or number
        raise KeyboardInterrupt

    def leave(self) -> NoReturn:
        """Say so, end what was started, and exit."""
        self._leaving = True
        words = STOPS[signal.SIGINT if self.received is None else self.received]
        print(f"error: {words}; the same command continues", file=sys.stderr, flush=True)
        if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
            # a thread that asks Ray for something would else start another one
            os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
            threading.excepthook = lambda _: None
            ray.shutdown()
        sys.exit(FAILED)


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep this process's handlers of the signals in `STOPS` while a library runs that would put its own in their
    place: Ray's, as it starts, ends the process by an abort; Ray Train's lets it end as if all were done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.getsignal(number) for number in STOPS}
    setting = signal.signal

    def set_others(number: int, handler: Any) -> Any:
        return held[number] if number in held else setting(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = setting
        for number, handler in held.items():
            if handler is not None:  # None is a handler that was not set from Python
                signal.signal(number, handler)  # native code replaces it unseen


def parse(options: type | dict[str, type], arguments: Sequence[str]) -> Any:
    """Build the options dataclass from command-line arguments and `--config` YAML files.

    Every value is read once, for the type of its option: where that is text, what was typed is the text. (Parsers that
    read values as YAML before they know their type lose a name such as 007.)

    Raises:
        OptionError: unknown, missing or refused options; names the nearest known one.
    """
    arguments = list(arguments)
    if isinstance(options, dict):
        options, arguments = _choose(options, arguments)
    given = _Given(options)
    given.read(arguments)
    if given.asks == "help":
        _print_help(options)
        sys.exit(DONE)
    if given.asks == "print_config":
        print(dump_yaml(given.printed(), default_flow_style=False), end="")
        sys.exit(DONE)
    return given.instance()


def _print_help(options: type) -> None:
    import argparse  # these two take a while, and nothing else needs them

    import docstring_parser

    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        usage="%(prog)s [--config FILE] [--print_config] [--OPTION VALUE ...]",
        description=_summary(options),
        epilog="Names take '-' or '_' alike; --debug shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; later arguments override it")
    parser.add_argument("--print_config", action="store_true", help="print all options as such a file, and exit")

    def add(target: Any, cls: Any, prefix: str, base: Any) -> None:
        texts: dict[str, str] = {}
        for documented in reversed(cls.__mro__):  # a class says of inherited options what differs
            found = docstring_parser.parse(documented.__doc__ or "").params
            texts |= {name: p.description or "" for p in found for name in p.arg_name.split(", ")}
        groups: list[tuple[Any, str, Any]] = []
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            hint, default = hints_of(cls)[field.name], _default(field, base)
            if dataclasses.is_dataclass(hint):
                groups.append((hint, f"{prefix}{field.name}.", default))
                continue
            if default is dataclasses.MISSING:
                said = "required"
            elif field.name in open_options(cls):
                said = "default: by the preset or other options"
            else:
                said = "default: " + dump_yaml(to_plain(default), default_flow_style=True).removesuffix("...\n").strip()
            text = " ".join(f"{texts.get(field.name, '')} ({in_words(hint)}; {said})".split())
            target.add_argument(f"--{prefix}{field.name}", metavar="VALUE", help=text.replace("%", "%%"))
        for hint, name, default in groups:
            add(parser.add_argument_group(name[:-1], _summary(hint).replace("%", "%%")), hint, name, default)

    add(parser, options, "", None)
    parser.print_help()


class _Given:
    """The options of a dataclass as they are given, one after the other; later ones override.

    Args:
        options: the dataclass.

    Attributes:
        values: what was given so far, nested as the groups are.
        asks: "help" or "print_config" where that is wanted instead, else "".
    """

    def __init__(self, options: type) -> None:
        self._options = options
        self._fields = dict(_fields(options))
        parts = (name.split(".") for name in self._fields)
        self._groups = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
        self.values: dict[str, Any] = {}
        self.asks = ""

    def read(self, arguments: Sequence[str]) -> None:
        """Take arguments of a command line."""
        unknown: list[str] = []
        arguments = list(arguments)
        while arguments:
            argument = arguments.pop(0)
            name, equals, text = argument.partition("=")
            name = self._known(name[2:]) if name.startswith("--") else ""
            if argument in ("-h", "--help"):
                self.asks = "help"
                return
            if name == "print_config":
                self.asks = name
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
                self._read_file(text)
            elif name in self._groups:
                self._take(_mapping(text, f"--{name}"), name + ".")
            else:
                self._set(name, Argument(text))
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            first = next((name for name in unknown if name.startswith("--")), "--")[2:].partition("=")[0]
            near = _nearest(first, [*self._fields, "config", "print_config"]) if first else None
            raise OptionError(message + (f"; did you mean --{near}?" if near else ""))

    def _known(self, name: str) -> str:
        """The option that an argument names, with dashes as underscores; the key of a dict stays as it is, unless it
        is an option's name itself."""
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
        """The option that holds a dict with the rest of the name as a key, or nothing."""
        for option, (hint, _) in self._fields.items():
            if name.startswith(option + ".") and name != option + "." and typing.get_origin(hint) is dict:
                return option
        return ""

    def _read_file(self, uri: str) -> None:
        try:
            text = files.read_bytes(uri).decode()
        except (OSError, UnicodeDecodeError, UnianomError) as error:
            raise OptionError(f"--config: cannot read {uri}: {' '.join(str(error).split())}") from error
        self._take(_mapping(text, f"--config {uri}"), "")

    def _take(self, values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name in self._groups:
                if not isinstance(value, dict):
                    inside = [option for option in self._fields if option.startswith(name + ".")]
                    names = dict.fromkeys(option[len(name) + 1 :].partition(".")[0] for option in inside)
                    raise OptionError(f"--{name}: expected options ({', '.join(names)}), got {natural(value)!r}")
                self._take(value, name + ".")
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
        """What an option holds now: as given, else its default; None for a required one."""
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
            base, cls = _default(field, base), hints_of(cls)[part]
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
        """Plain data that `--config` takes; null for required options that are not given."""
        plain = merged(_plain_defaults(self._options), to_plain(self.values))
        required = (f.name for f in dataclasses.fields(self._options) if _default(f) is dataclasses.MISSING)  # type: ignore[arg-type]
        if all(plain[name] is not None for name in required):
            made = to_plain(self.instance())
            own = (name for name, (_, metadata) in self._fields.items() if metadata.get("as_written"))
            plain |= {name: made[name] for name in own if name in made}
        return plain


def _mapping(text: str, where: str) -> dict[str, Any]:
    """Options by name from YAML."""
    try:
        values = read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = f"'{' '.join(text.split())[:60]}'" if text.strip() else "nothing"
        raise OptionError(f"{where}: expected YAML of the form 'option: value', got {found}")
    return values


def _fields(options: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Mapping[str, Any]]]]:
    """Options by dotted name, with their type and what their field says of them."""
    hints = typing.get_type_hints(options)
    for option in dataclasses.fields(options):
        name = f"{prefix}{option.name}"
        hint = hints[option.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, name + ".")  # type: ignore[arg-type]
        else:
            yield name, (hint | None if option.name in open_options(options) else hint, option.metadata)


def _default(field: dataclasses.Field[Any], base: Any = None) -> Any:
    """The default of an option: that of the group it is in, where the group has one, else that of its class; `MISSING`
    for a required one."""
    if base is not None and base is not dataclasses.MISSING:
        return getattr(base, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain_defaults(options: type, base: Any = None) -> dict[str, Any]:
    """Plain defaults; null for required options, and for those that a preset or others fill in."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint, default = hints_of(options)[field.name], _default(field, base)
        if dataclasses.is_dataclass(hint):
            plain[field.name] = _plain_defaults(hint, default)  # type: ignore[arg-type]
        elif default is dataclasses.MISSING or field.name in open_options(options):
            plain[field.name] = None
        else:
            plain[field.name] = to_plain(default)
    return plain


def _built(options: type, given: Mapping[str, Any], base: Any = None) -> Any:
    """An instance with the options that are given; the others are those of `base`, or defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint, default = hints_of(options)[field.name], _default(field, base)
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


def _choose(choices: dict[str, type], arguments: list[str]) -> tuple[type, list[str]]:
    names = ", ".join(sorted(choices))
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {sys.argv[0]} NAME [options]\n\nNAME is one of: {names}\nNAME --help shows its options.")
        sys.exit(DONE)
    if not arguments or arguments[0].startswith("-"):
        raise OptionError(f"the first argument must be one of: {names}")
    if arguments[0] not in choices:
        near = difflib.get_close_matches(arguments[0], choices, 1)
        raise OptionError(
            f"unknown '{arguments[0]}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {names}")
        )
    return choices[arguments[0]], arguments[1:]


def _nearest(unknown: str, names: Sequence[str]) -> str | None:
    """The known option that resembles an unknown one in its last part, in the same group if there is one."""
    group = unknown.rpartition(".")[0]
    for known in ([name for name in names if name.rpartition(".")[0] == group], names):
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = difflib.get_close_matches(unknown.rpartition(".")[2], leaves, 1)
        if near:
            return leaves[near[0]]
    return None


def _summary(options: type) -> str:
    return (options.__doc__ or "").split("\n\n")[0]


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], footer: int = 0) -> None:
    """Print a table; the last `footer` rows stand apart (means, unions)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number >= len(rows) - footer else None)
    wide = Console(width=max(console.width, 160), **_AS_IT_IS) if not console.is_terminal else console
    wide.print(table)

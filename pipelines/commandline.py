"""From the command line to one call: typed options, exit codes, errors of one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jsonargparse
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unianom.errors import OptionError, UnianomError

DONE, FAILED, WRONG_OPTIONS = 0, 1, 2

console = Console(highlight=False, soft_wrap=True)
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
    try:
        parsed = parse(options, arguments)
        main(parsed)
    except KeyboardInterrupt:
        _exit(FAILED, "interrupted; the same command continues")
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if debug:
            traceback.print_exc()
        known = user_error(error)
        if isinstance(known, OptionError):
            _exit(WRONG_OPTIONS, str(known))
        if known is not None:
            _exit(FAILED, str(known))
        _exit(FAILED, f"{type(error).__name__}: {last_line(error)} (unexpected; --debug shows where)")
    sys.exit(DONE)


def parse(options: type | dict[str, type], arguments: Sequence[str]) -> Any:
    """Build the options dataclass from command-line arguments and `--config` YAML files.

    Raises:
        OptionError: unknown, missing or refused options; names the nearest known one.
    """
    arguments = list(arguments)
    if isinstance(options, dict):
        options, arguments = _choose(options, arguments)
    parser = jsonargparse.ArgumentParser(
        prog=sys.argv[0],
        description=_summary(options),
        exit_on_error=False,
        allow_abbrev=False,
        epilog="Names take '-' or '_' alike; --debug shows tracebacks.",
    )
    parser.add_argument("--config", action="config", help="YAML file of these options; later arguments override it")
    parser.add_class_arguments(options, as_group=False)
    parser.set_defaults(_left_open(options))
    try:
        config = parser.parse_args(_normalise(parser, arguments))
        _check_groups(config, parser.get_defaults())
        return _instance(parser, config, options)
    except jsonargparse.ArgumentError as error:
        raise OptionError(_explain(str(error), parser)) from error


def _left_open(options: type) -> dict[str, None]:
    """Options of groups that are null unless given, by dotted name.

    The parser takes the defaults of a group from an instance of it, in which its preset has filled them in already; so
    another preset would fill in nothing.
    """
    hints = typing.get_type_hints(options)
    return {
        f"{group.name}.{option.name}": None
        for group in dataclasses.fields(options)
        if dataclasses.is_dataclass(hints[group.name])
        for option in dataclasses.fields(hints[group.name])
        if option.default is None
    }


def documented_arguments(*classes: type) -> str:
    """The lines below "Args:" of the docstrings of some classes, each once, indented for another docstring's."""
    texts = [(cls.__doc__ or "").split("Args:\n", 1)[1].rstrip() for cls in dict.fromkeys(classes)]
    return "\n".join(re.sub(r"(?m)^    ", "", text) for text in texts)


def _check_groups(config: jsonargparse.Namespace, defaults: jsonargparse.Namespace, prefix: str = "") -> None:
    """Refuse a plain value where options of their own belong, which the parser lets pass."""
    for key, default in vars(defaults).items():
        if isinstance(default, jsonargparse.Namespace):
            value = getattr(config, key)
            if not isinstance(value, jsonargparse.Namespace):
                raise OptionError(f"--{prefix}{key}: expected options ({', '.join(vars(default))}), got {value!r}")
            _check_groups(value, default, f"{prefix}{key}.")


def _instance(parser: jsonargparse.ArgumentParser, config: Any, options: type) -> Any:
    values = dict(parser.instantiate(config))
    values.pop("config", None)
    return options(**values)


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


def _normalise(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Dashes in names to underscores; a plain `a,b` where a list is wanted to `[a,b]`; a switch alone to true."""
    lists = {
        option: item
        for action in parser._actions
        for option in action.option_strings
        if (item := _item_type(getattr(action, "_typehint", None))) is not None
    }
    switches = {
        option
        for action in parser._actions
        for option in action.option_strings
        if getattr(action, "_typehint", None) is bool
    }
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            if result and result[-1] in switches:
                result.append("true")
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            result.append(name + equals + (_bracketed(value, lists[name]) if equals and name in lists else value))
        elif result and result[-1] in lists:
            result.append(_bracketed(argument, lists[result[-1]]))
        else:
            result.append(argument)
    return [*result, "true"] if result and result[-1] in switches else result


def _item_type(hint: Any) -> Any:
    """Type of the items of a tuple or list, optional or not; None for any other type."""
    for kind in (hint, *typing.get_args(hint)):
        if typing.get_origin(kind) in (tuple, list):
            return typing.get_args(kind)[0]
    return None


def _bracketed(value: str, item: Any) -> str:
    if value.startswith("[") or value in ("", "null"):
        return value or "[]"
    # quoted, since YAML takes the category 01 for a number
    return json.dumps(value.split(",")) if item is str else f"[{value}]"


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """The parser's message on one line in plain words, with the nearest known option where one is unknown."""
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("a typing.Literal", "one of ")
    message = re.sub(r'^Parser key "([\w.]+)":', r"--\1:", message)
    unknown = re.search(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.\-]+)", message)
    if unknown:
        prefix = re.search(r"^Group '([\w.]+)'", message)
        near = _nearest(f"{prefix[1]}.{unknown[1]}" if prefix else unknown[1], parser)
        if near:
            message += f"; did you mean --{near}?"
    return message


def _nearest(unknown: str, parser: jsonargparse.ArgumentParser) -> str | None:
    """The known option that resembles an unknown one in its last part, in the same group if there is one."""
    names = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    group = unknown.rpartition(".")[0]
    for known in ([name for name in names if name.rpartition(".")[0] == group], names):
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = difflib.get_close_matches(unknown.rpartition(".")[2], leaves, 1)
        if near:
            return leaves[near[0]]
    return None


def _summary(options: type) -> str:
    return (options.__doc__ or "").split("\n\n")[0]


def user_error(error: BaseException) -> UnianomError | None:
    """The error meant for the user inside what Ray and others wrapped around it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(cause, BaseException):
            # Ray's wrapper may pretend to be of its cause's class, but its text is a remote traceback
            queue.append(cause)
        elif isinstance(current, UnianomError):
            return current
        elif isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {current.filename}" if current.filename else ""
            return UnianomError(f"the disk is full{where}; free space and run the same command again, it continues")
        queue += [current.__cause__, current.__context__]
    return None


def last_line(error: BaseException) -> str:
    """Of a remote traceback, the line that names the error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], footer: int = 0) -> None:
    """Print a table; the last `footer` rows stand apart (means, unions)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        # cells are data, in which square brackets are no markup
        table.add_row(*map(escape, row), style="bold" if number >= len(rows) - footer else None)
    wide = Console(highlight=False, width=max(console.width, 160)) if not console.is_terminal else console
    wide.print(table)

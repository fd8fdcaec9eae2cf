"""From the command line to one call: typed options, exit codes, errors of one sentence."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jsonargparse
import yaml
from rich.console import Console
from rich.table import Table

from unianom.errors import OptionError, UnianomError
from unianom.serialise import to_plain

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
        known = _user_error(error)
        if isinstance(known, OptionError):
            _exit(WRONG_OPTIONS, str(known))
        if known is not None:
            _exit(FAILED, str(known))
        _exit(FAILED, f"{type(error).__name__}: {_first_line(error)} (unexpected; --debug shows where)")
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
    try:
        config = parser.parse_args(_normalise(parser, arguments))
        return _instance(parser, config, options)
    except jsonargparse.ArgumentError as error:
        raise OptionError(_explain(str(error), parser)) from error


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
    """Dashes in names to underscores; a plain `a,b` where a list is wanted to `[a,b]`."""
    lists = {
        option
        for action in parser._actions
        for option in action.option_strings
        if typing.get_origin(getattr(action, "_typehint", None)) in (tuple, list)
    }
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if equals and name in lists and not value.startswith("["):
                value = f"[{value}]"
            result.append(name + equals + value)
        elif result and result[-1] in lists and not argument.startswith("["):
            result.append(f"[{argument}]")
        else:
            result.append(argument)
    return result


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """The parser's message on one line, with the nearest known option where one is unknown."""
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    unknown = re.search(
        r"(?:unrecognized arguments: --|does not accept option '|[Uu]nknown key '?|Key ')([\w.\-]+)", message
    )
    if unknown:
        known = [
            option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")
        ]
        near = difflib.get_close_matches(unknown[1], known, 1, 0.5)
        leaf = difflib.get_close_matches(unknown[1].split(".")[-1], {k.split(".")[-1]: k for k in known}, 1, 0.6)
        if not near and leaf:
            near = [k for k in known if k.split(".")[-1] == leaf[0]][:1]
        if near:
            message += f"; did you mean --{near[0]}?"
    return message


def _summary(options: type) -> str:
    return (options.__doc__ or "").split("\n\n")[0]


def _user_error(error: BaseException) -> UnianomError | None:
    """The error meant for the user inside what Ray and others wrapped around it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UnianomError):
            return current
        if isinstance(current, OSError) and current.errno == errno.ENOSPC:
            where = f" at {current.filename}" if current.filename else ""
            return UnianomError(f"the disk is full{where}; free space and run the same command again, it continues")
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # what Ray still has running must not hold up the exit of a failed job
    sys.exit(code)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], footer: int = 0) -> None:
    """Print a table; the last `footer` rows stand apart (means, unions)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number >= len(rows) - footer else None)
    wide = Console(highlight=False, width=max(console.width, 160)) if not console.is_terminal else console
    wide.print(table)


def dump_options(options: Any) -> str:
    """The resolved options as YAML, as `--config` takes them."""
    return yaml.safe_dump(to_plain(options), sort_keys=False)


def environment(name: str) -> str | None:
    """An environment variable, None if unset or empty."""
    return os.environ.get(name) or None

"""From the command line to one call: typed options, exit codes, errors of one sentence."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipelines.runtime.console import console, print_table
from pipelines.runtime.errors import reason, user_error, worker_error
from pipelines.runtime.exit_codes import DONE, FAILED, WRONG_OPTIONS, show
from pipelines.runtime.given_options import GivenOptions
from pipelines.runtime.signals import StopSignals
from unianom.errors import OptionError
from unianom.written import dump_yaml

__all__ = ["console", "parse", "print_table", "run"]


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
    if arguments[:1] == ["--complete"]:
        from pipelines.runtime.completion import candidates

        show("\n".join(candidates(options, arguments[1:])))
    if arguments == ["--reference"]:
        from pipelines.runtime.reference import reference_page

        show(reference_page(options, Path(sys.argv[0]).stem.rstrip("_"), main.__globals__["__doc__"]).rstrip("\n"))
    stops = StopSignals()
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


def parse(options: type | dict[str, type], arguments: Sequence[str]) -> Any:
    """Build the options dataclass from command-line arguments and `--config` YAML files.

    Every value is read once, for the type of its option: where that is text, what was typed is the text. (Parsers that
    read values as YAML before they know their type lose a name such as 007.)

    Raises:
        OptionError: unknown, missing or refused options; names the nearest known one.
    """
    arguments, program = list(arguments), sys.argv[0]
    if isinstance(options, dict):
        name, *arguments = _chosen(options, arguments)
        options, program = options[name], f"{program} {name}"
    given = GivenOptions(options)
    given.read(arguments)
    if given.asks in ("help", "help_all"):
        from pipelines.runtime.help import help_text

        show(help_text(options, program, everything=given.asks == "help_all"))
    if given.asks == "print_config":
        show(dump_yaml(given.printed(), default_flow_style=False).rstrip("\n"))
    return given.instance()


def _chosen(choices: dict[str, type], arguments: list[str]) -> list[str]:
    """Return the arguments, the first of which is one of the choices."""
    names = ", ".join(sorted(choices))
    if arguments and arguments[0] in ("-h", "--help", "--help-all", "--help_all"):
        from pipelines.runtime.help import choices_text

        show(choices_text(choices, sys.argv[0]))
    if not arguments or arguments[0].startswith("-"):
        raise OptionError(f"the first argument must be one of: {names}")
    if arguments[0] not in choices:
        near = difflib.get_close_matches(arguments[0], choices, 1)
        raise OptionError(
            f"unknown '{arguments[0]}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {names}")
        )
    return arguments


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)

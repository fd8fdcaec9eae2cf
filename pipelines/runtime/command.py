"""The console command `unianom`: every file in a folder of jobs is one of its commands.

Nothing here imports a job before it is chosen, so that the list of jobs and the completion of their names are quick.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pipelines.runtime.exit_codes import DONE, WRONG_OPTIONS, show

PROGRAM = "unianom"
COMPLETE = "complete"
"""Word after which the shells ask for completions; it is in no list."""
SHELLS = ("bash", "zsh", "fish")


def run_command(folder: Path, groups: Mapping[str, Sequence[str]], argv: Sequence[str] | None = None) -> NoReturn:
    """List the jobs of a folder, or run one of them as `python FOLDER/NAME.py` would; exits with its code.

    Args:
        folder: of the jobs, which is a package.
        groups: headings of the list, and the names below each in their order.
        argv: arguments; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    jobs = find_jobs(folder)
    first, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if first in ("-h", "--help", "--help-all", "help"):
        show(listed(jobs, groups))
    if first == "--version":
        from unianom import __version__

        show(f"{PROGRAM} {__version__}")
    if first == "completion":
        _show_completion(rest)
    if first == COMPLETE and len(rest) < 2:
        show("\n".join(_starting_with(rest[-1] if rest else "", [*jobs, "completion", "--help", "--version"])))
    if first == COMPLETE and rest[0] == "completion":
        show("\n".join(_starting_with(rest[-1], SHELLS) if len(rest) == 2 else ()))
    complete = first == COMPLETE
    named, arguments = (rest[0], ["--complete", *rest[1:]]) if complete else (first, rest)
    name = named.replace("-", "_")
    if name in jobs:
        sys.argv = [f"{PROGRAM} {name}", *arguments]
        runpy.run_module(f"{folder.name}.{jobs[name].stem}", run_name="__main__")
    elif not complete:
        near = difflib.get_close_matches(name, [*jobs, "completion"], 1)
        _refuse(f"unknown job '{first}'" + (f"; did you mean '{near[0]}'?" if near else f"; {PROGRAM} lists the jobs"))
    sys.exit(DONE)


def find_jobs(folder: Path) -> dict[str, Path]:
    """Return the file of each job by its name, which is the file's, without an underscore at its end.

    With that underscore a job may have the name of a module of Python, which `python jobs/NAME.py` would else hide.
    """
    files = (path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_"))
    return {path.stem.rstrip("_"): path for path in files}


def listed(jobs: Mapping[str, Path], groups: Mapping[str, Sequence[str]]) -> str:
    """Return the list of jobs, each with the first line of its docstring."""
    named = {name for names in groups.values() for name in names}
    headed = {**groups, "Others": [name for name in jobs if name not in named]}
    width = max(map(len, jobs)) + 2
    lines = [f"usage: {PROGRAM} NAME [options]"]
    for heading, names in headed.items():
        there = [name for name in names if name in jobs]
        if there:
            lines += ["", f"{heading}:", *(f"  {name:{width}}{_first_line(jobs[name])}" for name in there)]
    shells = ", ".join(SHELLS)
    return "\n".join(
        [
            *lines,
            "",
            f"{PROGRAM} NAME --help shows a job's usual options, --help-all all of them.",
            f"{PROGRAM} completion SHELL prints completion of all this for a shell ({shells}).",
        ]
    )


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def _starting_with(typed: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(typed.replace("-", "_")) or name.startswith(typed)]


def _show_completion(arguments: list[str]) -> NoReturn:
    from pipelines.runtime.completion import script

    if arguments[:1] in (["-h"], ["--help"]):
        show(f"usage: {PROGRAM} completion SHELL\n\nPrint completion for a shell: {', '.join(SHELLS)}.")
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        _refuse(f"name one shell, such as {PROGRAM} completion bash; known: {', '.join(SHELLS)}")
    show(script(arguments[0]).rstrip("\n"))


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(WRONG_OPTIONS)

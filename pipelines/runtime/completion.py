"""Shell completion: the scripts that shells load, and what they ask of a job as it is typed."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from pipelines.runtime.given_options import option_fields
from pipelines.runtime.recipes import recipe_names

OF_ANY_JOB = ("config", "print_config", "help", "help-all", "debug")

# Where nothing is found, a shell completes the names of files. A name that ends in "." is a group of options, after
# which one goes on typing, so no blank follows it.
SCRIPTS = {
    "bash": """\
_unianom() {
    local IFS=$'\\n'
    COMPREPLY=($(unianom complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *. ]]; then
        compopt -o nospace
    fi
}
complete -o default -F _unianom unianom
""",
    "zsh": """\
#compdef unianom
_unianom() {
    local -a found
    found=("${(@f)$(unianom complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then
        compadd -- ${found:#*.}
        compadd -S '' -- ${(M)found:#*.}
    else
        _files
    fi
}
if [[ $funcstack[1] == _unianom ]]; then _unianom "$@"; else compdef _unianom unianom; fi
""",
    "fish": """\
function __unianom_complete
    unianom complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c unianom -n 'test (count (commandline -opc)) -eq 1' -f -a '(__unianom_complete)'
complete -c unianom -n 'test (count (commandline -opc)) -gt 1' -a '(__unianom_complete)'
""",
}


def script(shell: str) -> str:
    """Return what a shell is to load, by the shell's name."""
    return SCRIPTS[shell]


def candidates(options: type | Mapping[str, type], words: Sequence[str]) -> list[str]:
    """Return what the last of the words typed after a job's name may become.

    Args:
        options: what the job takes; see `pipelines.runtime.cli.run`.
        words: as the shell splits them (bash at "=", too); the last is being typed and may be empty.
    """
    *before, typed = words or [""]
    if typed == "=":
        before, typed = [*before, typed], ""
    if isinstance(options, Mapping):
        if not before:
            return [name for name in (*sorted(options), "--help") if name.startswith(typed)]
        if before[0] not in options:
            return []
        options, before = options[before[0]], before[1:]
    known = dict(option_fields(options))
    if typed.startswith("-"):
        name, equals, value = typed.partition("=")
        if equals:
            return [f"{name}={found}" for found in _values(name, known) if found.startswith(value)]
        return _names(typed, known)
    option = next((word for word in reversed(before) if word != "="), "")
    return [found for found in _values(option, known) if found.startswith(typed)]


def _names(typed: str, known: Mapping[str, Any]) -> list[str]:
    """Return options whose names begin so; of those in a group, the group's name, until that is typed."""
    wanted = typed.lstrip("-").replace("-", "_")
    depth = wanted.count(".") + 1
    found: dict[str, None] = {}
    for name in (*known, *OF_ANY_JOB):
        if name.replace("-", "_").startswith(wanted):
            parts = name.split(".")
            found[".".join(parts[:depth]) + ("." if len(parts) > depth else "")] = None
    dashes = "-" in typed.lstrip("-")  # as one who types dashes has it
    return [f"--{name.replace('_', '-') if dashes else name}" for name in found]


def _values(argument: str, known: Mapping[str, Any]) -> list[str]:
    """Return the values of an option that can be listed."""
    name = argument.removeprefix("--").replace("-", "_") if argument.startswith("--") else ""
    if name == "config":
        return recipe_names()
    if name not in known:
        return []
    hint, metadata = known[name]
    return [*metadata.get("names", ()), *dict.fromkeys(_listed(hint))]


def _listed(hint: Any) -> list[str]:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return [str(value) for value in inner]
    if kind in (Union, types.UnionType):
        found = [value for choice in inner if choice is not type(None) for value in _listed(choice)]
        return [*found, "null"] if found and type(None) in inner else found
    if kind is Annotated or kind is tuple:
        return _listed(inner[0])
    return ["true", "false"] if hint is bool else []

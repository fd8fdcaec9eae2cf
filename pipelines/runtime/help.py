"""The help of a job, from the docstrings and fields of its options: the usual ones in short, or all in full."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union

import docstring_parser

from pipelines.runtime.given_options import default_of
from unianom.options import hints_of, in_words, open_options, to_plain
from unianom.written import dump_yaml

WIDEST = 100
"""Columns of the text at most; a terminal that has fewer is filled."""

NOT_SAID = ("null", "false", "''", "[]", "{}", "")
"""Defaults that go without saying in short."""

OF_ANY_JOB = {
    "config": "YAML file of options, or a recipe's name; later arguments override it",
    "print_config": "print all options as such a file, and exit",
}


@dataclass(frozen=True)
class Option:
    """One option as help shows it.

    Attributes:
        name: with its groups.
        text: what its docstring says.
        takes: values, in words.
        names: values that can be listed.
        default: as YAML; None where it is required, empty where others decide.
        usual: whether it is among the usual ones.
    """

    name: str
    text: str
    takes: str
    names: tuple[str, ...]
    default: str | None
    usual: bool

    @property
    def in_full(self) -> str:
        said = {None: "required", "": "default: by the preset or other options"}.get(
            self.default, f"default: {self.default}"
        )
        return f"{self.text} ({self.takes}; {said})".strip()

    def in_short(self, width: int) -> str:
        """Say it in one line of a width if that holds it, else as the first clause of its text."""
        whole = re.sub(r" \(e\.g\.[^)]*\)", "", self.text.removesuffix("."))
        said = self._with_values(whole)
        return said if len(said) <= width else self._with_values(_first_clause(whole))

    def _with_values(self, text: str) -> str:
        """Add in brackets the values that a text does not name yet, and a default that is worth a word."""
        unsaid = any(f'"{name}"' not in text for name in self.names)
        said = [f"one of {', '.join(self.names)}"] if unsaid else []
        if self.default is not None and self.default not in NOT_SAID:
            said.append(f"default: {self.default}")
        return text + (f" ({'; '.join(said)})" if said else "")


class Group(NamedTuple):
    """Options that are given by one name and a dot.

    Attributes:
        name: dotted; empty for those that have none.
        text: what the group is.
        options: its own, without those of groups within it.
    """

    name: str
    text: str
    options: list[Option]


def help_text(options: type, program: str, everything: bool) -> str:
    """Return what a job does and what it takes.

    Args:
        options: its options class.
        program: how it is called.
        everything: all options in full, group by group, in place of the usual ones (`Options.usual`) in short.
    """
    groups = list(option_groups(options))
    whole = [option for _, _, inside in groups for option in inside]
    places = getattr(options, "positional", ())
    lines = [*_wrapped(_usage(program, whole, places), others="    "), ""]
    if everything:
        lines += [*_wrapped(summary(options)), ""]
        for name, said, inside in groups:
            if inside:
                lines += [f"{name or 'options'}:", *_wrapped(said, "  ")]
                lines += [""] if said else []
                lines += _columns({option.name: option.in_full for option in inside}, 24)
                lines += [""]
        lines += _columns({**OF_ANY_JOB, "debug": "show the traceback of an error"}, 24)
        return "\n".join([*lines, "", "Names take '-' or '_' alike."])
    shown = [option for option in whole if option.usual or option.default is None]
    column = min(max([len(option.name) for option in shown] + [6]) + 6, 32)
    topics: dict[str, dict[str, str]] = {"required": {}, "options": {}}
    for option in shown:
        group = option.name.partition(".")[0] if "." in option.name else "options"
        text = option.in_short(_width() - column)
        topics.setdefault("required" if option.default is None else group, {})[option.name] = text
    topics["options"]["config"] = _first_clause(OF_ANY_JOB["config"])
    lines += _wrapped(_first_clause(summary(options)) + ".")
    for topic, texts in topics.items():
        if texts:
            lines += ["", f"{topic}:", *_columns(texts, column)]
    more = f"--help-all shows all {len(whole)} options" if len(shown) < len(whole) else "--help-all says more of each"
    return "\n".join([*lines, "", *_wrapped(more + "; --print_config prints them as a file for --config.")])


def choices_text(choices: Mapping[str, type], program: str) -> str:
    """Return what the first argument of a job may be."""
    width = max(map(len, choices)) + 4
    lines = [f"usage: {program} NAME [options]", "", "NAME is one of:"]
    for name, options in sorted(choices.items()):
        lines += _wrapped(_first_clause(summary(of_choice(options))), f"  {name:{width - 2}}", " " * width)
    return "\n".join([*lines, "", f"{program} NAME --help shows its usual options, --help-all all of them."])


def of_choice(options: type) -> type:
    """Return the class that says what a choice is: that of its method's options, or its own."""
    method = hints_of(options).get("method")
    return method if isinstance(method, type) and dataclasses.is_dataclass(method) else options


def summary(options: type) -> str:
    """Return the first paragraph of a class's docstring, on one line."""
    return " ".join((options.__doc__ or "").split("\n\n")[0].split())


def option_groups(cls: Any, prefix: str = "", base: Any = None, usual: bool = True) -> Iterator[Group]:
    """Yield a class's options, then those of the groups in it."""
    texts: dict[str, str] = {}
    for documented in reversed(cls.__mro__):  # a class says of inherited options what differs
        found = docstring_parser.parse(documented.__doc__ or "").params
        texts |= {name: p.description or "" for p in found for name in p.arg_name.split(", ")}
    named = getattr(cls, "usual", None)
    own: list[Option] = []
    groups: list[tuple[str, Any, Any, bool]] = []
    for field in dataclasses.fields(cls):
        hint, default = hints_of(cls)[field.name], default_of(field, base)
        shown = usual and (named is None or field.name in named)
        if dataclasses.is_dataclass(hint):
            groups.append((f"{prefix}{field.name}", hint, default, shown))
            continue
        said: str | None = None
        if field.name in open_options(cls):
            said = ""
        elif default is not dataclasses.MISSING:
            said = dump_yaml(to_plain(default), default_flow_style=True).removesuffix("...\n").strip()
        text, names = " ".join(texts.get(field.name, "").split()), field.metadata.get("names", ())
        takes = f"one of {', '.join(names)}" if names else in_words(hint)
        own.append(Option(f"{prefix}{field.name}", text, takes, names or _choices(hint), said, shown))
    order = {name: number for number, name in enumerate(named or ())}
    own.sort(key=lambda option: order.get(option.name.rpartition(".")[2], len(order)))
    yield Group(prefix[:-1], summary(cls) if prefix else "", own)
    for name, hint, default, shown in sorted(
        groups, key=lambda group: order.get(group[0].rpartition(".")[2], len(order))
    ):
        yield from option_groups(hint, f"{name}.", default, shown)


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values of a type that can be listed, but null."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return tuple(map(str, inner))
    if kind in (Annotated, Union, types.UnionType):
        return tuple(name for choice in inner for name in _choices(choice))
    return ()


def _usage(program: str, options: list[Option], places: tuple[str, ...]) -> str:
    by_place = "".join(f" {name.upper()}" for name in places)
    needed = "".join(f" --{o.name} VALUE" for o in options if o.default is None and o.name not in places)
    return f"usage: {program}{by_place}{needed} [options]"


_END = re.compile(r"(?<!e\.g)(?<!i\.e)[;.](\s|$)")


def _first_clause(text: str) -> str:
    """Return a text up to its first full stop or semicolon outside brackets."""
    for end in _END.finditer(text):
        before = text[: end.start()]
        if before.count("(") == before.count(")") and before.count("{") == before.count("}"):
            return before
    return text


def _columns(texts: Mapping[str, str], width: int) -> list[str]:
    """Return lines with the options' names in the first column, of a width in characters, and their texts beside."""
    lines: list[str] = []
    for name, text in texts.items():
        head = f"  --{name}  "
        if len(head) > width:
            lines.append(head.rstrip())
            head = ""
        lines += _wrapped(text, f"{head:{width}}", " " * width)
    return lines


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, WIDEST))


def _wrapped(text: str, first: str = "", others: str | None = None) -> list[str]:
    others = first if others is None else others
    return textwrap.wrap(
        text, _width(), initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )

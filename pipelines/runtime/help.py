"""The help of a job, from the docstrings and fields of its options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import docstring_parser

from pipelines.runtime.given_options import default_of
from unianom.options import hints_of, in_words, open_options, to_plain
from unianom.written import dump_yaml


def print_help(options: type) -> None:
    """Print what a job does and every option: its text, what it takes, and its default, group by group."""
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
            hint, default = hints_of(cls)[field.name], default_of(field, base)
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
            add(parser.add_argument_group(name[:-1], _summary(hint)), hint, name, default)

    add(parser, options, "", None)
    parser.print_help()


def _summary(options: type) -> str:
    return (options.__doc__ or "").split("\n\n")[0]

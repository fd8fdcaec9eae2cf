"""A layout and its options as a command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any


def option_arguments(layout: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a layout and its options as arguments of a command line, not yet quoted for a shell."""
    arguments = ["--layout", layout]
    for name, value in options.items():
        arguments += [f"--layout_options.{name}", _written(value)]
    return tuple(arguments)


def _written(value: Any) -> str:
    """Return a value as it is typed: text as it is, lists in brackets."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_item(str(each)) for each in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or text != text.strip() or text[0] in "[{'\"" else text


def _item(text: str) -> str:
    return text if re.fullmatch(r"[^\W\d][\w./-]*|\d+", text) else json.dumps(text, ensure_ascii=False)


def command_line(program: str, source: str, arguments: Iterable[str]) -> str:
    """Return a command line, quoted for a shell."""
    return f"{program} {shlex.join([source, *arguments])}"

"""Names in error messages, and names that are chosen or compared."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

from unianom.errors import OptionError


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return names for an error message: "a, b and 3 more"."""
    names = list(names)
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the question "did you mean", in brackets after a blank, if a known name resembles `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def choose(wanted: Iterable[str], found: list[str], where: str) -> list[str]:
    """Return the wanted categories in the order found, or all if none is named.

    Raises:
        OptionError: a wanted category is not there.
    """
    wanted = tuple(wanted)
    for name in wanted:
        if name not in found:
            raise OptionError(f"no category '{name}' in {where}{nearest(name, found)}; found: {listed(found)}")
    return [name for name in found if not wanted or name in wanted]


def same_name(text: str) -> str:
    """Return a name to find masks by: with accents composed in one way, as macOS and others compose them in two."""
    return unicodedata.normalize("NFC", text)

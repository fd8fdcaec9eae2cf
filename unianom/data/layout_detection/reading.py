"""How a source can be read, and what to ask where names do not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Taken:
    """Folders that are taken for the same.

    Attributes:
        shown: what to call them, such as "<category>/test/good".
        meaning: what they are taken for.
        paths: of the folders, from the root of the source; images in and below them count.
    """

    shown: str
    meaning: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read a source.

    Attributes:
        layout: name of the layout.
        options: of the layout, as plain data.
        taken: which folder was taken for what.
        decisions: further decisions in words.
        warnings: what may be wrong with it.
        example: options that only people can give, with values that could be right.
    """

    layout: str
    options: Mapping[str, Any]
    taken: Sequence[Taken] = ()
    decisions: Sequence[str] = ()
    warnings: Sequence[str] = ()
    example: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """A way to say what names do not: what one would mean by it, and layout and options."""

    words: str
    layout: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Unclear(Exception):
    """Names do not tell how a source is laid out.

    Args:
        reason: a sentence without its end.
        ways: to say it.
    """

    def __init__(self, reason: str, ways: Sequence[Way]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ways = tuple(ways)

"""What a layout is: its options, and a function that lists the samples of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

from annotated_types import Interval

from unianom.data.layouts.names import listed, nearest
from unianom.data.layouts.source import Source
from unianom.data.schema import SampleRef
from unianom.errors import OptionError
from unianom.options import Options
from unianom.written import natural, typed, words

MaskThreshold = Annotated[int, Interval(ge=0, lt=255)]
"""Mask values of 0…255 above this are anomalous."""


@dataclass(frozen=True)
class LayoutOptions(Options):
    """Options of every layout.

    Args:
        dataset: name of the data set, the first part of every sample_id; empty takes the layout's own choice.
    """

    dataset: str = ""

    def check(self) -> None:
        if "/" in self.dataset or self.dataset != self.dataset.strip():
            raise OptionError(f"dataset='{self.dataset}' must be a plain name without '/' and outer blanks")


@dataclass(frozen=True)
class Recognised:
    """How a layout would read a source that it takes for its own.

    Attributes:
        options: of the layout, as plain data.
        decisions: what was taken for what, in words.
        example: options that only people can give, with values that could be right.
    """

    options: dict[str, Any]
    decisions: tuple[str, ...]
    example: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies in folders or files.

    Attributes:
        name: name in `LAYOUTS`.
        options: options dataclass, a `LayoutOptions`.
        samples: yields the samples of a source lazily, in an order that is always the same.
        description: one line for lists and help texts.
        recognise: tells by few listings whether a source is certainly laid out this way, None if it is not; None where
            names alone cannot tell.
    """

    name: str
    options: type[LayoutOptions]
    samples: Callable[[Source, Any], Iterator[SampleRef]]
    description: str
    recognise: Callable[[Source], Recognised | None] | None = None


def make_options(layout: Layout, values: Mapping[str, Any]) -> LayoutOptions:
    """Return options of a layout from plain values, as a YAML file holds them or `unianom.written.read_yaml` gives
    them.

    Raises:
        OptionError: an unknown key, or a value of the wrong type.
    """
    hints = get_type_hints(layout.options)
    known = [each.name for each in fields(layout.options)]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise OptionError(
                f"layout {layout.name} has no option '{key}'{nearest(str(key), known)}; its options: {listed(known)}"
            )
        try:
            arguments[key] = typed(value, hints[key])
        except OptionError as error:
            raise OptionError(
                f"option {key} of layout {layout.name} cannot be {natural(value)!r}; it takes {words(hints[key])}"
            ) from error
    return layout.options(**arguments)

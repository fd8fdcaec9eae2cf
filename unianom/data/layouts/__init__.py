"""Published and common layouts of data sets: each walks a source and yields its samples without opening an image.

The order of the samples, and every split a layout draws itself, depend on names and seeds only. A module of this
package that has a `LAYOUT` is a layout; nothing else lists them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from unianom.data.layouts.base import Layout, LayoutOptions, make_options
from unianom.data.layouts.class_lists import IMAGENET_30, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.layouts.left_out import LeftOut
from unianom.data.layouts.names import nearest
from unianom.data.layouts.source import Source
from unianom.data.schema import SampleRef
from unianom.errors import DataError, OptionError

__all__ = [
    "IMAGENET_30",
    "LAYOUTS",
    "SPECIES_60",
    "SPECIES_60_SPLITS",
    "Layout",
    "LayoutOptions",
    "LeftOut",
    "Source",
    "iter_samples",
    "make_options",
]


def find_layouts() -> dict[str, Layout]:
    """Return every layout by name: the `LAYOUT` of each module of this package that has one."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    found = [module.LAYOUT for module in modules if hasattr(module, "LAYOUT")]
    return {layout.name: layout for layout in sorted(found, key=lambda layout: layout.name)}


LAYOUTS = find_layouts()
"""Every layout by name."""


def iter_samples(
    layout: str,
    source: str | os.PathLike[str],
    options: LayoutOptions | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[SampleRef]:
    """Return samples of a source, lazily and always in the same order.

    Args:
        layout: name in `LAYOUTS`.
        source: root folder as local path or URI; for `merged` the YAML file.
        options: an instance of the layout's options class; None takes the defaults.
        left_out: is told, while iterating, what lies in the places of images and is not taken.

    Raises:
        OptionError: no such layout, or options of another one. Also while iterating: an option that does not fit what
            is found.
        DataError: unknown URI scheme. Also while iterating: the source is missing, incomplete, empty or laid out
            differently.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"no layout '{layout}'{nearest(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    options = chosen.options() if options is None else options
    if type(options) is not chosen.options:
        raise OptionError(f"layout {layout} takes {chosen.options.__name__}, not {type(options).__name__}")
    return _never_empty(chosen, Source.open(source, options.dataset, left_out), options)


def _never_empty(layout: Layout, source: Source, options: LayoutOptions) -> Iterator[SampleRef]:
    empty = True
    for sample in layout.samples(source, options):
        empty = False
        yield sample
    if empty:
        raise DataError(f"no samples in {source.uri()} as layout {layout.name}; found: {source.found()}")

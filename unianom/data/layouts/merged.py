"""Several sources as one, such as the 30 classes of MVTec AD, BTAD and VisA, named by a YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised, make_options
from unianom.data.layouts.names import nearest
from unianom.data.layouts.source import Source
from unianom.data.schema import SampleRef
from unianom.errors import DataError, OptionError
from unianom.written import natural, read_yaml

EXPECTED = "a list of {layout: …, source: …} with, where wanted, options, dataset and category_prefix"
_KEYS = ("layout", "source", "options", "dataset", "category_prefix")


@dataclass(frozen=True)
class MergedOptions(LayoutOptions):
    """Options of the `merged` layout.

    Args:
        dataset: one data set name for all samples, whose sample_ids then begin with it; empty keeps that of each
            source.
    """


def samples(source: Source, options: MergedOptions) -> Iterator[SampleRef]:
    """Yield samples of all sources in the order of the YAML file, which is the root.

    Relative sources are taken from the folder of the YAML file. Data set names must differ, which keeps the
    sample_ids unique; categories of one name in two sources become one category.
    """
    # Imported here because `merged` is itself one of the registered layouts.
    from unianom.data.layouts import LAYOUTS, iter_samples

    parts = _read_parts(source, LAYOUTS)
    named_by: dict[str, int] = {}
    for number, part in enumerate(parts, 1):
        for sample in iter_samples(part.layout, part.source, part.options, source.left_out):
            if named_by.setdefault(sample.dataset, number) != number:
                raise DataError(
                    f"sources {named_by[sample.dataset]} and {number} of {source.uri()} are both data set "
                    f"'{sample.dataset}'; give one of them a dataset name of its own"
                )
            yield replace(
                sample,
                category=part.category_prefix + sample.category,
                dataset=options.dataset or sample.dataset,
                sample_id=f"{options.dataset}/{sample.sample_id}" if options.dataset else sample.sample_id,
            )


@dataclass(frozen=True)
class _Part:
    layout: str
    source: str
    options: LayoutOptions
    category_prefix: str


def _read_parts(source: Source, layouts: Mapping[str, Layout]) -> list[_Part]:
    """Return the items of the YAML file, all checked before the first is listed."""
    where = source.uri()
    try:
        items = read_yaml(source.read())
    except yaml.YAMLError as error:
        raise DataError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} does not name sources; it should hold {EXPECTED}")
    return [_part(source, item, f"source {number} of {where}", layouts) for number, item in enumerate(items, 1)]


def _part(source: Source, item: Any, where: str, layouts: Mapping[str, Layout]) -> _Part:
    if not isinstance(item, dict) or not {"layout", "source"} <= set(item):
        raise DataError(f"{where} lacks a layout or a source; the file should hold {EXPECTED}")
    for key, value in item.items():
        if key not in _KEYS:
            raise OptionError(f"{where}: unknown key '{key}'{nearest(str(key), _KEYS)}; known: {', '.join(_KEYS)}")
        if not value or not isinstance(value, dict if key == "options" else str):
            raise OptionError(f"{where}: {key} cannot be {natural(value)!r}")
    item = {key: value if key == "options" else str(value) for key, value in item.items()}
    values = dict(item.get("options", {}))
    if "dataset" in item:
        if "dataset" in values:
            raise OptionError(f"{where} names its dataset twice, in dataset and in options; keep one")
        values["dataset"] = item["dataset"]
    name = item["layout"]
    if name == "merged" or name not in layouts:
        known = [layout for layout in layouts if layout != "merged"]
        raise OptionError(f"{where}: no layout '{name}' to merge{nearest(name, known)}; known: {', '.join(known)}")
    try:
        part_options = make_options(layouts[name], values)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    return _Part(name, source.at("..").locate(item["source"]), part_options, item.get("category_prefix", ""))


def recognise(source: Source) -> Recognised | None:
    """Take a YAML file for this layout."""
    if not (source.name.lower().endswith((".yaml", ".yml")) and source.has_file("")):
        return None
    return Recognised({}, ("every item of the file → a source with its layout",))


LAYOUT = Layout("merged", MergedOptions, samples, "several sources as one, named by a YAML file", recognise)

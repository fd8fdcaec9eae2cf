"""BTAD, the beanTech anomaly detection data set (Mishra et al., ISIE 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.mvtec import category_samples, decided, find_categories, is_category
from unianom.data.layouts.names import choose
from unianom.data.layouts.source import Source
from unianom.data.schema import SampleRef

EXPECTED = "the btad layout: {01,02,03}/train/ok, {01,02,03}/test/{ok,ko}, {01,02,03}/ground_truth/ko"


@dataclass(frozen=True)
class BtadOptions(LayoutOptions):
    """Options of the `btad` layout.

    Args:
        dataset: name of the data set.
        categories: categories to read, of "01", "02", "03"; empty reads all.
    """

    dataset: str = "btad"
    categories: tuple[str, ...] = ()


def samples(source: Source, options: BtadOptions) -> Iterator[SampleRef]:
    """Yield samples of BTAD as published: bmp and png files, its few anomalous training images left as they are."""
    source, categories = find_categories(source, "ok", EXPECTED)
    for category in choose(options.categories, categories, source.uri()):
        yield from category_samples(source, category, "ok", EXPECTED)


def recognise(source: Source) -> Recognised | None:
    """Take the folders 01, 02 and 03, or some of them, with train/ok and test/ko for this layout."""
    folders = source.folders()
    if not folders or not {"01", "02", "03"}.issuperset(folders):
        return None
    if not all(is_category(source, name, "ok") and source.has_folder(f"{name}/test/ko") for name in folders):
        return None
    return Recognised({}, tuple(decided("ok", folders, alone=False)))


LAYOUT = Layout("btad", BtadOptions, samples, "BTAD, the beanTech products 01, 02 and 03", recognise)

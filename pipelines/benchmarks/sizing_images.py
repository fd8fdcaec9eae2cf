"""What is measured for a sizing: some images, and the model that scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.benchmarks.simulated_device import draw_files
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.data.image_files import read_image_file
from pipelines.data.image_source import ImageSource
from pipelines.data.list_images import iter_images
from pipelines.data.options import ListingOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.scored_images import scored_images
from pipelines.runtime.model_set import ModelSet
from unianom import files
from unianom.configs import CONFIGS
from unianom.configs.backbone import BackboneConfig
from unianom.data.image import ImageLimits, decode_prepared
from unianom.data.image.decode import open_image
from unianom.data.image_listing import ImageListing
from unianom.data.row_ranges import MOST_ROWS, RowRange
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, ImageError
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod, Method

T = TypeVar("T")

LOOKED_AT = 10_000
"""Images of a listing among which the sample is spread; more are not listed, for that may take long."""

READ_FILES = 2000
"""Listed images that the disk is measured by, at most, unless the sample is larger."""

DRAWN_SIDE = 224
"""Height and width of drawn images in pixels."""

BANK_IMAGES = 16
"""Images at least, if there are so many, whose patches a bank is drawn from."""

FACTS_OF = 32
"""Images whose size is looked at."""


@dataclass(frozen=True)
class SizedImages:
    """Images that are measured.

    Attributes:
        named: what they are, in words.
        rows: what holds them.
        whole: ranges of rows of these that are read.
        ranges: those that are computed on; the last one may be shorter.
        stored: files that hold them, or others of the listing, too; paths or URIs.
        bytes: of an encoded image.
        short_side: median of the images, in pixels.
        jpeg: whether most of them are JPEG files.
        examples: some of them, on which an engine is tried.
    """

    named: str
    rows: ShardSet | ImageListing
    whole: Sequence[RowRange]
    ranges: Sequence[RowRange]
    stored: Sequence[str]
    bytes: float
    short_side: float
    jpeg: bool
    examples: ImageSource


def sized_images(options: SizingBenchmark, model_set: ModelSet, folder: str, sample: int) -> SizedImages:
    """Choose the images that are measured.

    Args:
        options: say where they lie.
        model_set: of one model.
        folder: for what is written of them; local.
        sample: how many, at least, where there are so many.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    models = model_set.descriptions()
    stored: list[str] = []
    if options.shards is not None:
        named = options.shards
        asked = ScoreOptions(model_set.uri, options.shards, output=folder, splits=(), limits=options.limits)
    else:
        table, stored, named = _listed(options, folder, sample)
        category = options.listing.category or models[0]["categories"][0]
        listing = ListingOptions(category=category)
        asked = ScoreOptions(model_set.uri, output=folder, images=(table,), listing=listing, limits=options.limits)
    opened = scored_images(asked, model_set, models)
    rows = opened.open(folder)
    whole = spread_ranges(rows.ranges(opened.selection, MOST_ROWS), sample)
    if isinstance(rows, ShardSet):
        stored = [files.join(rows.uri, part) for part in dict.fromkeys(within.part for within in whole)]
    contents = list(islice(encoded(rows, whole), FACTS_OF))
    sides, jpeg = _sides(contents, options.limits)
    return SizedImages(
        named=named,
        rows=rows,
        whole=whole,
        ranges=cut_ranges(whole, sample),
        stored=stored,
        bytes=float(np.mean([len(content) for content in contents])),
        short_side=float(np.median(sides)),
        jpeg=jpeg,
        examples=opened.examples(),
    )


def _listed(options: SizingBenchmark, folder: str, sample: int) -> tuple[str, list[str], str]:
    """Write a table of the images that are measured; return it, files that the disk is measured by, and what they are
    in words."""
    if options.images:
        with closing(iter_images(options.images, options.listing)) as images:
            found = [image.uri for image in islice(images, max(LOOKED_AT, sample))]
        if not found:
            raise DataError(f"no image in {', '.join(options.images)}; give folders or tables of images")
        chosen, stored = _spread(found, sample), _spread(found, max(READ_FILES, sample))
        named = ", ".join(options.images)
    else:
        drawn = Path(folder) / "drawn"
        drawn.mkdir()
        draw_files(drawn, sample, DRAWN_SIDE)
        chosen = stored = [str(file) for file in sorted(drawn.iterdir())]
        named = f"drawn JPEG files of {DRAWN_SIDE} × {DRAWN_SIDE}"
    table = Path(folder) / "images.parquet"
    pq.write_table(pa.table({"uri": chosen}), table)
    return str(table), stored, named


def _spread(found: Sequence[T], most: int) -> list[T]:
    """Return so many items, spread over all; or all, if there are fewer."""
    count = min(most, len(found))
    return [found[len(found) * number // count] for number in range(count)]


def spread_ranges(ranges: Sequence[RowRange], sample: int) -> list[RowRange]:
    """Return ranges that hold so many rows, if there are, spread over all."""
    mean = sum(within.rows for within in ranges) / len(ranges)
    count = max(1, round(sample / mean))
    return [
        replace(within, opens=False) for within in _spread(ranges, count)
    ]  # checksums of whole parts are no part of it


def cut_ranges(ranges: Sequence[RowRange], sample: int) -> list[RowRange]:
    """Return the first rows of these ranges, so many in all, of each as large a share."""
    most = -(-sample // len(ranges))
    return [replace(within, rows=min(within.rows, most)) for within in ranges]


def encoded(rows: ShardSet | ImageListing, ranges: Sequence[RowRange]) -> Iterator[bytes]:
    """Yield the files of images as they are stored, but those that cannot be fetched."""
    for within in ranges:
        if isinstance(rows, ShardSet):
            for batch in rows.read_range(within, Selection(), ["image"]):
                yield from batch["image"].to_pylist()
        else:
            for batch in rows.read_range(within, None, ["uri"]):
                for uri in batch["uri"].to_pylist():
                    try:
                        yield read_image_file(uri)
                    except ImageError:
                        continue


def _sides(contents: Sequence[bytes], limits: ImageLimits) -> tuple[list[int], bool]:
    """Return the shorter sides of images, and whether most of them are JPEG files.

    Raises:
        DataError: none of them can be read.
    """
    sides, formats = [], []
    for content in contents:
        try:
            file = open_image(content, limits)
        except ImageError:
            continue
        sides.append(min(file.image.size))
        formats.append(file.format)
    if not sides:
        raise DataError(f"none of the first {FACTS_OF} images can be read; look at them, or give others")
    return sides, 2 * formats.count("JPEG") > len(formats)


def make_method(options: SizingBenchmark) -> Method[Any]:
    """Return a method on a backbone with random weights, not fitted.

    Raises:
        OptionError, WeightsError: there is no such encoder, or the method cannot have it.
    """
    assert options.backbone is not None
    config = CONFIGS[options.method](backbone=BackboneConfig(options.backbone, weights="random"))
    return METHODS[options.method](config).eval()


@torch.inference_mode()
def drawn_bank(method: MemoryMethod, images: SizedImages, count: int, limits: ImageLimits) -> MemoryBank:
    """Return a memory bank of patches of images, so many drawn at random, or all if there are fewer."""
    found: list[np.ndarray] = []
    for content in encoded(images.rows, images.ranges):
        try:
            pixels = decode_prepared(content, method.input, limits)
        except ImageError:
            continue
        embedding = method.embed(normalise([pixels], method.input))
        found.append(embedding.patches[embedding.keep].float().numpy())
        if sum(map(len, found)) >= count and len(found) >= BANK_IMAGES:
            break
    patches = np.concatenate(found)
    chosen = np.random.default_rng(0).permutation(len(patches))[:count]
    return MemoryBank.build(patches[np.sort(chosen)], proposals=True)

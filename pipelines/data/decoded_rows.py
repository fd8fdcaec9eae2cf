"""Rows of shards or listings on their way to decoded images.

Without PyTorch, so that processes that only read start faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import numpy as np
import pyarrow as pa

from pipelines.data.fetch import STATUS
from pipelines.runtime.stage_clock import StageClock
from unianom.data.image import ImageLimits, InputPolicy, decode_upright, fit_image
from unianom.errors import ImageError


def same_model_batches(
    batches: Iterator[pa.RecordBatch], model_of: Callable[[str], str], size: int
) -> Iterator[tuple[str, pa.Table]]:
    """Cut rows into batches of `size`, in their order; a smaller one where the next row is of another model.

    Args:
        batches: rows with `category`.
        model_of: returns the model folder of a category.
        size: rows of a batch at most.

    Returns:
        Model folder and rows of each batch.
    """
    waiting: list[pa.RecordBatch] = []
    count, current = 0, ""
    for batch in batches:
        start = 0
        for model, run in groupby(map(model_of, batch["category"].to_pylist())):
            end = start + sum(1 for _ in run)
            if waiting and model != current:
                yield current, pa.Table.from_batches(waiting)
                waiting, count = [], 0
            current = model
            while start < end:
                taken = min(end - start, size - count)
                waiting.append(batch.slice(start, taken))
                start, count = start + taken, count + taken
                if count == size:
                    yield current, pa.Table.from_batches(waiting)
                    waiting, count = [], 0
    if waiting:
        yield current, pa.Table.from_batches(waiting)


def decode_fitted(
    data: bytes, policy: InputPolicy, limits: ImageLimits, clock: StageClock
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image file and scale it to a network's input; both are counted.

    Returns:
        S×S×3 uint8, and height and width of the file's image, upright.

    Raises:
        ImageError: it cannot be read.
    """
    with clock.stage("decode"):
        upright = decode_upright(data, policy, limits)
    with clock.stage("resize"):
        return fit_image(upright, policy), (upright.height, upright.width)


def is_listed(table: pa.Table) -> bool:
    """Return whether rows are of a listing, which knows nothing of its images before they are decoded."""
    return STATUS in table.column_names


def with_sizes(rows: pa.Table, sizes: np.ndarray, errors: Mapping[int, ImageError]) -> pa.Table:
    """Return rows with height and width of their images.

    Args:
        rows: B rows with these columns.
        sizes: B×2 int32, height and width.
        errors: why images could not be read, by the number of their row; their height and width are null.
    """
    missing = np.zeros(len(rows), bool)
    missing[list(errors)] = True
    for column, name in enumerate(("height", "width")):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, rows.schema.field(name), pa.array(sizes[:, column], mask=missing))
    return rows

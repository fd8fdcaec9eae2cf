"""Reading samples of shards as input of a method."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipelines.data.ingest import map_ahead
from unianom.data.image import ImageLimits, InputPolicy, decode_mask, decode_prepared, prepare_mask
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, ImageError
from unianom.methods import Method


def decode_row(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """A sample's image as S×S×3 uint8 input.

    Raises:
        DataError: it cannot be read under these limits, though ingest could under its own; names the sample.
    """
    try:
        return decode_prepared(row["image"], policy, limits)
    except ImageError as error:
        raise DataError(f"{row['sample_id']}: {error}; give --limits as at ingest, or leave the image out") from error


def decode_row_mask(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """A sample's mask as S×S bool, where `decode_row` has its image; nothing is marked in a normal one.

    Raises:
        DataError: the sample is anomalous and has no mask, or it cannot be read under these limits; names the sample.
    """
    if row["label"] == NORMAL:
        return np.zeros((policy.side, policy.side), bool)
    if row["mask"] is None:
        raise DataError(missing_masks([row["sample_id"]]))
    try:
        return prepare_mask(decode_mask(row["mask"], limits=limits), policy)
    except ImageError as error:
        raise DataError(
            f"mask of {row['sample_id']}: {error}; give --limits as at ingest, or leave the image out"
        ) from error


def missing_masks(sample_ids: list[str]) -> str:
    """What to tell of anomalous training images that need a mask and have none."""
    more = f" (and {len(sample_ids) - 1} more)" if len(sample_ids) > 1 else ""
    return (
        f"{sample_ids[0]}{more} is anomalous but has no mask, which the method learns from; add the mask, or leave the "
        f"image out, and run jobs/ingest.py again"
    )


class SampleReader:
    """Reads chosen samples of a part as network input, decoded ahead. What all passes over normals share."""

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        threads: int,
    ) -> None:
        self._shards, self._selection, self._chosen = shards, selection, chosen
        self._batch_size, self._limits = batch_size, limits
        self._pool = ThreadPoolExecutor(threads)

    def batches(self, part: str, method: Method) -> Iterator[torch.Tensor]:
        """B×3×S×S batches of the chosen samples, in the order of the part."""

        def prepare(row: dict[str, Any]) -> np.ndarray:
            return decode_row(row, method.input, self._limits)

        waiting: list[np.ndarray] = []
        for pixels in map_ahead(self._pool, prepare, self._rows(part), 2 * self._batch_size):
            waiting.append(pixels)
            if len(waiting) == self._batch_size:
                yield normalise(waiting, method.input).to(method.device)
                waiting = []
        if waiting:
            yield normalise(waiting, method.input).to(method.device)

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        for batch in self._shards.read(part, self._selection, ["sample_id", "image"]):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._chosen)

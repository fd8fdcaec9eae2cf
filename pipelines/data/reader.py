"""Reading samples of shards as input of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pipelines.data.ahead import map_ahead
from pipelines.data.timed_pool import TimedPool
from pipelines.runtime.stage_clock import StageClock
from unianom.data.image import ImageLimits, InputPolicy, decode_mask, decode_prepared, prepare_mask
from unianom.data.row_ranges import RowRange
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, ImageError


def decode_row(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """Decode a sample's image to S×S×3 uint8 input.

    Raises:
        DataError: it cannot be read under these limits, though ingest could under its own; names the sample.
    """
    try:
        return decode_prepared(row["image"], policy, limits)
    except ImageError as error:
        refuse_row(row, error)


def refuse_row(row: dict[str, Any], error: ImageError) -> NoReturn:
    """Raise the DataError of a job that cannot do without this sample's image."""
    advice = "raise it" if error.status == "timeout" else "give --limits as at ingest"
    raise DataError(f"{row['sample_id']}: {error}; {advice}, or leave the image out") from error


def decode_row_mask(row: dict[str, Any], policy: InputPolicy, limits: ImageLimits) -> np.ndarray:
    """Decode a sample's mask to S×S bool, aligned with the image of `decode_row`; a normal sample's marks nothing.

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
    """Return the error message for anomalous training images that need a mask and have none."""
    more = f" (and {len(sample_ids) - 1} more)" if len(sample_ids) > 1 else ""
    return (
        f"{sample_ids[0]}{more} is anomalous but has no mask, which the method learns from; add the mask, or leave the "
        f"image out, and run jobs/ingest.py again"
    )


class DecodedSample(NamedTuple):
    """A sample as input of a method.

    Attributes:
        pixels: S×S×3 uint8.
        mask: S×S bool; None where none was asked for.
        row: the columns asked for, by name.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    row: dict[str, Any]


class SampleReader:
    """Reads chosen samples of a range as network input, decoded ahead. What all passes over images share.

    Args:
        shards: where they lie.
        selection: which samples.
        chosen: sample_ids of those among them that are read; None for all.
        batch_size: samples at once.
        limits: what an image may cost.
        threads: images decoded at the same time.
    """

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str] | None,
        batch_size: int,
        limits: ImageLimits,
        threads: int,
    ) -> None:
        self._shards, self._selection, self._chosen = shards, selection, chosen
        self._batch_size, self._limits = batch_size, limits
        self._pool = TimedPool(threads, limits)

    def decoded(
        self,
        within: RowRange,
        policy: InputPolicy,
        columns: Sequence[str] = (),
        masks: bool = False,
        clock: StageClock | None = None,
    ) -> Iterator[list[DecodedSample]]:
        """Return batches of the chosen samples, in their order.

        Args:
            within: rows of the shard set.
            policy: how images become input.
            columns: what else is asked for of each sample.
            masks: whether masks are decoded, too.
            clock: counts reading, and decoding with scaling.

        Raises:
            DataError: an image or mask cannot be read or takes too long, or an anomalous sample has no mask.
        """

        clock = clock or StageClock()

        def decode(row: dict[str, Any]) -> DecodedSample:
            with clock.stage("decode"):
                pixels = decode_row(row, policy, self._limits)
                mask = decode_row_mask(row, policy, self._limits) if masks else None
            return DecodedSample(pixels, mask, {name: row[name] for name in columns})

        needed = ["sample_id", "image", *(["label", "mask"] if masks else []), *columns]
        rows = clock.iterate("read", self._rows(within, list(dict.fromkeys(needed))))
        waiting: list[DecodedSample] = []
        for sample in map_ahead(self._pool, decode, rows, 2 * self._batch_size, refuse_row):
            waiting.append(sample)
            if len(waiting) == self._batch_size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _rows(self, within: RowRange, columns: list[str]) -> Iterator[dict[str, Any]]:
        for batch in self._shards.read_range(within, self._selection, columns, chosen=self._chosen):
            yield from batch.to_pylist()

"""Images that a network runs over, in ranges of which each is one task: samples of shards, or validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.data.reader import DecodedSample, SampleReader
from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.stage_clock import StageClock
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.row_ranges import RowRange
from unianom.data.shards import Selection, ShardSet
from unianom.options import to_plain

RANGE_ROWS = 128
"""Rows of a range, at most. Where stages are separate, memory holds what is computed of some ranges at a time."""

ReadRange = Callable[[RowRange, InputPolicy, StageClock], Iterator[list[DecodedSample]]]
"""Reads the images of a range as input of a method, batch by batch; reading and decoding are counted."""


class ImageSource(Protocol):
    """Images in ranges, each of which is one task. Pickled on the way to the workers."""

    def ranges(self) -> Sequence[RowRange]:
        """Return the ranges of rows that hold images, in order; some may hold none."""

    def count(self) -> int:
        """Return how many images there are."""

    def key(self) -> dict[str, Any]:
        """Return what says which images these are, and how they are decoded."""

    def open(self, batch_size: int, threads: int) -> ReadRange:
        """Return what reads a range, at most `batch_size` images at once, decoded by so many threads."""


@dataclass(frozen=True)
class SampleSource:
    """Images of a shard set.

    Attributes:
        shards: the shard set.
        selection: which samples.
        limits: what an image may cost.
        chosen: sample_ids of the selected samples that are taken; None for all.
        columns: what else extractors read of each sample.
        masks: whether masks are decoded, too.
    """

    shards: ShardSet
    selection: Selection
    limits: ImageLimits
    chosen: frozenset[str] | None = None
    columns: tuple[str, ...] = ()
    masks: bool = False

    def ranges(self) -> Sequence[RowRange]:
        return self.shards.ranges(self.selection, RANGE_ROWS)

    def count(self) -> int:
        return self.shards.count(self.selection) if self.chosen is None else len(self.chosen)

    def key(self) -> dict[str, Any]:
        return {
            "shards": self.shards.digest,
            "selection": to_plain(self.selection),
            "chosen": None if self.chosen is None else files.digest_of({"ids": sorted(self.chosen)}),
            "limits": to_plain(self.limits),
        }

    def open(self, batch_size: int, threads: int) -> ReadRange:
        reader = SampleReader(self.shards, self.selection, self.chosen, batch_size, self.limits, threads)
        return lambda within, policy, clock: reader.decoded(within, policy, self.columns, self.masks, clock)


@dataclass(frozen=True)
class ValidationSource:
    """The images of a validation set.

    Attributes:
        uri: of the set, whose name is the digest of all that it depends on.
    """

    uri: str

    def ranges(self) -> Sequence[RowRange]:
        count = self.count()
        starts = range(0, count, RANGE_ROWS)
        return [RowRange("images", first, min(RANGE_ROWS, count - first), first == 0) for first in starts]

    def count(self) -> int:
        return len(ValidationSet(self.uri))

    def key(self) -> dict[str, Any]:
        return {"validation_set": self.uri.rsplit("/", 1)[-1]}

    def open(self, batch_size: int, threads: int) -> ReadRange:
        validation_set = ValidationSet(self.uri)

        def read(within: RowRange, policy: InputPolicy, clock: StageClock) -> Iterator[list[DecodedSample]]:
            with clock.stage("read"):
                pixels = validation_set.pixels[within.first : within.end]
            for start in range(0, len(pixels), batch_size):
                yield [DecodedSample(image, None, {}) for image in pixels[start : start + batch_size]]

        return read

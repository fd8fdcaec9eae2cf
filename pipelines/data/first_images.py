"""The first images of a listing, read before the job that lists them has begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.image_files import read_image_file
from pipelines.data.image_source import ReadRange
from pipelines.data.reader import DecodedSample
from pipelines.runtime.stage_clock import StageClock
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.row_ranges import RowRange
from unianom.errors import ImageError

EXAMPLES = 32
"""Images of a listing that an encoder may be tried on, of which some may be unreadable."""


@dataclass(frozen=True)
class FirstImages:
    """The first images of a listing. An `ImageSource` of one range.

    Attributes:
        uris: where they lie.
        limits: what an image may cost.
    """

    uris: Sequence[str]
    limits: ImageLimits

    def ranges(self) -> Sequence[RowRange]:
        return [RowRange("first", 0, len(self.uris), True)]

    def count(self) -> int:
        return len(self.uris)

    def key(self) -> dict[str, Any]:
        return {"images": list(self.uris)}

    def open(self, batch_size: int, threads: int) -> ReadRange:
        def read(within: RowRange, policy: InputPolicy, clock: StageClock) -> Iterator[list[DecodedSample]]:
            waiting = []
            for uri in self.uris:
                try:
                    pixels = decode_prepared(read_image_file(uri), policy, self.limits)
                except ImageError:
                    continue  # the job itself tells of it
                waiting.append(DecodedSample(pixels, None, {}))
                if len(waiting) == batch_size:
                    yield waiting
                    waiting = []
            if waiting:
                yield waiting

        return read

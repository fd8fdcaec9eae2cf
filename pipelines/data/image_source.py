"""Images that a network runs over, in parts of which each is one task: samples of shards, or validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.data.reader import DecodedSample, SampleReader
from pipelines.data.validation_set import ValidationSet
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.shards import Selection, ShardSet
from unianom.options import to_plain

IMAGES_PER_TASK = 128
"""Validation images of one part."""

ReadPart = Callable[[str, InputPolicy], Iterator[list[DecodedSample]]]
"""Reads the images of a part as input of a method, batch by batch."""


class ImageSource(Protocol):
    """Images in parts, each of which is one task. Pickled on the way to the workers."""

    def parts(self) -> Sequence[str]:
        """Return the names of the parts, in order."""

    def count(self) -> int:
        """Return how many images there are."""

    def key(self) -> dict[str, Any]:
        """Return what says which images these are, and how they are decoded."""

    def open(self, batch_size: int, threads: int) -> ReadPart:
        """Return what reads a part, at most `batch_size` images at once, decoded by so many threads."""


@dataclass(frozen=True)
class SampleSource:
    """Images of a shard set; the parts are those of the shards.

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

    def parts(self) -> Sequence[str]:
        return self.shards.parts

    def count(self) -> int:
        return self.shards.count(self.selection) if self.chosen is None else len(self.chosen)

    def key(self) -> dict[str, Any]:
        return {
            "shards": self.shards.digest,
            "selection": to_plain(self.selection),
            "chosen": None if self.chosen is None else files.digest_of({"ids": sorted(self.chosen)}),
            "limits": to_plain(self.limits),
        }

    def open(self, batch_size: int, threads: int) -> ReadPart:
        reader = SampleReader(self.shards, self.selection, self.chosen, batch_size, self.limits, threads)
        return lambda part, policy: reader.decoded(part, policy, self.columns, self.masks)


@dataclass(frozen=True)
class ValidationSource:
    """The images of a validation set, in parts of `IMAGES_PER_TASK`.

    Attributes:
        uri: of the set, whose name is the digest of all that it depends on.
    """

    uri: str

    def parts(self) -> Sequence[str]:
        return [f"images-{start:06d}" for start in range(0, self.count(), IMAGES_PER_TASK)]

    def count(self) -> int:
        return len(ValidationSet(self.uri))

    def key(self) -> dict[str, Any]:
        return {"validation_set": self.uri.rsplit("/", 1)[-1], "images_per_task": IMAGES_PER_TASK}

    def open(self, batch_size: int, threads: int) -> ReadPart:
        validation_set = ValidationSet(self.uri)

        def read(part: str, policy: InputPolicy) -> Iterator[list[DecodedSample]]:
            first = int(part.rpartition("-")[2])
            pixels = validation_set.pixels[first : first + IMAGES_PER_TASK]
            for start in range(0, len(pixels), batch_size):
                yield [DecodedSample(image, None, {}) for image in pixels[start : start + batch_size]]

        return read

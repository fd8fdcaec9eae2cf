"""The files of samples, fetched ahead of their use: images, and masks with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.ahead import map_ahead
from pipelines.data.image_files import AHEAD, AHEAD_BYTES, read_image_file
from pipelines.data.timed_pool import TimedPool
from unianom.data.image import ImageLimits
from unianom.data.schema import SampleRef
from unianom.errors import ImageError

Fetched = bytes | ImageError
"""What a file holds, or why it cannot be read."""


@dataclass(frozen=True)
class SampleFiles:
    """A sample and what its files hold.

    Attributes:
        ref: the sample.
        image: its image.
        masks: its masks up to the first that cannot be read; none where the image cannot be.
    """

    ref: SampleRef
    image: Fetched
    masks: tuple[Fetched, ...] = ()


def content(fetched: Fetched) -> bytes:
    """Return what a file holds.

    Raises:
        ImageError: it could not be read.
    """
    if isinstance(fetched, ImageError):
        raise fetched
    return fetched


def fetched_samples(pool: TimedPool, limits: ImageLimits, refs: Iterator[SampleRef]) -> Iterator[SampleFiles]:
    """Yield samples with what their files hold, in order.

    Args:
        pool: threads that fetch; the time limit is for the files of one sample.
        limits: what an image may cost; one whose file the listing tells to be too large is not even fetched.
        refs: the samples.
    """

    def fetch(ref: SampleRef) -> SampleFiles:
        try:
            limits.check_bytes(ref.size or 0)
            image = ref.data if ref.data is not None else read_image_file(ref.uri)
        except ImageError as error:
            return SampleFiles(ref, error)
        return SampleFiles(ref, image, tuple(_masks(ref)))

    return map_ahead(pool, fetch, refs, AHEAD, SampleFiles, lambda ref: ref.size or 0, AHEAD_BYTES)


def _masks(ref: SampleRef) -> Iterator[Fetched]:
    if ref.mask_uri is None:
        return
    for uri in (ref.mask_uri, *ref.more_masks):
        try:
            yield read_image_file(uri)
        except ImageError as error:
            yield error
            return

"""The files of samples, images and masks with them; those of stores are fetched ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

from pipelines.data.ahead import map_ahead
from pipelines.data.image_files import AHEAD, AHEAD_BYTES, read_image_file
from pipelines.data.timed_pool import TimedPool
from unianom import files
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


def fetch_sample(ref: SampleRef, limits: ImageLimits) -> SampleFiles:
    """Return a sample with what its files hold; an image whose file the listing tells to be too large is not read."""
    try:
        limits.check_bytes(ref.size or 0)
        image = ref.data if ref.data is not None else read_image_file(ref.uri)
    except ImageError as error:
        return SampleFiles(ref, error)
    return SampleFiles(ref, image, tuple(_masks(ref)))


def fetched_ahead(pool: TimedPool, limits: ImageLimits, refs: Iterator[SampleRef]) -> Iterator[SampleRef | SampleFiles]:
    """Yield samples in order, with what their files hold if the first one's lie on a store; files on a disk are there
    at once, and threads that only read them would cost a tenth of all CPU time.

    Args:
        pool: threads that fetch; the time limit is for the files of one sample.
        limits: what an image may cost.
        refs: the samples.
    """
    first = next(refs, None)
    if first is None:
        return iter(())
    refs = chain([first], refs)
    if files.is_local(first.uri):
        return refs
    fetch = partial(fetch_sample, limits=limits)
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

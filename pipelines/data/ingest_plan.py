"""What an ingest will write: which samples, in which parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError


def check_unique(refs: Sequence[SampleRef]) -> None:
    """Raise a DataError if two samples have the same sample_id."""
    seen: dict[str, str] = {}
    for ref in refs:
        if ref.sample_id in seen:
            raise DataError(f"{seen[ref.sample_id]} and {ref.uri} are both named {ref.sample_id}; names must be unique")
        seen[ref.sample_id] = ref.uri


def contaminated(refs: Sequence[SampleRef], fraction: float, seed: int) -> list[SampleRef]:
    """Return the samples with a share of each category's anomalous test images among the normal training images.

    Raises:
        DataError: there is no category with two anomalous test images, one to move and one to keep.
    """
    anomalous = [ref for ref in refs if ref.split == "test" and ref.label == ANOMALOUS]
    moved = hold_out([ref.sample_id for ref in anomalous], [ref.category for ref in anomalous], fraction, seed)
    if not moved:
        raise DataError(
            "contaminate moves anomalous test images into training, but no category has two of them; leave it out"
        )
    return [
        dataclasses.replace(ref, split="train", label=NORMAL, mask_uri=None, more_masks=())
        if ref.sample_id in moved
        else ref
        for ref in refs
    ]


def plan_parts(refs: Sequence[SampleRef], part_bytes: int, min_parts: int) -> list[list[SampleRef]]:
    """Deal samples out to parts so that every part holds the same mix of splits, categories and labels.

    Within a stratum the order is by hash of the sample_id, so a part is also a fair sample of its stratum. A part's
    rows are ordered by split first, which keeps the splits in separate row groups.
    """
    total = sum(ref.size or len(ref.data or b"") for ref in refs)
    count = min(max(-(-total // part_bytes), min_parts), len(refs))
    ordered = sorted(
        refs,
        key=lambda ref: (
            ref.split,
            ref.dataset,
            ref.category,
            -1 if ref.label is None else ref.label,
            hashlib.sha256(ref.sample_id.encode()).digest(),
        ),
    )
    return [ordered[start::count] for start in range(count)]


def digest_of_refs(refs: Sequence[SampleRef]) -> str:
    """Return a digest of all that a listing says of its samples, whatever their order."""
    digest = hashlib.sha256()
    for ref in sorted(refs, key=lambda ref: ref.sample_id):
        content = hashlib.sha256(ref.data).hexdigest() if ref.data else None
        known = dataclasses.replace(ref, data=None, crop=None, mask_threshold=ref.mask_threshold or 0)
        *plain, _, _ = dataclasses.astuple(known)
        digest.update(repr(tuple(plain)).encode())
        digest.update(repr(content).encode())
        # only where there is any, so that shard sets from before there were such stay the same plan
        if ref.crop is not None:
            digest.update(repr(ref.crop).encode())
        if ref.more_masks:
            digest.update(repr(ref.more_masks).encode())
        if ref.mask_threshold == 0:
            digest.update(b"above 0")
    return digest.hexdigest()


def part_name(number: int) -> str:
    """Return the file name of a part."""
    return f"part-{number:05d}.parquet"

"""One part of a shard set: its files read, checked and packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipelines.data.ahead import map_ahead
from pipelines.data.image_files import AT_ONCE
from pipelines.data.ingest_plan import part_name, unpack_samples
from pipelines.data.options import MaskOrientation
from pipelines.data.sample_files import SampleFiles, content, fetch_sample, fetched_ahead
from pipelines.data.timed_pool import TimedPool
from pipelines.runtime import outputs
from unianom import files
from unianom.data.image import (
    CropWindow,
    ImageFacts,
    ImageLimits,
    check_image,
    covers_nearly_all,
    crop_image,
    crop_mask,
    decode_image,
    encode_png,
    find_crop,
    read_mask,
    reduce_image,
    reduce_mask,
    spread_bits,
    turn_upright,
)
from unianom.data.schema import ANOMALOUS, SAMPLE_SCHEMA, Crop, SampleRef
from unianom.data.shards import SAMPLE_GROUP_BYTES, SAMPLE_GROUP_ROWS, PartWriter
from unianom.errors import ImageError

MASK_PROBLEMS = ("missing", "wrong_size", "unreadable", "empty")

MASK_DOUBTS = ("nearly_full", "read_at_half", "turned", "maybe_unturned")
"""What else is told of masks, only where there are any: covering nearly all of their image; shades, of which more than
half of white is anomalous; turned along with their image, since they have the size that it has before it is turned; and
not turned though their image is, which its size does not tell to be right."""


class PartIngester:
    """Reads, checks and packs the samples of one part. A `PartTask`.

    Args:
        output: folder of the shard set.
        plan: digest of the ingest plan.
        limits: what an image may cost.
        resize: shorter side to reduce to, or None.
        threads: images that are checked at the same time, while the files of the next ones are fetched from a store.
        mask_threshold, invert_masks, mask_orientation, bits: see `IngestOptions`.

    Attributes:
        schema: columns of a sample that are stored.
    """

    schema: ClassVar[pa.Schema] = SAMPLE_SCHEMA

    def __init__(
        self,
        output: str,
        plan: str,
        limits: ImageLimits,
        resize: int | None,
        threads: int,
        mask_threshold: int | None = None,
        invert_masks: bool = False,
        mask_orientation: MaskOrientation = "auto",
        bits: int | None = None,
    ) -> None:
        self._output, self._plan = output, plan
        self._limits, self._resize = limits, resize
        self._mask_threshold, self._invert = mask_threshold, invert_masks
        self._mask_orientation, self._bits = mask_orientation, bits
        self._fetching, self._checking = TimedPool(AT_ONCE, limits), TimedPool(threads, limits)
        self._threads = threads

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one part and its record."""
        name = part_name(task["number"])
        rejected: list[dict[str, Any]] = []
        masks: dict[str, list[str]] = {problem: [] for problem in MASK_PROBLEMS}
        doubts: dict[str, list[str]] = {}
        deep: dict[str, Any] = {}
        rows = 0
        path = files.join(self._output, name)
        with (
            files.open_atomic(path) as handle,
            PartWriter(handle, self.schema, SAMPLE_GROUP_BYTES, SAMPLE_GROUP_ROWS) as writer,
        ):
            samples = fetched_ahead(self._fetching, self._limits, unpack_samples(task["refs"]))
            for row, found in map_ahead(self._checking, self._check, samples, 4 * self._threads, timed_out=_timed_out):
                if "status" in row:
                    rejected.append(row)
                    continue
                writer.write(row)
                rows += 1
                if found.problem:
                    masks[found.problem].append(row["sample_id"])
                for doubt in found.doubts:
                    doubts.setdefault(doubt, []).append(row["sample_id"])
                if found.largest is not None:
                    deep = {
                        "count": deep.get("count", 0) + 1,
                        "largest": max(deep.get("largest", 0), found.largest),
                        "example": deep.get("example", row["sample_id"]),
                    }
        record = {
            "plan": self._plan,
            "name": name,
            "rows": rows,
            "sha256": files.sha256_file(path),
            "rejected": rejected,
            "masks": masks,
            **({"mask_doubts": doubts} if doubts else {}),
            **({"deep": deep} if deep else {}),
        }
        outputs.commit_part(self._output, name, record)
        return record

    def _check(self, sample: SampleRef | SampleFiles) -> tuple[dict[str, Any], FileFindings]:
        """Return a row of SAMPLE_SCHEMA and what its files were like, or a row of REJECTED_SCHEMA."""
        fetched = fetch_sample(sample, self._limits) if isinstance(sample, SampleRef) else sample
        ref = fetched.ref
        try:
            whole = content(fetched.image)
            full = whole if self._bits is None else spread_bits(whole, self._bits, self._limits)
            facts, original, window = self._crop(full, ref.crop)
            if full is not whole and self._bits is not None:  # what was scaled up was turned upright as well
                facts = dataclasses.replace(check_image(whole, self._limits), largest=None)
            data = original if self._resize is None else reduce_image(original, self._resize, self._limits)
            stored = facts if data is whole else check_image(data, self._limits)
        except ImageError as error:
            return _rejected(ref, error)
        mask, found = self._check_mask(fetched, facts, window, (stored.height, stored.width))
        row = {
            **_known(ref),
            "image": data,
            "format": stored.format,
            "height": stored.height,
            "width": stored.width,
            "mask": mask,
            "sha256": files.sha256_of(whole if original is full else original),
        }
        return row, dataclasses.replace(found, largest=facts.largest)

    def _crop(self, data: bytes, crop: Crop | None) -> tuple[ImageFacts, bytes, CropWindow | None]:
        """Return facts of the whole image, the bytes that its sample is made of, and the window of it that they
        hold."""
        if crop is None:
            return check_image(data, self._limits), data, None
        decoded = decode_image(data, self._limits)
        window = find_crop(decoded.pixels, crop, self._limits)
        return decoded.facts, encode_png(crop_image(decoded.pixels, window)), window

    def _check_mask(
        self, fetched: SampleFiles, image: ImageFacts, window: CropWindow | None, stored: tuple[int, int]
    ) -> tuple[bytes | None, FileFindings]:
        """Return the PNG of the mask of an image and what is wrong with it; cropped and reduced as its image was."""
        ref = fetched.ref
        if ref.mask_uri is None:
            return None, FileFindings("missing" if ref.label == ANOMALOUS else None)
        threshold = ref.mask_threshold if self._mask_threshold is None else self._mask_threshold
        doubts: list[str] = []
        pieces: list[np.ndarray] = []
        for file in fetched.masks:
            try:
                read = read_mask(content(file), threshold, self._invert, self._limits)
            except ImageError as error:
                return None, FileFindings("missing" if error.status == "missing" else "unreadable")
            piece, doubt = self._upright(read.pixels, read.orientation, image)
            if piece.shape != (image.height, image.width):
                return None, FileFindings("wrong_size")
            doubts += [*(["read_at_half"] if read.halved else []), *([doubt] if doubt else [])]
            pieces.append(piece)
        mask: np.ndarray = np.bitwise_or.reduce(pieces)
        if ref.label == ANOMALOUS and covers_nearly_all(mask):
            doubts.append("nearly_full")
        if window is not None:
            mask = crop_mask(mask, window)  # before it is called empty: a crop may leave the defect out
        empty = "empty" if ref.label == ANOMALOUS and not mask.any() else None
        mask = mask if mask.shape == stored else reduce_mask(mask, *stored)
        return encode_png(mask), FileFindings(empty, tuple(dict.fromkeys(doubts)))

    def _upright(self, mask: np.ndarray, own: int | None, image: ImageFacts) -> tuple[np.ndarray, str | None]:
        """Return a mask as its image lies, and what is in doubt about it."""
        orientation = image.orientation or 1
        # a mask with an orientation of its own has been turned by it
        if orientation == 1 or own is not None or self._mask_orientation == "shown":
            return mask, None
        turned = turn_upright(mask, orientation)
        shown = (image.height, image.width)
        if self._mask_orientation == "stored":
            return turned, None
        if mask.shape != shown:
            return (turned, "turned") if turned.shape == shown else (mask, None)
        doubtful = turned.shape == shown and not np.array_equal(turned, mask)
        return mask, "maybe_unturned" if doubtful else None


@dataclass(frozen=True)
class FileFindings:
    """What the files of a sample were like.

    Attributes:
        problem: one of `MASK_PROBLEMS`, if any.
        doubts: of `MASK_DOUBTS`.
        largest: see `ImageFacts`.
    """

    problem: str | None = None
    doubts: tuple[str, ...] = ()
    largest: int | None = None


def _known(ref: SampleRef) -> dict[str, Any]:
    """Return the columns of a sample that its layout tells."""
    names = ("sample_id", "dataset", "category", "split", "label", "defect", "uri")
    return {name: getattr(ref, name) for name in names}


def _timed_out(sample: SampleRef | SampleFiles, error: ImageError) -> tuple[dict[str, Any], FileFindings]:
    return _rejected(sample if isinstance(sample, SampleRef) else sample.ref, error)


def _rejected(ref: SampleRef, error: ImageError) -> tuple[dict[str, Any], FileFindings]:
    """Return the row of REJECTED_SCHEMA of a sample that cannot be used."""
    return {**_known(ref), "status": error.status, "error": str(error)}, FileFindings()

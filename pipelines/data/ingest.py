"""Images on any store → shards.

    source ─ layout ─▶ plan: samples dealt out to parts ─ actors: read, check, pack ─▶ parts ─▶ manifest

Encoded bytes are stored untouched, unless the layout crops: then the crop is stored, as PNG. A file that cannot be
used becomes a rejected row with its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np

from pipelines.data.options import IngestOptions, MaskOrientation
from pipelines.runtime import outputs
from pipelines.runtime.actors import connect, run_tasks
from pipelines.runtime.progress import Progress
from unianom import __version__, files
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
from unianom.data.layouts import LAYOUTS, LeftOut, iter_samples, make_options
from unianom.data.schema import ANOMALOUS, NORMAL, SAMPLE_SCHEMA, SCHEMA_VERSION, Crop, SampleRef
from unianom.data.shards import PartWriter, ShardSet, write_rejected
from unianom.data.splits import hold_out
from unianom.errors import DataError, ImageError, OptionError, image_error, storage_error
from unianom.options import to_plain

T = TypeVar("T")
R = TypeVar("R")

MASK_PROBLEMS = ("missing", "wrong_size", "unreadable", "empty")

MASK_DOUBTS = ("nearly_full", "read_at_half", "turned", "maybe_unturned")
"""What else is told of masks, only where there are any: covering nearly all of their image; shades, of which more than
half of white is anomalous; turned along with their image, since they have the size that it has before it is turned; and
not turned though their image is, which its size does not tell to be right."""

SMALL_PART = 1 << 14
"""16-bit images that never reach this value, a quarter of the range, look like images of fewer bits."""


@dataclass(frozen=True)
class IngestResult:
    """What an ingest did.

    Attributes:
        shards: the finished shard set.
        fresh: whether this run wrote anything.
        images_per_second: of this run; 0 if it had nothing to do.
    """

    shards: ShardSet
    fresh: bool
    images_per_second: float


def ingest(options: IngestOptions) -> IngestResult:
    """Ingest, continue an interrupted ingest, or find it done.

    Raises:
        DataError: the source is not what its layout says, two samples have one name, the output is another's, or too
            much was rejected.
    """
    if options.layout not in LAYOUTS:
        near = get_close_matches(options.layout, LAYOUTS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise OptionError(f"no layout '{options.layout}'{hint} Known: {', '.join(LAYOUTS)}")
    layout_options = make_options(LAYOUTS[options.layout], options.layout_options)
    left_out = LeftOut()
    refs = list(iter_samples(options.layout, options.source, layout_options, left_out))
    check_unique(refs)
    if options.contaminate:
        refs = contaminated(refs, options.contaminate, options.contaminate_seed)
    parts = plan_parts(refs, options.part_bytes, options.min_parts)
    output = files.full_uri(options.output)
    plan = {
        "layout": options.layout,
        "source": files.full_uri(options.source),
        "layout_options": options.layout_options,
        "resize": options.resize,
        "limits": to_plain(options.limits),
        "parts": len(parts),
        "samples": _digest_of_refs(refs),
    }
    if options.contaminate:  # only then, so that shard sets from before there was this option stay the same plan
        plan["contaminate"] = [options.contaminate, options.contaminate_seed]
    if options.reading:
        plan["reading"] = options.reading
    inputs = {"source": options.source}
    with outputs.open_output(output, "shard set", plan, inputs=inputs, overwrite=options.overwrite) as digest:
        fresh = not outputs.is_complete(output)
        rate = 0.0
        if fresh:
            rate = _write_parts(parts, output, digest, options)
            _commit(output, digest, plan, len(parts), left_out)
    shards = ShardSet.open(output)
    check_rejected(shards, options.max_reject_fraction)
    return IngestResult(shards, fresh, rate)


def check_unique(refs: Sequence[SampleRef]) -> None:
    """Raise a DataError if two samples have the same sample_id."""
    seen: dict[str, str] = {}
    for ref in refs:
        if ref.sample_id in seen:
            raise DataError(f"{seen[ref.sample_id]} and {ref.uri} are both named {ref.sample_id}; names must be unique")
        seen[ref.sample_id] = ref.uri


def contaminated(refs: Sequence[SampleRef], fraction: float, seed: int) -> list[SampleRef]:
    """The samples with a share of each category's anomalous test images among the normal training images.

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


def check_rejected(shards: ShardSet, most: float) -> None:
    """Raise a DataError if a larger share than `most` of the samples was rejected."""
    rejected = sum(shards.manifest["rejected"].values())
    total = rejected + sum(row["count"] for row in shards.manifest["counts"])
    if rejected > most * total:
        reasons = ", ".join(f"{count} {status}" for status, count in shards.manifest["rejected"].items())
        raise DataError(
            f"{rejected} of {total} samples were rejected ({reasons}), more than --max-reject-fraction {most:g} "
            f"allows; the others are stored, the reasons are in {shards.uri}/_rejected.parquet"
        )


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


def _digest_of_refs(refs: Sequence[SampleRef]) -> str:
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


def _write_parts(parts: list[list[SampleRef]], output: str, digest: str, options: IngestOptions) -> float:
    tasks: list[dict[str, Any]] = []
    done = 0
    for number, refs in enumerate(parts):
        record = outputs.part_record(output, part_name(number))
        if record is not None and record["plan"] == digest:
            done += len(refs)
        else:
            tasks.append({"number": number, "refs": [dataclasses.asdict(ref) for ref in refs]})
    if done:
        print(f"continuing: {done} samples are stored already")
    connect(options.runtime)
    arguments = {"output": output, "plan": digest, "limits": options.limits, "resize": options.resize}
    arguments |= options.reading
    arguments["threads"] = 2 * options.runtime.cpus_per_worker  # one reads while another decodes
    progress = Progress("ingest", sum(len(task["refs"]) for task in tasks))
    for record in run_tasks(PartIngester, arguments, tasks, options.runtime):
        progress.advance(record["rows"] + len(record["rejected"]))
    return progress.close()


def part_name(number: int) -> str:
    """File name of a part."""
    return f"part-{number:05d}.parquet"


class PartIngester:
    """Reads, checks and packs the samples of one part. A `PartTask`.

    Args:
        output: folder of the shard set.
        plan: digest of the ingest plan.
        limits: what an image may cost.
        resize: shorter side to reduce to, or None.
        threads: files that are read and checked at the same time.
        mask_threshold, invert_masks, mask_orientation, bits: see `IngestOptions`.
    """

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
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one part and its record."""
        name = part_name(task["number"])
        rejected: list[dict[str, Any]] = []
        masks: dict[str, list[str]] = {problem: [] for problem in MASK_PROBLEMS}
        doubts: dict[str, list[str]] = {}
        deep: list[tuple[int, str]] = []
        rows = 0
        path = files.join(self._output, name)
        with files.open_atomic(path) as handle:
            writer = PartWriter(handle, SAMPLE_SCHEMA)
            refs = (SampleRef.from_plain(ref) for ref in task["refs"])
            for row, found in map_ahead(self._pool, self._read, refs, 4 * self._threads):
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
                    deep.append((found.largest, row["sample_id"]))
            writer.close()
        record = {
            "plan": self._plan,
            "name": name,
            "rows": rows,
            "sha256": files.sha256_file(path),
            "rejected": rejected,
            "masks": masks,
            **({"mask_doubts": doubts} if doubts else {}),
            **({"deep": {"count": len(deep), "largest": max(deep)[0], "example": deep[0][1]}} if deep else {}),
        }
        outputs.commit_part(self._output, name, record)
        return record

    def _read(self, ref: SampleRef) -> tuple[dict[str, Any], _Found]:
        """A row of SAMPLE_SCHEMA and what its files were like, or a row of REJECTED_SCHEMA."""
        known = {
            key: getattr(ref, key) for key in ("sample_id", "dataset", "category", "split", "label", "defect", "uri")
        }
        try:
            self._limits.check_bytes(ref.size or 0)  # a file of many gigabytes is not even read
            whole = ref.data if ref.data is not None else read_image_file(ref.uri)
            full = whole if self._bits is None else spread_bits(whole, self._bits, self._limits)
            facts, original, window = self._crop(full, ref.crop)
            if full is not whole and self._bits is not None:  # what was scaled up was turned upright as well
                facts = dataclasses.replace(check_image(whole, self._limits), largest=None)
            data = original if self._resize is None else reduce_image(original, self._resize, self._limits)
            stored = facts if data is whole else check_image(data, self._limits)
        except ImageError as error:
            return {**known, "status": error.status, "error": str(error)}, _Found()
        mask, found = self._read_mask(ref, facts, window, (stored.height, stored.width))
        row = {
            **known,
            "image": data,
            "format": stored.format,
            "height": stored.height,
            "width": stored.width,
            "mask": mask,
            "sha256": files.sha256_of(whole if original is full else original),
        }
        return row, dataclasses.replace(found, largest=facts.largest)

    def _crop(self, data: bytes, crop: Crop | None) -> tuple[ImageFacts, bytes, CropWindow | None]:
        """Facts of the whole image, the bytes that its sample is made of, and the window of it that they hold."""
        if crop is None:
            return check_image(data, self._limits), data, None
        decoded = decode_image(data, self._limits)
        window = find_crop(decoded.pixels, crop, self._limits)
        return decoded.facts, encode_png(crop_image(decoded.pixels, window)), window

    def _read_mask(
        self, ref: SampleRef, image: ImageFacts, window: CropWindow | None, stored: tuple[int, int]
    ) -> tuple[bytes | None, _Found]:
        """PNG of the mask of an image and what is wrong with it; cropped and reduced as its image was."""
        if ref.mask_uri is None:
            return None, _Found("missing" if ref.label == ANOMALOUS else None)
        threshold = ref.mask_threshold if self._mask_threshold is None else self._mask_threshold
        doubts: list[str] = []
        mask = None
        for uri in (ref.mask_uri, *ref.more_masks):
            try:
                read = read_mask(read_image_file(uri), threshold, self._invert, self._limits)
            except ImageError as error:
                return None, _Found("missing" if error.status == "missing" else "unreadable")
            piece, doubt = self._upright(read.pixels, read.orientation, image)
            if piece.shape != (image.height, image.width):
                return None, _Found("wrong_size")
            doubts += [*(["read_at_half"] if read.halved else []), *([doubt] if doubt else [])]
            mask = piece if mask is None else mask | piece
        assert mask is not None
        if ref.label == ANOMALOUS and covers_nearly_all(mask):
            doubts.append("nearly_full")
        if window is not None:
            mask = crop_mask(mask, window)  # before it is called empty: a crop may leave the defect out
        empty = "empty" if ref.label == ANOMALOUS and not mask.any() else None
        mask = mask if mask.shape == stored else reduce_mask(mask, *stored)
        return encode_png(mask), _Found(empty, tuple(dict.fromkeys(doubts)))

    def _upright(self, mask: np.ndarray, own: int | None, image: ImageFacts) -> tuple[np.ndarray, str | None]:
        """A mask as its image lies, and what is in doubt about it."""
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
class _Found:
    """What the files of a sample were like.

    Attributes:
        problem: one of `MASK_PROBLEMS`, if any.
        doubts: of `MASK_DOUBTS`.
        largest: see `ImageFacts`.
    """

    problem: str | None = None
    doubts: tuple[str, ...] = ()
    largest: int | None = None


def read_image_file(uri: str, tries: int = 3) -> bytes:
    """The bytes of an image file; what may pass (a lost connection) is tried again.

    Raises:
        ImageError: the file is not there, is no file but a folder or a named pipe, or may not be read.
        DataError, MachineError: the store cannot be read.
    """
    for attempt in itertools.count(1):
        try:
            return files.read_bytes(uri)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                otherwise = files.composed_otherwise(uri)  # the name may come from a list made on another system
                if otherwise is not None and otherwise != uri and attempt < tries:
                    uri = otherwise
                    continue
            if isinstance(error, PermissionError) and not files.is_local(uri):
                # a store answers so when credentials expire, which is no fault of the image
                raise storage_error(error) or DataError(
                    f"no permission to read {uri}; renew the credentials and run again"
                ) from error
            if (fault := image_error(uri, error)) is not None:
                raise fault from error
            if attempt == tries:
                raise DataError(f"cannot read {uri}: {error}; run the same command again, it continues") from error
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterator[T], ahead: int) -> Iterator[R]:
    """`function` over items in order, at most `ahead` of them being worked on or waiting, so memory is bounded."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _commit(output: str, digest: str, plan: dict[str, Any], parts: int, left_out: LeftOut) -> None:
    records = []
    for number in range(parts):
        record = outputs.part_record(output, part_name(number))
        if record is None or record["plan"] != digest:
            raise DataError(f"{output}/{part_name(number)} was not written; run the same command again")
        records.append(record)
    rejected = [row for record in records for row in record["rejected"]]
    write_rejected(output, rejected)
    entries = [{key: record[key] for key in ("name", "rows", "sha256")} for record in records]
    draft = ShardSet(output, {"files": entries}, "")
    columns = ["sample_id", "dataset", "category", "split", "label", "defect", "height", "width", "sha256"]
    table = draft.table(columns=columns).to_pylist()
    if not table:
        raise DataError(
            f"not one of {len(rejected)} samples could be read; the reasons are in {output}/_rejected.parquet"
        )
    manifest = {
        "kind": ShardSet.kind,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "plan_digest": digest,
        **{key: plan[key] for key in ("layout", "source", "layout_options", "resize", "limits")},
        "contaminate": plan.get("contaminate"),  # share and seed
        **({"reading": plan["reading"]} if "reading" in plan else {}),
        "counts": _counts(table),
        "bytes": sum(_size(output, entry["name"]) for entry in entries),
        "rejected": dict(sorted(Counter(row["status"] for row in rejected).items())),
        "summary": summarise(table, records, left_out),
        "files": entries,
    }
    outputs.finish(output, manifest)


def _size(output: str, name: str) -> int:
    fs, path = files.resolve(files.join(output, name))
    return int(fs.size(path))


def _counts(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("dataset", "category", "split", "label", "defect")
    counts = Counter(tuple(row[key] for key in keys) for row in table)
    return [
        {**dict(zip(keys, group, strict=True)), "count": counts[group]}
        for group in sorted(counts, key=lambda g: str(g))
    ]


def summarise(
    table: list[dict[str, Any]], records: list[dict[str, Any]], left_out: LeftOut | None = None
) -> dict[str, Any]:
    """What a user should know of the data before trusting a figure made from it.

    The keys "left_out" and "sixteen_bits", and under "masks" those of `MASK_DOUBTS`, are there only where there is
    something to tell, so that the manifest of a set without such stays what it always was.
    """
    by_hash: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_hash.setdefault(row["sha256"], []).append(row)
    groups = [rows for _, rows in sorted(by_hash.items()) if len(rows) > 1]
    crossing = [rows for rows in groups if len({row["split"] for row in rows}) > 1]
    conflicting = [rows for rows in groups if len({row["label"] for row in rows}) > 1]
    heights, widths = [row["height"] for row in table], [row["width"] for row in table]

    def listed(found: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return {"groups": len(found), "examples": [[row["sample_id"] for row in rows] for rows in found[:10]]}

    masks = {problem: sorted(i for record in records for i in record["masks"][problem]) for problem in MASK_PROBLEMS}
    for doubt in MASK_DOUBTS:
        ids = sorted(i for record in records for i in record.get("mask_doubts", {}).get(doubt, []))
        masks |= {doubt: ids} if ids else {}
    deep = [record["deep"] for record in records if "deep" in record]
    largest = max((found["largest"] for found in deep), default=65535)
    unused = left_out.summary() if left_out else {}
    return {
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "distinct_sizes": len(set(zip(heights, widths, strict=True))),
        "duplicates": listed(groups),
        "duplicates_across_splits": listed(crossing),
        "duplicates_with_other_label": listed(conflicting),
        "masks": {problem: {"count": len(ids), "examples": ids[:10]} for problem, ids in masks.items()},
        **({"left_out": unused} if any(unused.values()) else {}),
        **(
            {
                "sixteen_bits": {
                    "count": sum(found["count"] for found in deep),
                    "largest": largest,
                    "example": min(found["example"] for found in deep),
                }
            }
            if largest < SMALL_PART
            else {}
        ),
    }

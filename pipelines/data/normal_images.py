"""Normal images that lie anywhere → samples to train on, without an ingest.

    folders, tables of paths, single files ─▶ samples dealt out to parts ─ actors: read, check ─▶ listing of the usable

They are dealt out, checked and rejected as by jobs/ingest.py, so whoever learns from the listing learns what he would
from shards; but it holds no images, which are fetched again when they are needed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import pyarrow as pa

from pipelines.data.first_images import EXAMPLES, FirstImages
from pipelines.data.image_source import ImageSource
from pipelines.data.ingest_manifest import commit
from pipelines.data.ingest_part import PartIngester
from pipelines.data.ingest_plan import PartTasks, SampleListing, part_name
from pipelines.data.list_images import LISTING, ONCE, iter_images
from pipelines.data.listed_shards import LISTED, ListedShards
from pipelines.data.options import IngestOptions, ListingOptions
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from unianom import files
from unianom.data.image import ImageLimits
from unianom.data.image_listing import CHECKED_SCHEMA
from unianom.data.layouts import LeftOut
from unianom.data.schema import NORMAL, SampleRef
from unianom.data.shards import Selection
from unianom.options import to_plain

ALL = "all"
"""Category of images of which nothing says another."""

UNKNOWN_BYTES = 128 << 10
"""What an image counts for whose size the listing does not tell, when images are dealt out to parts."""


class ListingChecker(PartIngester):
    """Reads and checks the images of one part of a listing; stores all of a sample but the image. A `PartTask`."""

    schema: ClassVar[pa.Schema] = CHECKED_SCHEMA


class NormalImages:
    """Normal images that are listed, and not read yet.

    Args:
        database: see `unianom.temporary_database`; holds nothing else.
        uris: folders, tables and image files.
        options: how they are listed.
        limits: what an image may cost.

    Raises:
        DataError: there are none, what names them cannot be read, or two of them have one name.
    """

    def __init__(
        self, database: sqlite3.Connection, uris: Sequence[str], options: ListingOptions, limits: ImageLimits
    ) -> None:
        self._uris, self._options, self._limits = uris, options, limits
        self._left_out = LeftOut()
        self._listing = SampleListing(database, self._samples())
        self._listing.check_unique(ONCE)
        self._parts = self._listing.deal(IngestOptions.part_bytes, IngestOptions.min_parts, UNKNOWN_BYTES)
        self._digest = self._listing.digest()

    def _samples(self) -> Iterator[SampleRef]:
        for image in iter_images(self._uris, self._options, self._left_out):
            yield SampleRef(
                sample_id=image.sample_id,
                dataset=image.dataset,
                category=image.category or self._options.category or ALL,
                split="train",
                label=NORMAL,
                defect="good",
                uri=image.uri,
                size=image.size,
            )

    def planned(self) -> ListedShards:
        """Return the listing as if all of its images could be read, to plan with; no image can be read from it."""
        counts = self._listing.counts()
        manifest = {"counts": counts, "files": [], LISTED: self._digest}
        return _Planned(", ".join(self._uris), manifest, self._digest, listing=self._listing)

    def examples(self) -> ImageSource:
        """Return some of the images, on which an encoder is tried."""
        return FirstImages([sample.uri for sample in islice(self._listing, EXAMPLES)], self._limits)

    def check(self, output: str, runtime: RuntimeOptions) -> ListedShards:
        """Read and decode every image once, or those that were not yet; keep what is known of them in an output.

        Args:
            output: folder of the job, below which the listing is kept; claimed by the caller.
            runtime: actors.

        Raises:
            DataError: not one image can be read.
        """
        folder = files.join(output, LISTING)
        told = {
            "images": list(map(files.full_uri, self._uris)),
            "listing": to_plain(self._options),
            LISTED: self._digest,
            "limits": to_plain(self._limits),
        }
        digest = files.digest_of(told)
        if not outputs.is_complete(folder):
            self._write_parts(folder, digest, runtime)
            commit(folder, digest, told, self._parts, self._left_out, ListedShards)
        return ListedShards.open(folder)

    def _write_parts(self, folder: str, digest: str, runtime: RuntimeOptions) -> None:
        names = {part_name(part): part for part in range(self._parts)}
        done = {name for name, record in outputs.part_records(folder, names).items() if record["plan"] == digest}
        left = [part for name, part in names.items() if name not in done]
        images = sum(map(self._listing.part_count, left))
        if images < self._listing.count:
            print(f"continuing: {self._listing.count - images} images are checked already")
        arguments = {
            "output": folder,
            "plan": digest,
            "limits": self._limits,
            "resize": None,
            "threads": 2 * runtime.cpus_per_worker,  # one reads while another decodes
        }
        progress = Progress("check images", images)
        for record in run_tasks(ListingChecker, arguments, PartTasks(self._listing, left), runtime, images):
            progress.advance(record["rows"] + len(record["rejected"]))
        progress.close()


@dataclass(frozen=True)
class _Planned(ListedShards):
    """A listing whose rows lie in a database still."""

    listing: SampleListing = field(kw_only=True)

    def table(self, selection: Selection | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        wanted = list(columns or self.schema.names)
        needed = pa.schema([self.schema.field(name) for name in dict.fromkeys([*wanted, "split", "category", "label"])])
        rows = ({name: getattr(sample, name) for name in needed.names} for sample in self.listing)
        batches = []
        while chunk := list(islice(rows, 4096)):
            batch = pa.RecordBatch.from_pylist(chunk, needed)
            batches.append(batch if selection is None else batch.filter(selection.mask(batch)))
        return pa.Table.from_batches(batches, needed).select(wanted)

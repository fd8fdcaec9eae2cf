"""A listing of images that lie where they are: one row an image, in parts, kept beside what was made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from unianom.data.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA
from unianom.data.shards import PartSet

LISTING_VERSION = 1

LISTING_SCHEMA = pa.schema(
    [
        *(
            SAMPLE_SCHEMA.field(name)
            for name in ("sample_id", "dataset", "category", "split", "label", "defect", "uri")
        ),
        pa.field("size", pa.int64()),
    ]
)
"""One listed image; `size` is that of its file in bytes, null where the listing did not tell."""

CHECKED_SCHEMA = pa.schema([field for field in SAMPLE_SCHEMA if not pa.types.is_binary(field.type)])
"""One listed image that was read and decoded once: a sample without its image and mask."""


@dataclass(frozen=True)
class ImageListing(PartSet):
    """Images listed by a job that reads them from where they lie."""

    schema: ClassVar[pa.Schema] = LISTING_SCHEMA
    version: ClassVar[int] = LISTING_VERSION
    kind: ClassVar[str] = "image listing"
    job: ClassVar[str] = "jobs/score.py --images"
    stated: ClassVar[dict[str, Any]] = {"images": list}

    def rejected(self) -> pa.Table:
        """Return no rows: what cannot be read shows when it is read."""
        return REJECTED_SCHEMA.empty_table()

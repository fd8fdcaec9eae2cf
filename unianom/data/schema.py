"""The Arrow schemas that tie the jobs together: one row a sample in shards, one row a sample in scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1
"""Of shard sets."""

SCORE_VERSION = 2
"""Of score sets; 2 added the two calibration columns."""

SPLITS = ("train", "val", "test")
NORMAL, ANOMALOUS = 0, 1

STATUSES = ("ok", "corrupt", "too_large", "missing", "unsupported", "timeout")
"""What became of an image: read and scored, or why not."""

_text = pa.dictionary(pa.int32(), pa.string())

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", _text, nullable=False),
        pa.field("category", _text, nullable=False),
        pa.field("split", _text, nullable=False),
        pa.field("label", pa.int8()),
        pa.field("defect", _text),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("format", _text, nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("mask", pa.binary()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""One sample. `image` holds the original encoded bytes or, where the layout crops, the crop as PNG; `height` and
`width` are those of `image`, and `sha256` is of the original or of the crop. `mask` is a one-channel PNG of 0 and 255
with the size of the image as it is shown (EXIF orientation applied); `label` 0 normal, 1 anomalous, null unknown."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int8()),
        pa.field("defect", pa.string()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
"""One sample that ingest could not take, and why."""

SCORE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", _text, nullable=False),
        pa.field("category", _text, nullable=False),
        pa.field("split", _text, nullable=False),
        pa.field("label", pa.int8()),
        pa.field("defect", _text),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("calibrated_score", pa.float32()),
        pa.field("decision", pa.string()),
        pa.field("anomaly_map", pa.binary()),
        pa.field("map_offset", pa.float32()),
        pa.field("map_scale", pa.float32()),
        pa.field("calibration_offset", pa.float32()),
        pa.field("calibration_scale", pa.float32()),
        pa.field("status", _text, nullable=False),
        pa.field("error", pa.string()),
        pa.field("model", _text, nullable=False),
    ]
)
"""One scored sample. `score` is raw: never clipped, never rescaled by what else was scored. `anomaly_map` is a
16-bit grey PNG at the model's input resolution; a pixel v stands for `map_offset + map_scale * v`. Where the model has
a calibrator, `calibrated_score` is given, and the calibrated map is (map − calibration_offset) / calibration_scale."""


@dataclass(frozen=True)
class Crop:
    """What ingest cuts out of an image, and of its mask, before it stores them.

    One class for both kinds, so that its plain form has the same keys in every row.

    Attributes:
        kind: "centre" is the square in the middle of the image. "fundus" is the square around the retina in a
            photograph of the eye: as wide as the larger side of the largest bright region, around its centroid.
        side: height and width of what is stored; a centre crop is cut at this size, a fundus crop is resized to it.
        pad: of a centre crop: fill up with black what a smaller image lacks; else such an image is rejected.
        threshold: of a fundus crop: pixels whose R + G + B lies above this are bright.
        margin: of a fundus crop: pixels added on each side; black where they lie beyond the image.
    """

    kind: Literal["centre", "fundus"]
    side: int
    pad: bool = False
    threshold: int = 30
    margin: int = 5


@dataclass(frozen=True)
class SampleRef:
    """One sample as a layout finds it, before any image is opened.

    Attributes:
        sample_id: unique and stable: data set name + "/" + path of the image relative to the source's root.
        dataset: name of the data set.
        category: object class, e.g. "bottle".
        split: "train", "val" or "test".
        label: 0 normal, 1 anomalous, None unknown.
        defect: defect type ("good" for normal samples), None unknown.
        uri: path or URI of the image file.
        mask_uri: path or URI of the mask file; None where there is none (a normal sample's mask is all zero).
        mask_threshold: mask values above this are anomalous; None takes what each mask shows to be right.
        size: bytes of the image file where the listing told, else None.
        data: the encoded image itself where images do not lie in files of their own (CIFAR's binary form).
        crop: what to store of the image and its mask; None stores the image untouched.
        more_masks: further mask files; the sample's mask is the union of all.
    """

    sample_id: str
    dataset: str
    category: str
    split: str
    label: int | None
    defect: str | None
    uri: str
    mask_uri: str | None = None
    mask_threshold: int | None = None
    size: int | None = None
    data: bytes | None = None
    crop: Crop | None = None
    more_masks: tuple[str, ...] = ()

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> SampleRef:
        """Return the sample that `dataclasses.asdict` made plain."""
        crop = values.get("crop")
        more = tuple(values.get("more_masks", ()))
        return cls(**{**values, "crop": None if crop is None else Crop(**crop), "more_masks": more})

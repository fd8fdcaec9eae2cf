"""Stored samples as a person is shown them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unianom.data.image import (
    ImageLimits,
    InputPolicy,
    decode_image,
    decode_map,
    decode_mask,
    prepare_image,
    prepare_mask,
)
from unianom.data.shards import PartSet, ScoreSet
from unianom.thresholds import ScoreKind

STORED = ("image", "mask", "height", "width")
"""Columns of the shards that a picture of a sample is made of."""

MAP_COLUMNS = ("anomaly_map", "map_offset", "map_scale", "calibration_offset", "calibration_scale")
"""Columns of scores that a map is made of."""


def read_samples(parts: PartSet, sample_ids: set[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield sample_id and further columns of some samples, in the order they are stored; skip parts without any."""
    wanted = pa.array(sorted(sample_ids), pa.string())
    for part in parts.parts:
        ids = (i for batch in parts.read(part, None, ["sample_id"], rows=4096) for i in batch["sample_id"].to_pylist())
        if sample_ids.isdisjoint(ids):
            continue
        for batch in parts.read(part, None, ["sample_id", *columns], rows=16):
            yield from batch.filter(pc.is_in(batch["sample_id"], wanted)).to_pylist()


def read_maps(scores: ScoreSet, sample_ids: set[str], kind: ScoreKind = "raw") -> dict[str, np.ndarray]:
    """Return the anomaly maps, S×S float32, of those of some samples that have one, by sample_id.

    Args:
        scores: with maps.
        sample_ids: the samples.
        kind: whether maps are as the method gave them, or calibrated.
    """
    maps = {}
    for row in read_samples(scores, sample_ids, MAP_COLUMNS):
        if row["anomaly_map"] is None:
            continue
        anomaly_map = decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
        if kind == "calibrated":
            anomaly_map = (anomaly_map - row["calibration_offset"]) / row["calibration_scale"]
        maps[row["sample_id"]] = anomaly_map
    return maps


def as_model_input(stored: Mapping[str, Any], policy: InputPolicy) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a sample as the model saw it: S×S×3 uint8, and its mask, S×S bool, if it has one.

    Args:
        stored: its `STORED` columns.
        policy: of the model.
    """
    # it was within the limits of ingest and of scoring, so none apply here
    limits = ImageLimits(stored["height"] * stored["width"], max(len(stored["image"]), len(stored["mask"] or b"")))
    image = prepare_image(decode_image(stored["image"], limits).pixels, policy)
    if stored["mask"] is None:
        return image, None
    return image, prepare_mask(decode_mask(stored["mask"], limits=limits), policy)


def data_uri(kind: str, content: bytes) -> str:
    """Return a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def labelled(table: pa.Table) -> pa.Table:
    """Return the rows of a score table that an evaluation counts, scored and with a known label, by sample_id."""
    kept = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.is_valid(table["label"])))
    return kept.sort_by("sample_id")


def text_column(table: pa.Table, column: str) -> np.ndarray:
    """Return a text column as an (n,) array of str or None."""
    return np.asarray(table[column].cast(pa.string()).to_pylist(), dtype=object)

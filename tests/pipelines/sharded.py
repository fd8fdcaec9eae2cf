"""Small shard sets of random images, written without ingest, for tests of what training reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.test_shards import write_set
from unianom.data.image import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageLimits,
    InputPolicy,
    decode_mask,
    encode_png,
    prepare_mask,
)
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError

SIDE = 64
POLICY = InputPolicy(resize="stretch", size=SIDE, crop=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)
LIMITS = ImageLimits()

Row = dict[str, Any]


def picture(seed: Sequence[int], height: int = 48, width: int = 72) -> np.ndarray:
    """H×W×3 uint8 of random 12-pixel tiles."""
    tiles = np.random.default_rng(seed).integers(0, 256, (height // 12 + 1, width // 12 + 1, 3), np.uint8)
    return np.kron(tiles, np.ones((12, 12, 1), np.uint8))[:height, :width]


def sample(
    category: str,
    split: str,
    number: int,
    label: int | None = 0,
    pixels: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Row:
    """A row of SAMPLE_SCHEMA; its image is random unless given, its mask H×W bool."""
    if pixels is None:
        pixels = picture([*category.encode(), *split.encode(), number])
    return {
        "sample_id": f"set/{category}/{split}/{label}/{number:03d}.png",
        "dataset": "set",
        "category": category,
        "split": split,
        "label": label,
        "defect": "good" if label == 0 else None,
        "image": encode_png(pixels),
        "format": "PNG",
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "mask": None if mask is None else encode_png(np.where(mask, np.uint8(255), np.uint8(0))),
        "uri": f"/data/{category}/{split}/{number}.png",
        "sha256": "0" * 64,
    }


def samples(category: str, split: str, count: int, label: int | None = 0, first: int = 0) -> list[Row]:
    """Rows numbered from `first` on."""
    return [sample(category, split, number, label) for number in range(first, first + count)]


PARTS: list[list[Row]] = [
    samples("bolt", "test", 3) + samples("bolt", "train", 7) + samples("nut", "train", 4) + samples("nut", "val", 3),
    samples("washer", "test", 4, label=1),  # no image to learn from
    samples("nut", "train", 5, first=4) + samples("nut", "train", 2, label=1) + samples("bolt", "train", 6, first=7),
    samples("bolt", "train", 1, label=None) + samples("washer", "train", 8),
]
"""Row groups of two or three images; some rows are of the test split, anomalous or of unknown label."""

CATEGORIES = ["washer", "nut", "bolt"]

NORMALS: list[list[Row]] = [[row for row in rows if row["split"] != "test" and row["label"] == 0] for rows in PARTS]
"""Of every part what methods may learn from, in order."""


def masked(category: str, split: str, count: int, first: int = 0) -> list[Row]:
    """Anomalous rows, each with a mask of its own."""
    rows = []
    for number in range(first, first + count):
        mask = np.zeros((48, 72), bool)
        mask[number % 20 : 20 + number % 25, 3 * (number % 9) : 50] = True
        rows.append(sample(category, split, number, 1, mask=mask))
    return rows


LABELLED_PARTS: list[list[Row]] = [
    samples("bolt", "test", 2) + masked("bolt", "test", 2) + samples("bolt", "train", 4) + masked("bolt", "train", 3),
    masked("nut", "val", 2) + samples("nut", "val", 2),  # nothing to learn from
    masked("nut", "train", 4)
    + samples("nut", "train", 4)
    + samples("bolt", "train", 1, label=None)
    + masked("bolt", "train", 2, first=20)
    + [sample("bolt", "train", 30, 0, mask=np.ones((48, 72), bool))],  # marked, though normal
]
"""As `PARTS`, for methods that learn from labels and masks; there is no washer."""

LABELLED: list[list[Row]] = [
    [row for row in rows if row["split"] == "train" and row["label"] is not None] for rows in LABELLED_PARTS
]
"""Of every part what these may learn from, in order."""


def truth(row: Row) -> np.ndarray:
    """A row's mask as S×S bool under `POLICY`."""
    if row["label"] == 0:
        return np.zeros((SIDE, SIDE), bool)
    return prepare_mask(decode_mask(row["mask"]), POLICY)


def write_shards(folder: Path, parts: Sequence[list[Row]] = PARTS, images_per_group: int = 3) -> ShardSet:
    """A shard set of these parts."""
    mean = np.mean([len(row["image"]) for rows in parts for row in rows])
    return ShardSet.open(write_set(folder, parts, group_bytes=int(mean * (images_per_group - 1))))


def forbid_test_rows(monkeypatch: Any) -> None:
    """Let every reading of a shard set fail that could see a row of the test split."""
    for name in ("read", "read_range"):
        monkeypatch.setattr(ShardSet, name, _watched(getattr(ShardSet, name)))


def _watched(read: Any) -> Any:
    def watched(self: ShardSet, within: Any, selection: Selection | None = None, *rest: Any, **more: Any) -> Any:
        if selection is None or not selection.splits or "test" in selection.splits:
            raise DataError(f"read test rows of {within}")
        return read(self, within, selection, *rest, **more)

    return watched

"""Samples of shards as input of a method: one whose decoder hangs ends the job by an error that names it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.reader import SampleReader
from pipelines.data.validation_set import choose_validation_images
from tests.pipelines.sharded import NORMALS, PARTS, POLICY, write_shards
from unianom.data.image import ImageLimits, decode_prepared
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError

LIMITS = ImageLimits(seconds=1)
HUNG = NORMALS[0][3]
NORMAL_IMAGES = Selection(("train", "val"), (), (NORMAL,))


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_shards(tmp_path / "shards", PARTS)


@pytest.fixture(autouse=True)
def decoder_hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At one image."""
    release = threading.Event()

    def decode(data: bytes, *rest: Any) -> np.ndarray:
        if data == HUNG["image"]:
            release.wait()
        return decode_prepared(data, *rest)

    monkeypatch.setattr("pipelines.data.reader.decode_prepared", decode)
    yield
    release.set()


@pytest.mark.parametrize("threads", [1, 3])
def test_images_before_it_are_read_and_it_is_named(shards: ShardSet, threads: int) -> None:
    reader = SampleReader(shards, NORMAL_IMAGES, None, 1, LIMITS, threads)
    found = reader.decoded(shards.ranges(NORMAL_IMAGES, 128)[0], POLICY, ["sample_id"])
    for row in NORMALS[0][:3]:
        (sample,) = next(found)
        assert sample.row["sample_id"] == row["sample_id"]
        np.testing.assert_array_equal(sample.pixels, decode_prepared(row["image"], POLICY))
    message = rf"^{HUNG['sample_id']}: .*took more than 1 s, the limit \(--limits.seconds\); raise it, or"
    with pytest.raises(DataError, match=message):
        next(found)


def test_validation_names_it(shards: ShardSet) -> None:
    held_out = frozenset(row["sample_id"] for row in NORMALS[0])
    with pytest.raises(DataError, match=f"^{HUNG['sample_id']}: .*took more than 1 s"):
        choose_validation_images(
            shards,
            [HUNG["category"]],
            held_out,
            POLICY,
            LIMITS,
            normals=len(NORMALS[0]),
            anomalous=None,
            labelled=False,
            makers={},
            seed=0,
        )

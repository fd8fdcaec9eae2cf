"""Rows cut into batches of one model, and decoded into the network's input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.decoded_batches import BatchDecoder
from pipelines.data.decoded_rows import same_model_batches
from pipelines.data.timed_pool import TimedPool
from pipelines.runtime.stage_clock import StageClock
from tests.pipelines.sharded import LIMITS, POLICY, picture
from unianom.data.image import ImageLimits, decode_image, decode_upright, encode_png, prepare_image
from unianom.data.tensors import normalise as normalised
from unianom.data.tensors import normalise_into

CATEGORIES = "aaabbbbbbbbbbbaccccccccccccccccccccab"


def record_batches(sizes: list[int]) -> Iterator[pa.RecordBatch]:
    """Rows of CATEGORIES, so many at once, each with dictionaries of its own."""
    start = 0
    for size in sizes:
        names = list(CATEGORIES[start : start + size])
        columns = {"category": pa.array(names).dictionary_encode(), "number": range(start, start + len(names))}
        yield pa.RecordBatch.from_pydict(columns)
        start += size


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 9, 1, 22], [16, 16, 5]])
@pytest.mark.parametrize("size", [1, 4, 8, 100])
def test_batches_are_full_unless_the_model_changes(sizes: list[int], size: int) -> None:
    models = {"a": "one", "b": "two", "c": "two"}
    expected: list[tuple[str, list[int]]] = []
    for number, category in enumerate(CATEGORIES):
        model = models[category]
        if not expected or expected[-1][0] != model or len(expected[-1][1]) == size:
            expected.append((model, []))
        expected[-1][1].append(number)
    found = [
        (m, t["number"].to_pylist()) for m, t in same_model_batches(record_batches(sizes), models.__getitem__, size)
    ]
    assert found == expected


def test_a_category_that_no_row_has_needs_no_model() -> None:
    batch = next(record_batches([5])).slice(3)  # "a" is in its dictionary alone
    assert [model for model, _ in same_model_batches(iter([batch]), {"b": "two"}.__getitem__, 8)] == ["two"]


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_those_decoded_one_by_one_and_broken_ones_are_told(threads: int) -> None:
    images = [encode_png(picture([number])) for number in range(11)]
    broken = {2: images[2][:50], 3: b"", 10: b"nothing"}
    files = [broken.get(number, data) for number, data in enumerate(images)]
    tables = [
        ("model", pa.table({"number": list(range(n, min(n + 4, 11))), "image": files[n : n + 4]})) for n in (0, 4, 8)
    ]
    with TimedPool(threads, LIMITS) as pool:
        decoder = BatchDecoder(pool, threads, LIMITS, StageClock())
        seen = []
        for batch in decoder.decoded(iter(tables), lambda _: POLICY, 4):
            numbers = batch.rows["number"].to_numpy()[batch.places].tolist()
            seen += numbers
            pixels = [prepare_image(decode_image(images[number]).pixels, POLICY) for number in numbers]
            assert torch.equal(batch.images, normalised(pixels, POLICY))
            told = {int(batch.rows["number"][row].as_py()): error.status for row, error in batch.errors.items()}
            assert told == {number: "corrupt" for number in batch.rows["number"].to_pylist() if number in broken}
            assert batch.rows.column_names == ["number"]
    assert seen == [number for number in range(11) if number not in broken]


def test_no_more_is_decoded_than_is_asked_for() -> None:
    """Of twelve batches, those that wait and the one that is used."""
    taken = []

    def tables() -> Iterator[tuple[str, pa.Table]]:
        for number in range(12):
            taken.append(number)
            yield "model", pa.table({"image": [encode_png(picture([number]))] * 2})

    with TimedPool(1, LIMITS) as pool:
        decoder = BatchDecoder(pool, 1, LIMITS, StageClock())
        for used, _ in enumerate(decoder.decoded(tables(), lambda _: POLICY, 4), 1):
            assert len(taken) <= used + 2
        assert used == 12


def test_memory_is_used_again() -> None:
    rows = pa.table({"image": [encode_png(picture([0]))] * 2})
    with TimedPool(1, LIMITS) as pool:
        decoder = BatchDecoder(pool, 1, LIMITS, StageClock())
        places = {
            batch.images.data_ptr() for batch in decoder.decoded(iter([("model", rows)] * 20), lambda _: POLICY, 2)
        }
    assert len(places) <= 3


def test_an_image_that_hangs_leaves_the_others_and_its_memory_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread, when it goes on, writes to a place that no image was written to meanwhile."""
    images = [encode_png(picture([number])) for number in range(24)]
    hung = images[5]
    release, come_back = threading.Event(), threading.Event()
    places: list[int] = []
    before: list[int] = []

    def decode(data: bytes, *rest: Any) -> Any:
        if data == hung:
            before.append(len(places))
            release.wait()
        return decode_upright(data, *rest)

    def normalise(place: np.ndarray, *rest: Any) -> None:
        places.append(place.ctypes.data)
        normalise_into(place, *rest)
        if release.is_set():
            come_back.set()

    monkeypatch.setattr("pipelines.data.decoded_rows.decode_upright", decode)
    monkeypatch.setattr("pipelines.data.decoded_batches.normalise_into", normalise)
    tables = [("model", pa.table({"number": [n, n + 1], "image": images[n : n + 2]})) for n in range(0, 24, 2)]
    limits = ImageLimits(seconds=1)
    with TimedPool(1, limits) as pool:
        decoder = BatchDecoder(pool, 1, limits, StageClock())
        for batch in decoder.decoded(iter(tables), lambda _: POLICY, 2):
            numbers = batch.rows["number"].to_pylist()
            assert {numbers[row]: error.status for row, error in batch.errors.items()} == (
                {5: "timeout"} if 5 in numbers else {}
            )
            pixels = [prepare_image(decode_image(images[n]).pixels, POLICY) for n in numbers if n != 5]
            assert torch.equal(batch.images, normalised(pixels, POLICY))
        release.set()
        assert come_back.wait(60)
    *meanwhile, late = places[before[0] :]
    assert len(meanwhile) == 18
    assert len(set(meanwhile)) < 18  # memory is used again
    assert late not in meanwhile

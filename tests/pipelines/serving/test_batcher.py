"""Batches: what waits while the device is busy goes together."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from pipelines.serving.batcher import Batcher
from tests.pipelines.serving.conftest import RecordedMetrics


class Held:
    """A predictor that answers with the images it was given, once a test lets it."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def predict(self, images: list[Any]) -> list[Any]:
        self.batches.append(list(images))
        self.begun.release()
        assert self.go.acquire(timeout=60)
        return [f"scored {image}" for image in images]


async def begun(predictor: Held) -> None:
    """Wait until a batch is on the device."""
    assert await asyncio.to_thread(predictor.begun.acquire, timeout=60)


def batcher(size: int, wait_seconds: float = 0.0) -> tuple[Batcher, Held, RecordedMetrics]:
    metrics = RecordedMetrics()
    return Batcher(size, wait_seconds, 1, metrics), Held(), metrics  # type: ignore[arg-type]


def test_what_comes_while_the_device_is_busy_goes_in_full_batches() -> None:
    made, predictor, metrics = batcher(4)

    async def run() -> list[Any]:
        first = asyncio.create_task(made.score((predictor, 0)))  # type: ignore[arg-type]
        await begun(predictor)
        others = [asyncio.create_task(made.score((predictor, n))) for n in range(1, 7)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        predictor.go.release(3)
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(run()) == [f"scored {n}" for n in range(7)]
    assert predictor.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [size for size, _ in metrics.of("batch")] == [1, 4, 2]


def test_a_full_batch_does_not_wait() -> None:
    made, predictor, _ = batcher(2, wait_seconds=3600)
    predictor.go.release()

    async def run() -> list[Any]:
        return list(await asyncio.gather(*(made.score((predictor, n)) for n in range(2))))  # type: ignore[arg-type]

    assert asyncio.run(asyncio.wait_for(run(), 60)) == ["scored 0", "scored 1"]
    assert predictor.batches == [[0, 1]]


def test_what_was_given_up_is_not_computed() -> None:
    made, predictor, _ = batcher(4)

    async def run() -> Any:
        first = asyncio.create_task(made.score((predictor, 0)))  # type: ignore[arg-type]
        await begun(predictor)
        given_up = asyncio.create_task(made.score((predictor, 1)))  # type: ignore[arg-type]
        last = asyncio.create_task(made.score((predictor, 2)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        predictor.go.release(2)
        await first
        return await last

    assert asyncio.run(run()) == "scored 2"
    assert predictor.batches == [[0], [2]]


def test_it_tells_of_batches_that_fail_and_one_that_lasts() -> None:
    made, predictor, _ = batcher(1)

    class Broken:
        def predict(self, images: list[Any]) -> list[Any]:
            raise RuntimeError("device lost")

    async def run() -> None:
        for number in range(2):
            assert isinstance(await made.score((Broken(), number)), RuntimeError)  # type: ignore[arg-type]
        assert made.failed == 2
        assert made.busy_seconds == 0
        one = asyncio.create_task(made.score((predictor, 0)))  # type: ignore[arg-type]
        await begun(predictor)
        assert made.busy_seconds > 0
        predictor.go.release()
        await one
        assert made.failed == 0

    asyncio.run(run())


def test_a_batch_that_is_done_is_let_go() -> None:
    """A replaced model would else stay until the next request."""
    made, predictor, _ = batcher(1)
    predictor.go.release()
    asyncio.run(made.score((predictor, 0)))  # type: ignore[arg-type]
    gone = threading.Event()
    weakref.finalize(predictor, gone.set)
    del predictor
    assert gone.wait(60)
    del made


def test_its_thread_ends_with_it() -> None:
    before = set(threading.enumerate())
    made, _, _ = batcher(1)
    (thread,) = set(threading.enumerate()) - before
    del made
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()

"""Images of several requests, joined into batches for the network.

While one batch is on the device, the next one gathers; when the device is free, all that wait go, up to a full batch.
Ray Serve's `@serve.batch` closes a batch when its time is over, also while the device is busy, so that under load the
network would get many small ones.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from pipelines.runtime.task_worker import set_threads
from pipelines.serving.metrics import ServingMetrics
from pipelines.serving.predictor import Predictor, PreparedImage, ScoredImage, predict_each
from unianom.errors import ImageError

Item = tuple[Predictor, PreparedImage]
Scored = ScoredImage | ImageError | Exception


@dataclass(eq=False)
class _Waiting:
    """An item that waits for its batch since it came, in seconds of `time.monotonic`."""

    item: Item
    future: Future[Scored] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Scores items on a thread of its own, one batch after the other.

    Args:
        size: images of a batch at most.
        wait_seconds: how long an image waits for others while the device is free.
        threads: of PyTorch and FAISS.
        metrics: told of each batch.
    """

    def __init__(self, size: int, wait_seconds: float, threads: int, metrics: ServingMetrics) -> None:
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._worker = _Worker(self._queue, size, wait_seconds, metrics)
        threading.Thread(target=self._worker.run, args=(threads,), name="device", daemon=True).start()
        # the thread knows the worker alone, so that it ends with a batcher that nobody has any more
        weakref.finalize(self, self._queue.put, None).atexit = False

    async def score(self, item: Item) -> Scored:
        """Return what is said of an item, once it was its batch's turn; one that is cancelled meanwhile is left out."""
        waiting = _Waiting(item)
        self._queue.put(waiting)
        return await asyncio.wrap_future(waiting.future)

    @property
    def failed(self) -> int:
        """Batches in a row in which no image could be scored, by no fault of the images."""
        return self._worker.failed

    @property
    def busy_seconds(self) -> float:
        """How long the batch that is on the device has been there; 0 if none is."""
        began = self._worker.began
        return 0.0 if began is None else time.monotonic() - began


class _Worker:
    """What the thread of a batcher does."""

    def __init__(
        self, waiting: queue.SimpleQueue[_Waiting | None], size: int, wait_seconds: float, metrics: ServingMetrics
    ) -> None:
        self._queue, self._size, self._wait, self._metrics = waiting, size, wait_seconds, metrics
        self.failed = 0
        self.began: float | None = None

    def run(self, threads: int) -> None:
        """Score batches until there is a None in the queue."""
        set_threads(threads)
        while self._score_next():
            pass

    def _score_next(self) -> bool:
        """Score the next batch; return whether there was one. No image and no model of it is held after that."""
        batch = self._next()
        running = [one for one in batch if one.future.set_running_or_notify_cancel()]
        if running:
            results = self._score([one.item for one in running])
            for one, result in zip(running, results, strict=True):
                one.future.set_result(result)
        return bool(batch)

    def _next(self) -> list[_Waiting]:
        """Return the next batch: all that wait, or come while its first one may wait; none at the end."""
        batch: list[_Waiting] = []
        while len(batch) < self._size:
            try:
                if batch:
                    left = batch[0].since + self._wait - time.monotonic()
                    found = self._queue.get(left > 0, max(left, 0.0))
                else:
                    found = self._queue.get()
            except queue.Empty:
                break
            if found is None:
                self._queue.put(None)  # for the next time
                break
            batch.append(found)
        return batch

    def _score(self, items: Sequence[Item]) -> list[Scored]:
        self.began = time.monotonic()
        try:
            found: list[Scored] = predict_each(items)
        except Exception as error:  # of what is done around predicting
            found = [error.with_traceback(None)] * len(items)  # which would hold the batch
        finally:
            seconds, self.began = time.monotonic() - self.began, None
        every = all(isinstance(one, Exception) and not isinstance(one, ImageError) for one in found)
        self.failed = self.failed + 1 if every else 0
        self._metrics.batch(len(items), seconds)
        return found

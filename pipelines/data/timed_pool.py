"""Threads that read and decode images, and give up on one that takes too long.

Code of a decoder or a file system that hangs cannot be stopped from outside. Its thread is left to itself: its image
has timed out, and another thread takes its place. Nothing waits for it, neither a result nor the end of the process.

    submit ─▶ queue ─▶ threads ─▶ futures
                         ▲
          one more, the watch: sleeps until the first of the running items would be late
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from unianom.data.image import ImageLimits
from unianom.errors import ImageError, MachineError

T = TypeVar("T")
R = TypeVar("R")

MOST_HANGING = 8
"""Threads of a pool that may hang at a time, since each may hold a core and memory."""

MOST_IN_A_ROW = 8
"""Items that may time out without one that is done in between: beyond, the store or the machine is at fault, not
they."""

EXIT_SECONDS = 1.0
"""How long the end of the process waits, at most, for threads that are in the middle of an item."""


class TimedPool:
    """A pool of threads that work on items in the order they come in, each item for a limited time.

    An item's time starts when a thread begins with it. One that is late has timed out: its result is an ImageError
    "timeout". The thread may still be at it, so what it was given to write to must not be used for anything else.

    A context manager: at its end no thread begins with another item once those submitted are done.

    Args:
        threads: items that are worked on at the same time.
        limits: `seconds` is the limit; None for none.
    """

    def __init__(self, threads: int, limits: ImageLimits) -> None:
        self._state = _State(threads, limits)
        # threads know the state alone, so that they end with a pool that nobody has any more
        self._end = weakref.finalize(self, self._state.close)
        self._end.atexit = False

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Have a call made within the limit.

        Returns:
            What the call returns or raises. It raises ImageError "timeout" for one that is late, and MachineError where
            more than `MOST_HANGING` threads hang, or more than `MOST_IN_A_ROW` items in a row were late.
        """
        return self._state.submit(_Call(lambda _: function(*arguments), (None,), each=False))

    def submit_each(self, function: Callable[[T], R | ImageError], items: Sequence[T]) -> Future[list[R | ImageError]]:
        """Have a function called for one item after another, each within the limit.

        Returns:
            What the function returns for each, ImageError "timeout" for those that were late; raises what the function
            raises, and MachineError as `submit`.
        """
        return self._state.submit(_Call(function, items, each=True))

    def submit_unlimited(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Have a call made, however long it takes."""
        return self._state.submit(_Call(lambda _: function(*arguments), (None,), each=False, limited=False))

    def __enter__(self) -> TimedPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


class _Call:
    """Items that one thread works on, one after another, and what came of those that are done."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], each: bool, limited: bool = True) -> None:
        self.function, self.items, self.each, self.limited = function, items, each, limited
        self.results: list[Any] = []
        self.future: Future[Any] = Future()

    def finish(self) -> None:
        self.future.set_result(self.results if self.each else self.results[0])


class _Worker:
    """A thread of the pool. What it is at is written under the lock of the state.

    Attributes:
        thread: itself.
        call, item: what it works on; None while it waits.
        started: when it began with its item; None while it is at none that has a limit.
        late: whether it was given up.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread
        self.call: _Call | None = None
        self.item: Any = None
        self.started: float | None = None
        self.late = False


class _State:
    """All of a pool that its threads share."""

    def __init__(self, threads: int, limits: ImageLimits) -> None:
        self._threads, self._limits = threads, limits
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []  # those that were not given up
        self._changed = threading.Event()  # a worker has ended
        self._started = self._closed = False
        self._hanging = self._in_a_row = 0

    def submit(self, call: _Call) -> Future[Any]:
        if self._closed:
            raise RuntimeError("the pool is closed")
        with self._lock:
            if not self._started:
                self._start()
        self._queue.put(call)
        return call.future

    def close(self) -> None:
        """Let the threads end when all that was submitted is done."""
        # without the lock: Python may collect the pool, and call this, in a thread that holds it
        if not self._closed:
            self._closed = True
            for _ in range(self._threads):
                self._queue.put(None)

    def join(self, until: float) -> None:
        """Wait for threads that were not given up; no longer than to a moment of `time.monotonic`."""
        with self._lock:
            threads = [worker.thread for worker in self._workers]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self) -> None:
        self._started = True
        _running.add(self)
        for _ in range(self._threads):
            self._add_worker(None)
        if self._limits.seconds is not None:
            threading.Thread(target=self._watch, args=(self._limits.seconds,), name="image-watch", daemon=True).start()

    def _add_worker(self, call: _Call | None) -> None:
        """Start a thread that works on a call, of which some items may be done, and then on what the queue holds."""
        worker = _Worker()
        # an exit waits for every thread that is no daemon, also for one that hangs
        worker.thread = threading.Thread(target=self._work, args=(worker, call), name="image-worker", daemon=True)
        self._workers.append(worker)
        worker.thread.start()

    # ------------------------------------------------------------------------------------------- threads that work
    def _work(self, worker: _Worker, call: _Call | None) -> None:
        if call is not None and not self._finish(worker, call):
            return
        del call  # which would hold what it was about until the next one comes
        while self._finish(worker, self._queue.get()):
            pass

    def _finish(self, worker: _Worker, call: _Call | None) -> bool:
        """Work on the items of a call that are not done yet; return whether this thread is to go on, as it is not
        where None stands for the end."""
        if call is None:
            with self._lock:
                self._workers.remove(worker)
            self._changed.set()
            return False
        if not call.future.running() and not call.future.set_running_or_notify_cancel():
            return True
        error: BaseException | None = None
        with self._lock:
            self._begin_item(worker, call)
        while worker.call is not None:
            result = None
            try:
                result = call.function(worker.item)
            except BaseException as raised:
                error = raised
            with self._lock:
                if worker.late:  # the call is another thread's by now
                    self._hanging -= 1
                    return False
                if call.limited:
                    self._in_a_row = 0
                if error is None:
                    call.results.append(result)
                self._begin_item(worker, call if error is None else None)
        if error is None:
            call.finish()
        else:
            call.future.set_exception(error)
            # it knows this frame, which by both would know it: what was worked on would stay with them
            del error, call
        return True

    def _begin_item(self, worker: _Worker, call: _Call | None) -> None:
        """Note what a thread is at from now on: the next item of a call, or none where none is left."""
        worker.call = worker.item = worker.started = None
        if call is not None and len(call.results) < len(call.items):
            worker.call, worker.item = call, call.items[len(call.results)]
            worker.started = time.monotonic() if call.limited else None

    # ------------------------------------------------------------------------------------------------- their watch
    def _watch(self, seconds: float) -> None:
        while (wait := self._give_up_late(seconds)) is not None:
            # an item that is begun meanwhile is not late before that
            self._changed.wait(wait)
            self._changed.clear()

    def _give_up_late(self, seconds: float) -> float | None:
        """Replace threads whose item is late; return seconds until the next one may be, None if none works here."""
        late: list[tuple[_Call, ImageError | MachineError]] = []
        with self._lock:
            now = time.monotonic()
            for worker in tuple(self._workers):
                if worker.call is None or worker.started is None or now < worker.started + seconds:
                    continue
                worker.late = True
                self._workers.remove(worker)
                call = worker.call
                error = self._timed_out(seconds)
                if call.each and isinstance(error, ImageError):
                    call.results.append(error)
                    self._add_worker(call)
                else:
                    self._add_worker(None)
                    late.append((call, error))
            started = [worker.started for worker in self._workers if worker.started is not None]
            wait = min(started, default=now) + seconds - now if self._workers else None
        for call, error in late:
            call.future.set_exception(error)
        return wait

    def _timed_out(self, seconds: float) -> ImageError | MachineError:
        """Count one more thread that is given up; return what is to be said of it."""
        self._hanging += 1
        self._in_a_row += 1
        if self._hanging > MOST_HANGING:
            return MachineError(
                f"{self._hanging} threads of a worker hang in reading or decoding images, each for more than "
                f"{seconds:g} s, and hold cores and memory; leave such images out, or raise --limits.seconds if they "
                f"are only slow"
            )
        if self._in_a_row > MOST_IN_A_ROW:
            return MachineError(
                f"{self._in_a_row} images in a row took more than {seconds:g} s each to read and decode; see whether "
                f"their store or this machine hangs, or raise --limits.seconds, and run the same command again, it "
                f"continues"
            )
        return ImageError(
            "timeout", f"reading and decoding it took more than {seconds:g} s, the limit (--limits.seconds)"
        )


_running: weakref.WeakSet[_State] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Let threads come to the end of their item: one that Python stops within a library may end the process by an
    abort."""
    states = list(_running)
    for state in states:
        state.close()
    until = time.monotonic() + EXIT_SECONDS
    for state in states:
        state.join(until)

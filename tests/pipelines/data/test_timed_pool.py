"""Threads that give up on an item that takes too long: the others are done, and nothing waits for it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from pipelines.data import timed_pool
from pipelines.data.ahead import map_ahead
from pipelines.data.timed_pool import TimedPool
from unianom.data.image import ImageLimits
from unianom.errors import ImageError, MachineError

SOON = ImageLimits(seconds=0.5)
"""Items of these tests take microseconds, or hang."""

NEVER = ImageLimits(seconds=None)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Hanging items wait for it; set at the end, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


def hanging(release: threading.Event, *hang: int) -> Callable[[int], int]:
    """Return a function that squares a number, but hangs at some."""

    def square(number: int) -> int:
        if number in hang:
            release.wait()
        return number * number

    return square


def seen(results: list[int | ImageError]) -> list[int | str]:
    """Results, of errors their status."""
    return [found.status if isinstance(found, ImageError) else found for found in results]


def assert_all_threads_work(pool: TimedPool, threads: int) -> None:
    """So many items are worked on at the same time."""
    barrier = threading.Barrier(threads)
    futures = [pool.submit_unlimited(barrier.wait, 60) for _ in range(threads)]
    assert sorted(future.result(60) for future in futures) == list(range(threads))


@pytest.mark.parametrize("limits", [ImageLimits(), NEVER])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_in_time_is_as_from_any_pool(threads: int, limits: ImageLimits) -> None:
    with TimedPool(threads, limits) as pool:
        shares = [pool.submit_each(lambda n: n * n, range(start, start + 5)) for start in range(0, 40, 5)]
        assert [found for share in shares for found in share.result(60)] == [n * n for n in range(40)]
        assert pool.submit(divmod, 7, 2).result(60) == (3, 1)
        assert pool.submit_unlimited(divmod, 7, 2).result(60) == (3, 1)
        assert pool.submit_each(abs, []).result(60) == []
        for failing in (pool.submit(divmod, 1, 0), pool.submit_each(lambda n: 1 // n, [1, 0, 2])):
            with pytest.raises(ZeroDivisionError):
                failing.result(60)
        assert_all_threads_work(pool, threads)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_an_item_that_hangs_is_told_and_all_others_are_done(threads: int, place: int, release: threading.Event) -> None:
    with TimedPool(threads, SOON) as pool:
        share, other = pool.submit_each(hanging(release, place), range(5)), pool.submit_each(abs, range(5))
        assert seen(share.result(60)) == ["timeout" if n == place else n * n for n in range(5)]
        assert other.result(60) == list(range(5))
        assert_all_threads_work(pool, threads)


def test_a_call_that_hangs_says_so_and_what_it_does_later_counts_for_nothing(release: threading.Event) -> None:
    ended = threading.Event()

    def late() -> int:
        release.wait()
        ended.set()
        raise ValueError("too late")

    with TimedPool(1, SOON) as pool:
        future = pool.submit(late)
        with pytest.raises(ImageError, match=r"took more than 0.5 s, the limit \(--limits.seconds\)") as caught:
            future.result(60)
        assert caught.value.status == "timeout"
        release.set()
        assert ended.wait(60)
        assert pool.submit(abs, -1).result(60) == 1
        assert future.exception() is caught.value


def test_time_in_the_queue_does_not_count(release: threading.Event) -> None:
    with TimedPool(1, SOON) as pool:
        first = pool.submit_unlimited(release.wait)
        waiting = pool.submit(abs, -1)
        assert not wait([first, waiting], 3 * float(SOON.seconds or 0)).done
        release.set()
        assert waiting.result(60) == 1
        assert first.result(60)


def test_the_watch_needs_nobody_who_waits(release: threading.Event) -> None:
    """All threads hang, and what the caller waits for is behind them in the queue."""
    with TimedPool(2, SOON) as pool:
        for _ in range(2):
            pool.submit(release.wait)
        assert pool.submit_unlimited(abs, -1).result(60) == 1


def outcome(future: Future[object]) -> str:
    error = future.exception(60)
    return str(future.result()) if error is None else getattr(error, "status", type(error).__name__)


def test_too_many_hanging_threads_are_an_error(release: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_pool, "MOST_HANGING", 2)
    with TimedPool(1, SOON) as pool:
        futures = [pool.submit(hanging(release, 0, 1, 2), number) for number in range(4)]
        assert [outcome(future) for future in futures] == ["timeout", "timeout", "MachineError", "9"]
        with pytest.raises(MachineError, match=r"3 threads of a worker hang .* for more than 0.5 s.* --limits.seconds"):
            futures[2].result()


def test_threads_that_come_back_hang_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_pool, "MOST_HANGING", 1)
    with TimedPool(1, SOON) as pool:
        for _ in range(3):
            hang, thread = threading.Event(), []

            def late(hang: threading.Event = hang, thread: list[threading.Thread] = thread) -> None:
                thread.append(threading.current_thread())
                hang.wait()

            assert outcome(pool.submit(late)) == "timeout"
            assert pool.submit(abs, -1).result(60) == 1
            hang.set()
            thread[0].join(60)


def test_too_many_late_items_in_a_row_are_an_error(release: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a store is away; one that is done in between says that it is not."""
    monkeypatch.setattr(timed_pool, "MOST_IN_A_ROW", 1)
    with TimedPool(1, SOON) as pool:
        apart = pool.submit_each(hanging(release, 0, 2, 4), range(6))
        assert seen(apart.result(60)) == ["timeout", 1, "timeout", 9, "timeout", 25]
        in_a_row = pool.submit_each(hanging(release, 1, 2), range(4))
        with pytest.raises(MachineError, match=r"2 images in a row took more than 0.5 s each .*it continues"):
            in_a_row.result(60)
        assert_all_threads_work(pool, 1)


def test_without_a_limit_nothing_watches(release: threading.Event) -> None:
    with TimedPool(1, NEVER) as pool:
        futures: list[Future[bool]] = []
        threads = threads_of(lambda: futures.append(pool.submit(release.wait)))
        assert [thread.name for thread in threads] == ["image-worker"]
        release.set()
        assert futures[0].result(60)


def threads_of(action: Callable[[], object]) -> set[threading.Thread]:
    """Threads that an action has started."""
    before = set(threading.enumerate())
    action()
    return set(threading.enumerate()) - before


@pytest.mark.parametrize("closed", [True, False])
def test_threads_end_with_their_pool(closed: bool) -> None:
    """Also where nobody closes it; what was submitted is done before."""
    pools = [TimedPool(2, ImageLimits())]
    futures: list[Future[int]] = []
    threads = threads_of(lambda: futures.extend(pools[0].submit(abs, -number) for number in range(9)))
    assert sorted(thread.name for thread in threads) == ["image-watch", "image-worker", "image-worker"]
    if closed:
        with pools[0]:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            pools[0].submit(abs, 1)
    else:
        pools.clear()
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [future.result(0) for future in futures] == list(range(9))


@pytest.mark.parametrize("seconds", ["0.2", "None"])
def test_the_end_of_a_process_does_not_wait_for_a_thread_that_hangs(seconds: str) -> None:
    """Whether it was given up or not."""
    program = f"""
import threading
from pipelines.data.timed_pool import TimedPool
from unianom.data.image import ImageLimits
pool = TimedPool(2, ImageLimits(seconds={seconds}))
begun = threading.Event()
future = pool.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
print(pool.submit(abs, -3).result(), "timeout" if {seconds} and future.exception().status == "timeout" else "waits")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split() == ["3", "waits" if seconds == "None" else "timeout"]


def test_what_failed_is_let_go_without_the_garbage_collector() -> None:
    """A file of hundreds of megabytes that cannot be decoded."""

    class File:
        pass

    def decode(file: File) -> None:
        raise ImageError("corrupt", "no picture")

    gc.disable()
    try:
        with TimedPool(1, NEVER) as pool:
            file = File()
            gone = threading.Event()
            weakref.finalize(file, gone.set)
            future = pool.submit(decode, file)
            del file
            assert str(future.exception()) == "no picture"
            del future
            assert pool.submit(abs, -1).result() == 1
            assert gone.wait(60)
    finally:
        gc.enable()


def test_map_ahead_yields_what_stands_for_late_items(release: threading.Event) -> None:
    with TimedPool(2, SOON) as pool:
        square = hanging(release, 3)
        assert list(map_ahead(pool, square, iter(range(8)), 4, lambda item, error: -item)) == [
            -3 if n == 3 else n * n for n in range(8)
        ]
        with pytest.raises(ImageError, match="took more than"):
            list(map_ahead(pool, square, iter(range(8)), 4))

        def corrupt(number: int) -> int:
            raise ImageError("corrupt", f"{number} is broken")

        with pytest.raises(ImageError, match="0 is broken"):
            list(map_ahead(pool, corrupt, iter(range(2)), 4, lambda item, error: -item))
    with ThreadPoolExecutor(1) as plain:
        assert list(map_ahead(plain, abs, iter([-1]), 1)) == [1]

"""Threads ahead and behind: in order, bounded, and nothing outlives its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from pipelines.data.ahead import Behind, read_ahead


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_one_item_is_read_ahead_and_no_more(pool: ThreadPoolExecutor) -> None:
    read: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(4):
            read.append(number)
            if number == 1:
                second.set()
            yield number

    with closing(read_ahead(pool, items())) as found:  # type: ignore[type-var]
        assert next(found) == 0
        assert second.wait(10)
        pool.submit(int).result()  # the thread is free again
        assert read == [0, 1]
        assert list(found) == [1, 2, 3]


def test_an_error_of_reading_comes_where_its_item_would(pool: ThreadPoolExecutor) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    found = read_ahead(pool, items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(found)


def test_calls_are_made_in_order_and_a_slow_one_holds_the_caller_back(pool: ThreadPoolExecutor) -> None:
    go, made = threading.Semaphore(0), []
    submitted: list[int] = []

    def call(number: int) -> None:
        go.acquire()
        made.append(number)

    def caller() -> None:
        with Behind(pool, 2) as behind:
            for number in range(6):
                behind.submit(call, number)
                submitted.append(number)

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join(0.3)
    assert submitted == [0, 1]  # the third waits until the first is made
    for _ in range(6):
        go.release()
    thread.join(10)
    assert made == list(range(6))


def test_what_a_call_raises_reaches_the_caller_when_all_have_ended(pool: ThreadPoolExecutor) -> None:
    made = []

    def call(number: int) -> None:
        made.append(number)
        if number == 1:
            raise ValueError("disk full")

    def three_calls() -> None:
        with Behind(pool, 10) as behind:
            for number in range(3):
                behind.submit(call, number)

    def an_error_of_its_own() -> None:
        with Behind(pool, 10) as behind:
            behind.submit(call, 1)
            raise KeyError

    with pytest.raises(ValueError, match="disk full"):
        three_calls()
    assert made == [0, 1, 2]
    with pytest.raises(KeyError):
        an_error_of_its_own()

"""The lock for what trials share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipelines.tuning import preparation_lock
from pipelines.tuning.preparation_lock import PreparationLock
from unianom.errors import DataError


def test_one_trial_holds_the_lock_until_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_lock, "time", SimpleNamespace(monotonic=lambda: 100.0))
    lock = PreparationLock()
    assert lock.take("a")
    assert not lock.take("b")
    assert lock.take("a"), "who has it may ask again"
    lock.leave("b")
    assert not lock.take("b"), "it is not b's to leave"
    lock.leave("a")
    assert lock.take("b")
    assert not lock.take("a")


def test_the_lock_passes_on_from_a_trial_that_asks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(preparation_lock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lock = PreparationLock()
    assert lock.take("a")
    for now[0] in (preparation_lock.PATIENCE - 1, 2 * preparation_lock.PATIENCE - 2):
        assert not lock.take("b")
        assert lock.take("a")
    now[0] = 3 * preparation_lock.PATIENCE - 2.1
    assert not lock.take("b")
    now[0] = 3 * preparation_lock.PATIENCE - 2
    assert lock.take("b")
    assert not lock.take("a")
    lock.leave("a")
    assert not lock.take("c")


def test_the_lock_is_held_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: calls happen at once."""
    lock = PreparationLock()
    remote = {name: SimpleNamespace(remote=getattr(lock, name)) for name in ("take", "leave")}
    monkeypatch.setattr(preparation_lock, "ray", SimpleNamespace(get=lambda value: value))

    def block() -> None:
        with preparation_lock.hold_lock(SimpleNamespace(**remote)):
            assert not lock.take("other")
            raise DataError("inside")

    with pytest.raises(DataError, match="inside"):
        block()
    assert lock.take("other"), "it is left after an error, too"

"""Full precision: a setting of the process, which several threads ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from unianom.precision import full_precision

CPU = torch.device("cpu")
SETTINGS = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]


def allowed() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


@pytest.fixture
def bf16() -> Iterator[None]:
    before = allowed()
    for setting in SETTINGS:
        setting.fp32_precision = "bf16"
    yield
    for setting, value in zip(SETTINGS, before, strict=True):
        setting.fp32_precision = value


def test_what_was_allowed_is_allowed_again(bf16: None) -> None:
    def fails() -> None:
        with full_precision(CPU), full_precision(CPU):
            assert allowed() == ["ieee", "ieee"]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert allowed() == ["bf16", "bf16"]


def test_it_holds_until_the_last_thread_has_left(bf16: None) -> None:
    """The first to enter leaves first."""
    inside, leave = threading.Event(), threading.Event()
    seen: list[list[str]] = []

    def second() -> None:
        with full_precision(CPU):
            inside.set()
            assert leave.wait(60)
            seen.append(allowed())

    thread = threading.Thread(target=second)
    with full_precision(CPU):
        thread.start()
        assert inside.wait(60)
    leave.set()
    thread.join(60)
    assert seen == [["ieee", "ieee"]]
    assert allowed() == ["bf16", "bf16"]

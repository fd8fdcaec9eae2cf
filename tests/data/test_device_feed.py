"""Batches for a device: the same values as on CPUs, and copies in the order that keeps a device busy."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.fake_device import DEVICE, HostWaits, fake_device, without_waits
from unianom.data import device_feed
from unianom.data.device_feed import DeviceFeed
from unianom.data.image import InputPolicy
from unianom.data.tensors import normalise
from unianom.errors import OptionError

CPU = torch.device("cpu")
POLICY = InputPolicy(resize="stretch", size=5, crop=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def pixels(count: int) -> np.ndarray:
    """Every value of uint8 in every channel, read-only as in Ray's object store."""
    images = np.random.default_rng(count).integers(0, 256, (count, 5, 5, 3), np.uint8)
    images.reshape(-1)[: 3 * 256] = np.repeat(np.arange(256, dtype=np.uint8), 3)[: images.size]
    images.flags.writeable = False
    return images


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4, 11, 12])
def test_batches_equal_those_normalised_on_the_host(count: int, channels_last: bool) -> None:
    images = pixels(count)
    found = list(DeviceFeed(CPU, POLICY, 4, channels_last).batches(images))
    assert [len(batch) for batch in found] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    for start, batch in zip(range(0, count, 4), found, strict=True):
        expected = normalise(list(images[start : start + 4]), POLICY)
        assert batch.dtype == torch.float32
        assert torch.equal(batch.view(torch.int32), expected.view(torch.int32))  # to the bit
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.is_contiguous(memory_format=layout)


def test_batches_may_be_of_any_sizes() -> None:
    images = pixels(7)
    found = list(DeviceFeed(CPU, POLICY, 4).batches(images, [2, 0, 4, 1, 0]))
    assert [len(batch) for batch in found] == [2, 4, 1]
    assert torch.equal(torch.cat(found), normalise(list(images), POLICY))
    assert list(DeviceFeed(CPU, POLICY, 4).batches(images[:0], [0, 0])) == []


def test_a_policy_without_mean_is_refused() -> None:
    with pytest.raises(OptionError, match=r"input\.mean and input\.std are not set"):
        DeviceFeed(CPU, InputPolicy(resize="stretch", size=5, crop=None), 4)


def test_results_are_those_computed() -> None:
    feed = DeviceFeed(CPU, POLICY, 4)
    images = pixels(7)
    fetched = [feed.fetch(batch.sum((1, 2, 3))) for batch in feed.batches(images)]
    expected = normalise(list(images), POLICY).sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(np.concatenate([part.numpy() for part in fetched]), expected, rtol=1e-4)


class Streams:
    """Stands in for torch.cuda: notes what is put on which stream, and what the host waits for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self._made = iter(("up", "down"))
        self._events = iter(range(1000))
        self.current = self.compute = StandInStream(self, "compute")

    def Stream(self, device: torch.device) -> StandInStream:
        return StandInStream(self, next(self._made))

    def current_stream(self, device: torch.device) -> StandInStream:
        return self.current

    @contextmanager
    def stream(self, stream: StandInStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self, stream: StandInStream) -> StandInEvent:
        return StandInEvent(self, f"{stream.name} {next(self._events)}")


class StandInStream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_event(self) -> StandInEvent:
        event = self.streams.event(self)
        self.streams.log.append(("event", event.name))
        return event

    def wait_event(self, event: StandInEvent) -> None:
        self.streams.log.append((f"{self.name} waits", event.name))

    def wait_stream(self, stream: StandInStream) -> None:
        self.streams.log.append((f"{self.name} waits", stream.name))


class StandInEvent:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def synchronize(self) -> None:
        self.streams.log.append(("host waits", self.name))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """A CUDA whose streams take note; no memory of the host is pinned."""
    streams = Streams()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    made = {"pinned_copy": torch.uint8, "pinned_like": torch.float32}
    for name, dtype in made.items():
        monkeypatch.setattr(device_feed, name, lambda values, dtype=dtype: torch.empty(values.shape, dtype=dtype))
    return streams


def computed(feed: DeviceFeed, streams: Streams, images: np.ndarray) -> list[device_feed.Fetched]:
    fetched = []
    for batch in feed.batches(images):
        streams.log.append(("computes", str(len(batch))))
        fetched.append(feed.fetch(batch.mean((1, 2, 3))))
    return fetched


def test_the_host_waits_for_nothing_but_old_batches(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_device(monkeypatch):
        feed = DeviceFeed(DEVICE, POLICY, 4)
        without_waits(lambda: computed(feed, streams, np.zeros((11, 5, 5, 3), np.uint8)))
    assert streams.log == [
        ("event", "up 0"),  # two batches are on their way before the first is asked for
        ("event", "up 1"),
        ("compute waits", "up 0"),
        ("computes", "4"),
        ("down waits", "compute"),
        ("event", "down 2"),
        ("event", "compute 3"),  # the first batch is computed
        ("event", "up 4"),  # the third goes up while the first is computed
        ("compute waits", "up 1"),
        ("computes", "4"),
        ("down waits", "compute"),
        ("event", "down 5"),
        ("event", "compute 6"),
        ("host waits", "compute 3"),  # for the first, while the device has the second
        ("compute waits", "up 4"),
        ("computes", "3"),
        ("down waits", "compute"),
        ("event", "down 7"),
        ("event", "compute 8"),
        ("host waits", "compute 6"),  # the last is not waited for
    ]


def test_results_wait_for_their_own_copy(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_device(monkeypatch):
        fetched = DeviceFeed(DEVICE, POLICY, 4).fetch(torch.empty(3, device=DEVICE))
        monkeypatch.setattr(torch.Tensor, "numpy", lambda self: np.zeros(self.shape))
        streams.log.clear()
        assert fetched.numpy().shape == (3,)
    assert streams.log == [("host waits", "down 0")]


def test_a_copy_that_waits_is_found(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the test above: a result read at once makes the host wait."""
    with fake_device(monkeypatch):
        feed = DeviceFeed(DEVICE, POLICY, 4)
        with pytest.raises(HostWaits):
            without_waits(lambda: [b.mean().cpu() for b in feed.batches(np.zeros((4, 5, 5, 3), np.uint8))])

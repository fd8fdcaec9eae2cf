"""Batches of prepared images on their way to a device, and results on their way back, while it computes.

uint8 on the host ─▶ pinned memory ─▶ uint8 on the device ─▶ normalised batch ─▶ network ─▶ pinned memory ─▶ NumPy
                     copied ahead     a stream of its own     the stream that computes      a stream of its own
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unianom.data.image import InputPolicy
from unianom.data.tensors import Normaliser


class DeviceFeed:
    """Takes images to a device as uint8, normalises them there, and fetches what is computed of them.

    On CUDA neither of the copies holds up what computes: each is on a stream of its own, from or to pinned memory. On
    other devices the same is done in order. One feed serves several threads.

    Args:
        device: where the network is.
        policy: the model's input policy, with mean and std.
        batch_size: images of a batch, where nothing else is asked for; the last one of an array may have fewer.
        channels_last: memory format of batches; their shape is the same.

    Raises:
        OptionError: mean or std of the policy is not set.
    """

    def __init__(self, device: torch.device, policy: InputPolicy, batch_size: int, channels_last: bool = False) -> None:
        self._normalise, self._batch_size = Normaliser(policy, device, channels_last), batch_size
        self._copies = _CudaCopies(device) if device.type == "cuda" else _PlainCopies(device)

    def batches(self, images: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Begin to copy images, and return their batches.

        The next batches are copied while one is computed on. Asking for a batch, or finding that there are no more,
        waits until all that were handed out are computed but the last: the host is ahead by as much as keeps the device
        busy, and memory is bounded.

        Args:
            images: N×S×S×3 uint8, N may be 0.
            sizes: images of each batch, together N; those of no image are left out.

        Returns:
            Batches B×3×S×S float32 on the device, equal to `tensors.normalise`.
        """
        if sizes is None:
            starts = [*range(0, len(images), self._batch_size), len(images)]
        else:
            starts = list(accumulate(filter(None, sizes), initial=0))
        return _Batches(self._copies, self._normalise, [images[first:end] for first, end in pairwise(starts)])

    def fetch(self, values: Tensor) -> Fetched:
        """Begin to copy what was computed to the host, and return what gives it as NumPy.

        Args:
            values: of a type that NumPy has, on the device.
        """
        return self._copies.fetch(values)


class Fetched:
    """Values on their way to the host."""

    def __init__(self, values: Tensor, copied: Any = None) -> None:
        self._values, self._copied = values, copied

    def numpy(self) -> np.ndarray:
        """Return them; waits until they are computed and copied."""
        if self._copied is not None:
            self._copied.synchronize()
        array: np.ndarray = self._values.numpy()
        return array


AHEAD = 2
"""Batches that are on their way or have arrived."""


class _Batches(Iterator[Tensor]):
    """Batches of one array of images; the first are on their way to the device from the start."""

    def __init__(self, copies: _PlainCopies, normalise: Normaliser, batches: Sequence[np.ndarray]) -> None:
        self._copies, self._normalise = copies, normalise
        self._left = iter(batches)
        self._coming: deque[Any] = deque()
        self._computed: deque[Any] = deque()  # marks in the stream that computes, after each batch that was handed out
        self._handed_out = False
        for _ in range(AHEAD):
            self._upload()

    def __next__(self) -> Tensor:
        if self._handed_out:
            self._computed.append(self._copies.mark())
            self._upload()  # while the device is busy with what was handed out
        if len(self._computed) > 1:
            self._copies.wait_for(self._computed.popleft())
        if not self._coming:
            raise StopIteration
        self._handed_out = True
        return self._normalise(self._copies.arrived(self._coming.popleft()))

    def _upload(self) -> None:
        """Begin to copy the next batch, if there is one."""
        images = next(self._left, None)
        if images is not None:
            self._coming.append(self._copies.upload(images))


class _PlainCopies:
    """Copies in order, as on CPUs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def upload(self, images: np.ndarray) -> Any:
        return torch.tensor(images, device=self._device)

    def arrived(self, coming: Any) -> Tensor:
        pixels: Tensor = coming
        return pixels

    def fetch(self, values: Tensor) -> Fetched:
        return Fetched(values.cpu())

    def mark(self) -> Any:
        return None

    def wait_for(self, mark: Any) -> None:
        pass


class _CudaCopies(_PlainCopies):
    """Copies on streams of their own. What is on its way is an uploaded tensor and the event of its arrival."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, images: np.ndarray) -> Any:
        pinned = pinned_copy(images)
        with torch.cuda.stream(self._up):
            # the pinned memory may be given back at once: PyTorch uses it again when the copy is done
            return pinned.to(self._device, non_blocking=True), self._up.record_event()

    def arrived(self, coming: Any) -> Tensor:
        pixels: Tensor
        pixels, copied = coming
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        pixels.record_stream(computing)
        return pixels

    def fetch(self, values: Tensor) -> Fetched:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            held = pinned_like(values)
            held.copy_(values, non_blocking=True)
            values.record_stream(self._down)
            return Fetched(held, self._down.record_event())

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def wait_for(self, mark: Any) -> None:
        mark.synchronize()


def pinned_copy(images: np.ndarray) -> Tensor:
    """Return images in pinned memory."""
    pinned = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
    pinned.numpy()[...] = images
    return pinned


def pinned_like(values: Tensor) -> Tensor:
    """Return pinned memory of the host for values of a device."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)

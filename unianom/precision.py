"""Products and convolutions in full float32."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions in float32, also where the process allows TF32 or bfloat16 for them, as
    PyTorch does for convolutions on GPUs, or autocasts.

    Several threads may be inside. What is allowed is a setting of the whole process, so a network that another thread
    runs meanwhile computes in float32, too: whoever runs networks on a GPU from several threads lets them take turns.
    """
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        _forbid(device.type)
        stack.callback(_allow, device.type)
        yield


_lock = threading.Lock()
_inside: Counter[str] = Counter()
_before: dict[str, list[str]] = {}


def _forbid(device: str) -> None:
    """Set full precision for a type of device, if no other thread has."""
    with _lock:
        if not _inside[device]:
            _before[device] = [setting.fp32_precision for setting in _settings(device)]
            for setting in _settings(device):
                setting.fp32_precision = "ieee"
        _inside[device] += 1


def _allow(device: str) -> None:
    """Set what was before, when no thread needs full precision any more."""
    with _lock:
        _inside[device] -= 1
        if not _inside[device]:
            for setting, before in zip(_settings(device), _before.pop(device), strict=True):
                setting.fp32_precision = before


def _settings(device: str) -> list[Any]:
    backends: Any = torch.backends
    if device == "cuda":
        return [backends.cuda.matmul, backends.cudnn.conv]
    return [backends.mkldnn.matmul, backends.mkldnn.conv] if device == "cpu" else []

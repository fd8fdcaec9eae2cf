"""Products and convolutions in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions in float32, also where the process allows TF32 or bfloat16 for them, as
    PyTorch does for convolutions on GPUs, or autocasts."""
    backends: Any = torch.backends
    settings = {
        "cuda": [backends.cuda.matmul, backends.cudnn.conv],
        "cpu": [backends.mkldnn.matmul, backends.mkldnn.conv],
    }.get(device.type, [])
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for setting in settings:
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"
        yield

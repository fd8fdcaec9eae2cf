"""A CUDA device that is not there: fake tensors know shape, type and device and hold no values.

What runs on them is shown to keep to the device, for PyTorch refuses to mix devices, and never to make the host wait,
for a fake value cannot be read.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from unianom.methods.layers import postprocess

ROOT = Path(__file__).parents[1]
PACKAGES = ("unianom", "pipelines")
DEVICE = torch.device("cuda:0")


class HostWaits(AssertionError):
    """The host reads a value from the device, or copies to or from it and waits until that is done."""


class Copies(TorchDispatchMode):
    """Refuses copies between host and device that the host waits for, hidden ones of indices too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":
            return 0.0 if args[0].is_floating_point() else 0  # of the host's own tensors, so it waits for nothing
        pair: tuple[torch.device, torch.device] | None = None
        if name == "_to_copy":
            pair = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        elif name == "copy_":
            pair = args[1].device, args[0].device
        elif name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if isinstance(index, Tensor) and index.device.type != args[0].device.type:
                    pair = index.device, args[0].device
        waits = name != "copy_" or len(args) < 3 or not args[2]
        if pair is not None and pair[0].type != pair[1].type and waits and not kwargs.get("non_blocking"):
            raise HostWaits(f"{name} from {pair[0]} to {pair[1]}")
        return func(*args, **kwargs)


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Enter a mode in which all tensors are fake; gives a function that moves tensors and modules to the device."""

    def on_device(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

    def move(value: Any) -> Any:
        if not isinstance(value, nn.Module):
            return on_device(value)
        for part in value.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(on_device(tensor), tensor.requires_grad)
            for name, tensor in part._buffers.items():
                part._buffers[name] = None if tensor is None else on_device(tensor)
        return value

    def matrix(short: int, long: int, sigma: float, device: torch.device) -> Tensor:
        return torch.empty(long, short, device=device)

    # computed by NumPy at the first image, moved to the device and kept
    monkeypatch.setattr(postprocess, "_upsample_and_blur_matrix", matrix)
    with FakeTensorMode():
        yield move


def without_waits(function: Callable[[], Any]) -> Any:
    """Return what the function does on fake tensors.

    Raises:
        HostWaits: the host waits for the device; names the line of this project where it does.
    """
    try:
        with Copies():
            return function()
    except (HostWaits, DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if any(Path(frame.filename).is_relative_to(ROOT / package) for package in PACKAGES)
        ]
        where = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        name = Path(where.filename).relative_to(ROOT) if frames else where.filename
        raise HostWaits(f"the host waits at {name}:{where.lineno}, {where.line}: {error}") from error

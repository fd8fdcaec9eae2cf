"""What the host may read without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def reads_at_once(tensor: Tensor) -> bool:
    """Return whether the host can read the tensor's values without waiting for a device to compute them: on the CPU,
    but not while PyTorch exports a network, for a graph has no values yet.

    Where it cannot, what is wrong with a value is not raised but shows in the score, as NaN.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_exporting()

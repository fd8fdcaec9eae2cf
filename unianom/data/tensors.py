"""Prepared images as a batch of a network; apart from `image`, since jobs without a network do without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from unianom.data.image import InputPolicy
from unianom.errors import OptionError


def normalise(images: Sequence[np.ndarray], policy: InputPolicy) -> torch.Tensor:
    """Stack prepared images into the network's input.

    Args:
        images: B arrays of S×S×3 uint8.
        policy: the model's input policy, with mean and std.

    Returns:
        B×3×S×S float32.
    """
    if policy.mean is None or policy.std is None:
        raise OptionError("input.mean and input.std are not set; a method fills them in from its backbone")
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float()  # B 3 S S
    mean = torch.tensor(policy.mean).view(1, 3, 1, 1)
    std = torch.tensor(policy.std).view(1, 3, 1, 1)
    return batch.div_(255).sub_(mean).div_(std)

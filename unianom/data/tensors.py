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
    height, width, channels = images[0].shape
    batch = np.empty((len(images), channels, height, width), np.float32)
    for pixels, place in zip(images, batch, strict=True):
        normalise_into(place, pixels, policy)
    return torch.from_numpy(batch)


def normalise_into(place: np.ndarray, pixels: np.ndarray, policy: InputPolicy) -> None:
    """Write a prepared image into its place in a batch.

    Args:
        place: 3×S×S float32.
        pixels: S×S×3 uint8.
        policy: the model's input policy, with mean and std.
    """
    if policy.mean is None or policy.std is None:
        raise OptionError("input.mean and input.std are not set; a method fills them in from its backbone")
    place[...] = pixels.transpose(2, 0, 1)
    place /= np.float32(255)
    place -= np.array(policy.mean, np.float32)[:, None, None]
    place /= np.array(policy.std, np.float32)[:, None, None]

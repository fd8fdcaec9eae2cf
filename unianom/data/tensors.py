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
    mean, std = _mean_and_std(policy)
    place[...] = pixels.transpose(2, 0, 1)
    place /= np.float32(255)
    place -= mean
    place /= std


class Normaliser:
    """Makes the network's input of prepared images on the network's device, as `normalise` does on the host.

    Args:
        policy: the model's input policy, with mean and std.
        device: where the images are.
        channels_last: memory format of what is made; its shape is the same.
    """

    def __init__(self, policy: InputPolicy, device: torch.device, channels_last: bool = False) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean, self._std = (torch.from_numpy(values).to(device) for values in _mean_and_std(policy))
        # a divisor that is a number is made a factor on GPUs, which rounds otherwise
        self._full = torch.tensor(255.0, device=device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return B×S×S×3 uint8 as B×3×S×S float32."""
        batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format)
        return batch.div_(self._full).sub_(self._mean).div_(self._std)


def _mean_and_std(policy: InputPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std of a policy; 3×1×1 float32 each."""
    if policy.mean is None or policy.std is None:
        raise OptionError("input.mean and input.std are not set; a method fills them in from its backbone")
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (policy.mean, policy.std))
    return mean, std

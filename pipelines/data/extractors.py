"""What is computed of images to be cached: an encoder's features, patches, maps, or the prepared pixels themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pipelines.data.reader import DecodedSample
from unianom.data.image import InputPolicy
from unianom.data.tensors import normalise
from unianom.errors import DataError
from unianom.methods import Method

Arrays = dict[str, np.ndarray]
"""Arrays of a batch by name; the rows of each are added to those of the batches before."""


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images that are computed on at once.

    Attributes:
        pixels: B×S×S×3 uint8.
        part: the part they are of, for errors.
        masks: B×S×S bool; None where masks are not read.
        columns: what else was read, a value for each image.
    """

    pixels: np.ndarray
    part: str
    masks: np.ndarray | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @staticmethod
    def of(samples: Sequence[DecodedSample], part: str) -> ImageBatch:
        """Return the batch of some samples, at least one, of a part."""
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return ImageBatch(
            np.stack([sample.pixels for sample in samples]),
            part,
            np.stack(masks) if masks else None,
            {name: [sample.row[name] for sample in samples] for name in samples[0].row},
        )

    def __len__(self) -> int:
        return len(self.pixels)


_HOST = torch.device("cpu")


@dataclass(frozen=True)
class BatchFunction:
    """What computes the arrays of a batch, in two steps, so that a device has the next batch during the second.

    Attributes:
        policy: how images become its input.
        arrays: makes the arrays of a batch, on the host, of the batch and of what the network made of it.
        network: returns, by name, what a network makes of B×3×S×S images, all on its device, in types that NumPy has;
            it need not wait for the device. None where no network runs.
        device: of the network.
    """

    policy: InputPolicy
    arrays: Callable[[ImageBatch, Arrays], Arrays]
    network: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None
    device: torch.device = _HOST

    def compute(self, batch: ImageBatch) -> Arrays:
        """Return the arrays of a batch; both steps, one after the other."""
        found: Arrays = {}
        if self.network is not None:
            images = normalise(list(batch.pixels), self.policy).to(self.device)
            found = {name: values.cpu().numpy() for name, values in self.network(images).items()}
        return self.arrays(batch, found)


class Extractor(Protocol):
    """What is computed of images: plain data that is pickled on the way to the workers, and gives the function there.
    Extractors that are equal compute the same."""

    def policy(self) -> InputPolicy:
        """Return how images become input; loads no model."""

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        """Return the function of a batch.

        Args:
            load: gives the method of a model folder, on the device of the worker.

        Raises:
            ModelError: the model cannot be loaded, or is of another kind.
        """


def finite(array: np.ndarray, error: str) -> np.ndarray:
    """Return an array whose values are all finite.

    Raises:
        DataError: one is not; with the text given.
    """
    if not np.isfinite(array).all():
        raise DataError(error)
    return array

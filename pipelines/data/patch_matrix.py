"""Patches of memory methods: what the cache keeps of them, and those of many images as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch, finite
from pipelines.data.feature_cache import JoinedRows
from pipelines.runtime.models import input_policy, memory_method
from unianom.data.image import InputPolicy
from unianom.errors import DataError
from unianom.memory.coreset import random_projection
from unianom.methods import Method

PATCHES, KEEP = "patches", "keep"
"""Names of the arrays that are cached: the patches that masking keeps, M×D float32, those of an image after another,
and which of its N patches these are of each image, n×N bool."""


@dataclass(frozen=True)
class KeptPatches:
    """The patches of images that masking keeps. An `Extractor`.

    Attributes:
        model: folder of a memory method, without a bank.
        for_bank: whether they are masked as images of the bank are.
    """

    model: str
    for_bank: bool

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = memory_method(load(self.model))
        embed = method.embed_for_bank if self.for_bank else method.embed

        def network(images: Tensor) -> dict[str, Tensor]:
            embedding = embed(images)
            return {PATCHES: embedding.patches.float(), KEEP: embedding.keep}

        def arrays(batch: ImageBatch, found: Arrays) -> Arrays:
            error = f"patches of {batch.part} hold NaN or infinite values; use --method.backbone.precision fp32"
            # chosen here, since a device would have to say how many there are before it goes on
            return {PATCHES: finite(found[PATCHES][found[KEEP]], error), KEEP: found[KEEP]}

        return BatchFunction(method.input, arrays, network, method.device)


class PatchMatrix(JoinedRows):
    """Patches in several arrays, in order, as one matrix of M×D float32; memory-mapped ones stay on disk.

    Args:
        arrays: each m×D float32.

    Attributes:
        dimension: D.

    Raises:
        DataError: not a single patch was kept.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        super().__init__(arrays)
        if not self.rows:
            raise DataError(
                "masking left no patch for the bank; lower --method.mask_threshold or take --method.mask off"
            )
        self.dimension = int(self._arrays[0].shape[1])

    def projected(self, dimension: int, seed: int) -> np.ndarray:
        """Return every row in fewer dimensions, M×dimension; 0 leaves them as they are."""
        if dimension == 0:
            return np.concatenate(self._arrays)
        matrix = random_projection(self.dimension, dimension, seed=seed)
        return np.concatenate([array @ matrix for array in self._arrays])

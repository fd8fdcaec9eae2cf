"""Where in their images the vectors of a memory bank lie."""

from __future__ import annotations

import numpy as np

from unianom.errors import DataError, ModelError
from unianom.memory.faiss_indexes import Float32, Int64
from unianom.memory.index import MemoryBank

TOLERANCE = 1e-2
"""Distance of a vector to the patch that it is, at most, as a share of the vector's length: rounding differs with the
batch an image was embedded in, with threads and engines; other patches are farther away."""


def locate_vectors(bank: MemoryBank, sample_id: str, patches: Float32) -> tuple[Int64, Int64]:
    """Return the vectors of a bank that came from an image, and which of the image's patches each of them is.

    A bank keeps of each vector its image, not its place there; that is found by comparing.

    Args:
        bank: with origins.
        sample_id: of the image.
        patches: shape (N, D), all patches of the image, as `MemoryMethod.embed_for_bank` gives them.

    Returns:
        Rows of the bank, ascending, and for each the number of the patch, row-major over the patch grid.

    Raises:
        ModelError: the bank does not know the origins of its vectors.
        OptionError: the bank was not chosen from this image.
        DataError: a vector is none of these patches.
    """
    if bank.origins is None:
        raise ModelError("this memory bank does not tell which image each vector came from; fit the model again")
    rows = bank.origins.rows_of(sample_id)
    vectors = bank.rows_at(rows)
    if patches.ndim != 2 or patches.shape[1] != vectors.shape[1]:
        raise DataError(f"patches have shape {patches.shape}; the bank has vectors of {vectors.shape[1]} values")
    distances, numbers = MemoryBank.build(patches).search(vectors, 1)
    far = np.sqrt(distances[:, 0]) > TOLERANCE * np.linalg.norm(vectors, axis=1)
    if far.any():
        raise DataError(
            f"{int(far.sum())} of {len(rows)} vectors that came from {sample_id} are none of these patches; embed that "
            f"image with the method of this bank"
        )
    return rows, numbers[:, 0]

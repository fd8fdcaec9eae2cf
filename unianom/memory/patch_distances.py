"""The distance of a patch to a memory bank: the mean of those to its nearest vectors."""

from __future__ import annotations

from torch import Tensor

from unianom.errors import OptionError


def mean_distances(distances: Tensor, neighbours: int) -> Tensor:
    """Average the first of K distances; B×N×K to B×N.

    Raises:
        OptionError: there are fewer than `neighbours`.
    """
    found = distances.shape[2]
    if neighbours > found:
        raise OptionError(f"neighbours={neighbours}, but only {found} were searched; search for that many")
    return distances[:, :, :neighbours].contiguous().mean(2)

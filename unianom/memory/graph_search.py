"""Nearest-neighbour search as part of a graph of operators, as a network is that is exported.

As on a device (`device_search.py`), a matrix product proposes neighbours, and their distances are then taken from their
definition, Σ(x−y)². Product and distances are in float32, and only queries and squared lengths are taken from the mean
of the rows, so that the graph holds the rows once.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from unianom.errors import OptionError
from unianom.memory.device_search import SPARE

ROWS_AT_ONCE = 16384
"""Rows of the bank in one matrix product, so that the distances of a query to all of them are never held at a time."""


class GraphBank(nn.Module):
    """The rows of a memory bank in a graph.

    Args:
        vectors: N×D float32.
    """

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        super().__init__()
        self.rows, self.dimension = vectors.shape
        self.device = torch.device("cpu")
        self.vectors: Tensor
        self.centre: Tensor
        self.squares: Tensor
        self.register_buffer("vectors", torch.from_numpy(vectors), persistent=False)  # N D
        self.register_buffer("centre", self.vectors.mean(0), persistent=False)  # D
        self.register_buffer("squares", (self.vectors - self.centre).square().sum(1), persistent=False)  # N

    def rows_at(self, rows: Tensor) -> Tensor:
        """Return the vectors of given row numbers: shape rows.shape + (D,)."""
        return self.vectors[rows]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows, by (squared distance, row), as `DeviceBank.search` does.

        Args:
            queries: Q×D float32.
            k: how many.

        Returns:
            Squared distances, Q×k float32, ascending, and row numbers, Q×k.

        Raises:
            OptionError: k is not in 1..rows.
        """
        if not 1 <= k <= self.rows:
            raise OptionError(f"k must be between 1 and the {self.rows} rows of the bank, got {k}")
        found: tuple[Tensor, Tensor] = self(queries, k)  # called, so that the graph knows these operators as its own
        return found

    def forward(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do as `search` says."""
        proposed = self._propose(queries, min(k + SPARE["fp32"], self.rows))  # Q w
        proposed = proposed.sort(1).values  # of equal distances ONNX takes the first, which is then the first row
        distances = (self.vectors[proposed] - queries[:, None]).square().sum(2)  # Q w
        nearest = distances.topk(k, dim=1, largest=False)
        return nearest.values, proposed.gather(1, nearest.indices)

    def _propose(self, queries: Tensor, count: int) -> Tensor:
        """Return the rows of the `count` smallest distances as the matrix product has them, Q×count, in any order."""
        seen = -2 * (queries - self.centre)
        values, rows = [], []
        for start in range(0, self.rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            # (x−c)·(y−c) is (x−c)·y but for what is the same for all rows of a query, as |x−c|² is
            products = linear(seen, self.vectors[part], self.squares[part])
            found = products.topk(min(count, products.shape[1]), dim=1, largest=False)
            values.append(found.values)
            rows.append(found.indices + start)
        if len(values) == 1:
            return rows[0]
        nearest = torch.cat(values, dim=1).topk(count, dim=1, largest=False).indices
        return torch.cat(rows, dim=1).gather(1, nearest)

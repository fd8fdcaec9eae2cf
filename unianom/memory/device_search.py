"""Nearest-neighbour search where the features are: on a GPU, or on any other device that PyTorch knows.

A product of blocks of queries and blocks of rows proposes neighbours; their distances are then taken from their
definition, Σ(x−y)². Nothing is read back from the device, so the host never waits.

**What it promises.** A returned distance is that of the returned row, right to 3 units of the last place. Where more
than `SPARE` other rows are as near as the products can tell, the row may be another one than the nearest, and its
squared distance larger by at most

    2e          e = 2⁻²⁴ · (D + 20) · (|x| + |y|)²      with products in float32
    4rd + 4r²   r = 2⁻⁸ · (|x| + |y|) + √e              with products in bfloat16, d the distance of the nearest

with |x| the length of the query and |y| that of the longest row, both taken from the mean of all rows, so that it does
not matter how far a bank lies from the origin. unianom/methods/README.md says what came of it on real images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unianom.errors import OptionError
from unianom.precision import full_precision

Products = Literal["fp32", "bf16"]
"""Precision of the matrix products that propose neighbours."""

SPARE: dict[Products, int] = {"fp32": 8, "bf16": 12}
"""Neighbours proposed beyond the k wanted, so that near ties can be told apart."""

BLOCK_BYTES = 256 << 20
"""Of the proposed distances of a block of queries to a block of rows, and of the differences of a block of winners."""

QUERIES_AT_ONCE = 4096
"""Most queries in a block."""

GROUP = 32
"""Neighbouring rows of which the smallest distance is found first: reading all distances once is faster than sorting
them, and the k smallest of all lie in the k groups with the smallest minima."""


class DeviceBank:
    """The rows of a memory bank on a device, searched there.

    Args:
        vectors: N×D float32.
        device: where the rows are held: 8 bytes a value, 6 with products in bfloat16.
        products: precision of the matrix products that propose neighbours.

    Raises:
        OptionError: the rows do not fit the device's memory.
    """

    def __init__(self, vectors: NDArray[np.float32], device: torch.device, products: Products = "fp32") -> None:
        self.rows, self.dimension = vectors.shape
        self.device, self.products = device, products
        try:
            self._vectors = torch.from_numpy(vectors).to(device)  # N D
            self._centre = self._vectors.mean(0)  # D
            self._seen, self._squares = self._proposing(self._vectors)
        except torch.OutOfMemoryError as error:
            size = vectors.size * (8 if products == "fp32" else 6) / 1e9
            raise OptionError(
                f"the memory bank of {self.rows} vectors of {self.dimension} values does not fit {device}, where it "
                f"takes {size:.1f} GB; take search=exact, or fit the model with a lower bank.coreset_ratio"
            ) from error

    def _proposing(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows as they are compared, padded to whole groups, and their squared lengths: N'×D and N'."""
        seen = self._as_seen(vectors)
        padding = -len(seen) % GROUP
        squares = seen.float().square().sum(1)
        squares = torch.nn.functional.pad(squares, (0, padding), value=torch.inf)  # a padded row is nobody's neighbour
        return torch.nn.functional.pad(seen, (0, 0, 0, padding)), squares

    def _as_seen(self, vectors: Tensor) -> Tensor:
        """Return vectors as they are compared: from the mean of the rows, in the precision of the products."""
        return (vectors - self._centre).to(torch.bfloat16 if self.products == "bf16" else torch.float32)

    def rows_at(self, rows: Tensor) -> Tensor:
        """Return the vectors of given row numbers: shape rows.shape + (D,)."""
        return self._vectors[rows]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows, by (squared distance, row); how exactly is said above.

        Args:
            queries: Q×D float32, on this device. One that holds NaN or infinity gets distances that are not finite.
            k: how many.

        Returns:
            Squared distances, Q×k float32, ascending, and row numbers, Q×k.

        Raises:
            OptionError: k is not in 1..rows.
        """
        if not 1 <= k <= self.rows:
            raise OptionError(f"k must be between 1 and the {self.rows} rows of the bank, got {k}")
        with full_precision(self.device):
            found = [self._search_block(block, k) for block in queries.split(QUERIES_AT_ONCE)]
        distances, rows = zip(*found, strict=True)
        return torch.cat(distances), torch.cat(rows)

    def _search_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        proposed = self._propose(queries, min(k + SPARE[self.products], self.rows))  # q w
        proposed = proposed.clamp(max=self.rows - 1)  # of a query that holds NaN any row may come out, padding too
        proposed = proposed.sort(1).values  # equal distances then stay in the order of rows
        at_once = max(1, BLOCK_BYTES // (12 * proposed.shape[1] * self.dimension))
        pairs = zip(queries.split(at_once), proposed.split(at_once), strict=True)
        distances = torch.cat([self._distances(some, rows) for some, rows in pairs])  # q w
        distances, order = distances.sort(dim=1, stable=True)
        return distances[:, :k], proposed.gather(1, order[:, :k])

    def _propose(self, queries: Tensor, count: int) -> Tensor:
        """Return the rows of the `count` smallest distances as the matrix product has them, q×count."""
        seen = -2 * self._as_seen(queries)
        at_once = max(1, BLOCK_BYTES // (4 * len(queries) * GROUP)) * GROUP
        values, rows = seen.new_empty(len(queries), 0, dtype=torch.float32), None
        for start in range(0, len(self._seen), at_once):
            part = slice(start, start + at_once)
            # |x|² is the same for all rows of a query and left out
            found, place = _smallest(_products(seen, self._seen[part], self._squares[part]), count)
            values = torch.cat([values, found], dim=1)
            rows = place + start if rows is None else torch.cat([rows, place + start], dim=1)
            values, kept = values.topk(min(count, values.shape[1]), dim=1, largest=False, sorted=False)
            rows = rows.gather(1, kept)
        assert rows is not None
        return rows

    def _distances(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Return Σ(x−y)² of q×D queries and rows q×w; q×w."""
        squares = self._vectors[rows].sub_(queries[:, None]).square_()  # q w D
        if self.device.type == "mps":  # which has no float64
            return squares.sum(2)
        return squares.sum(2, dtype=torch.float64).float()


def _products(queries: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    """Return squares + queries · rowsᵀ in float32: q×D, n×D and n to q×n."""
    if queries.dtype == torch.float32:
        return torch.addmm(squares, queries, rows.T)
    if queries.device.type == "cuda":
        return torch.mm(queries, rows.T, out_dtype=torch.float32).add_(squares)
    return torch.addmm(squares, queries.float(), rows.float().T)


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` smallest of each row of q×n values, n a multiple of `GROUP`, in any order, and where they are;
    all of them if there are fewer."""
    count = min(count, values.shape[1])
    if count * GROUP >= values.shape[1]:
        found = values.topk(count, dim=1, largest=False, sorted=False)
        return found.values, found.indices
    groups = values.unflatten(1, (-1, GROUP))  # q g GROUP
    chosen = groups.amin(2).topk(count, dim=1, largest=False, sorted=False).indices  # q count
    members = groups.gather(1, chosen[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    smallest, place = members.topk(count, dim=1, largest=False, sorted=False)
    return smallest, chosen.gather(1, place // GROUP) * GROUP + place % GROUP

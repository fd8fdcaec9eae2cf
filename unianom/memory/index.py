"""Memory bank: exact nearest-neighbour search over reference vectors, in shards, on FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from unianom.errors import DataError, ModelError, OptionError, UnianomError
from unianom.memory.exact_search import merge_results, nearest_centroids
from unianom.memory.faiss_indexes import (
    Bool,
    Float32,
    Int64,
    checked_vectors,
    flat_index,
    ivf_flat_index,
    load_faiss,
    longest_row,
    trained_quantizer,
)
from unianom.memory.origins import Origins
from unianom.memory.proposals import Proposals
from unianom.memory.shard import Shard, all_vectors, vectors_at
from unianom.memory.storage import Kind, StoredBank, read_bank, write_bank

DEFAULT_NPROBE = 8
"""Inverted lists that are compared with each query, unless told otherwise."""

QUERIES_AT_ONCE = 256
"""Queries whose bounds are computed at a time, so that they stay in cache."""

LEAST_ROWS = 1000
"""Banks of fewer rows have no proposals: they are searched in full about as fast."""


@dataclass(frozen=True)
class Recall:
    """What an approximate index loses against exact search on given queries.

    Attributes:
        at_1: share of queries whose nearest bank row is found.
        at_k: share of the k nearest bank rows that are found.
        max_distance_change: largest relative excess of the nearest distance (squared), 0 if nothing is lost.
    """

    at_1: float
    at_k: float
    max_distance_change: float


class MemoryBank:
    """Reference vectors in shards, searched as one.

    Attributes:
        shards: the parts, in order of rows.
        kind: "flat" compares with every row; "ivf_flat" with the rows of the nearest of `nlist` k-means lists.
            Vectors are never compressed: compressed distances move anomaly scores.
        metadata: what is known of the vectors (coreset ratio, seed, projection, measured recall …); saved with them.
        origins: the images that the vectors came from; None where that is not known, as of banks of before.
        proposals: what bounds distances without a search; None of small banks, of "ivf_flat" and of banks of before.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        kind: Kind,
        metadata: dict[str, Any] | None = None,
        origins: Origins | None = None,
        proposals: Proposals | None = None,
    ) -> None:
        self.shards = list(shards)
        self.kind = kind
        self.metadata = dict(metadata or {})
        self.origins = origins
        self.proposals = proposals

    @classmethod
    def build(
        cls,
        vectors: Float32,
        shards: int = 1,
        kind: Kind = "flat",
        nlist: int | None = None,
        nprobe: int | None = None,
        seed: int = 0,
        metadata: dict[str, Any] | None = None,
        origins: Origins | None = None,
        proposals: bool = False,
    ) -> Self:
        """Build a bank of vectors.

        Args:
            vectors: shape (N, D).
            shards: into how many parts of equal size (±1 row) the rows are cut.
            kind: see the class.
            nlist: number of lists of "ivf_flat"; √N if None.
            nprobe: lists compared with each query; `DEFAULT_NPROBE` (or all, if fewer) if None. On patch features of
                real images 8 of √N lists found 87–94 % of the nearest rows, 16 found 94–98 %, 32 over 99 %.
            seed: of the k-means that makes the lists, also those of proposals.
            metadata, origins: see the class.
            proposals: make them, where the bank is "flat" and large enough for them to save time.

        Raises:
            OptionError: an option is out of range.
            DataError: vectors are not a finite matrix, or the origins are of another number of vectors.
        """
        vectors = checked_vectors(vectors, "vectors")
        rows = len(vectors)
        if origins is not None and len(origins.rows) != rows:
            raise DataError(f"a bank of {rows} rows got the origins of {len(origins.rows)}; give one for each row")
        if not 1 <= shards <= rows:
            raise OptionError(f"a bank of {rows} rows cannot be cut into {shards} shards")
        edges = [rows * part // shards for part in range(shards + 1)]
        parts = [slice(first, last) for first, last in pairwise(edges)]
        if kind == "flat":
            indexes = [flat_index(vectors[part]) for part in parts]
        elif kind == "ivf_flat":
            nlist = max(1, round(rows**0.5)) if nlist is None else nlist
            nprobe = min(DEFAULT_NPROBE, nlist) if nprobe is None else nprobe
            if not 1 <= nprobe <= nlist <= rows:
                raise OptionError(f"need 1 <= nprobe <= nlist <= rows, got nprobe {nprobe}, nlist {nlist}, rows {rows}")
            quantizer = trained_quantizer(vectors, nlist, seed)
            # FAISS's own assignment would depend on the cut into shards, as its distances do.
            lists = nearest_centroids(quantizer, longest_row(quantizer), vectors, 1)[1][:, 0]
            indexes = [ivf_flat_index(vectors[part], lists[part], quantizer, nprobe) for part in parts]
        else:
            raise OptionError(f"the kind of a bank must be 'flat' or 'ivf_flat', got '{kind}'")
        proposed = proposals and kind == "flat" and rows >= LEAST_ROWS
        return cls(
            [Shard(index, first) for index, first in zip(indexes, edges)],
            kind,
            metadata,
            origins,
            Proposals.build(vectors, seed) if proposed else None,
        )

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def dimension(self) -> int:
        return self.shards[0].dimension

    def vectors(self) -> Float32:
        """Return all rows, shape (rows, dimension), exactly as they were put in."""
        return all_vectors(self.shards)

    def rows_at(self, rows: Int64) -> Float32:
        """Return the vectors of given row numbers: shape rows.shape + (dimension,).

        Raises:
            OptionError: a row number is not in the bank.
        """
        count = self.shards[-1].first_row + self.shards[-1].rows
        if rows.size and not (rows.min() >= 0 and rows.max() < count):
            raise OptionError(f"the memory bank has rows 0 to {count - 1}, asked for {rows.min()} to {rows.max()}")
        return vectors_at(self.shards, rows)

    def search(self, queries: Float32, k: int = 1) -> tuple[Float32, Int64]:
        """Find the k nearest rows, by (squared distance, row); exact as `Shard.search` says.

        Args:
            queries: shape (Q, D).
            k: how many.

        Returns:
            Squared distances, shape (Q, k), ascending, and row numbers, shape (Q, k).

        Raises:
            OptionError: k is not in 1..rows, or the probed lists of "ivf_flat" hold fewer than k rows.
            DataError: queries have another dimension or hold NaN or infinity.
        """
        self._check_k(k)
        return merge_results([shard.search(queries, k) for shard in self.shards], k)

    def distance_bounds(self, queries: Float32, k: int, probes: int) -> Float32:
        """Bound the distances to the k nearest rows from above, by those to proposed rows.

        Args:
            queries: shape (Q, D).
            k: how many.
            probes: how many lists of `proposals` to take rows from.

        Returns:
            shape (Q, k), ascending: each no less than the squared distance that `search` returns; infinity where there
            are too few proposals.

        Raises:
            ModelError: the bank has no proposals.
            DataError: see `search`.
        """
        if self.proposals is None:
            raise ModelError("this memory bank has no proposals, so distances cannot be bounded; search it")
        queries = checked_vectors(queries, "queries", self.dimension)
        rows = self.proposals.near(queries, k, probes, self._passed_over())
        bounds = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            difference = vectors_at(self.shards, np.maximum(rows[some], 0))
            difference -= queries[some, None]
            bounds[some] = np.einsum("nkd,nkd->nk", difference, difference)
        # differences, squares and sums of squares in float32, none below 0, are off by less than this share
        bounds *= 1 + (self.dimension + 16) * np.finfo(np.float32).eps
        bounds += self.dimension * np.finfo(np.float32).tiny
        bounds[rows < 0] = np.inf
        return np.sort(bounds, axis=1)

    def _passed_over(self) -> Bool | None:
        """Return which rows are not to be proposed."""
        return None

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.rows:
            raise OptionError(f"k must be between 1 and the {self.rows} rows of the bank, got {k}")

    def without_image(self, image: int, added: Float32 | None = None) -> BankWithoutImage:
        """Return a bank of the vectors of all other images, without copying one.

        Args:
            image: number of the image among those of `origins`.
            added: shape (A, D), vectors that take the place of its own.

        Raises:
            ModelError: the bank does not know the origins of its vectors.
            OptionError: it has no vectors of other images.
        """
        return BankWithoutImage(self, image, added)

    def recall(self, queries: Float32, k: int = 1) -> Recall:
        """Compare this bank's answers with exact search over the same rows."""
        distances, rows = self.search(queries, k)
        exact_distances, exact_rows = MemoryBank.build(self.vectors()).search(queries, k)
        found = (exact_rows[:, :, None] == rows[:, None, :]).any(axis=2)  # Q k
        nearest, exact = distances[:, 0].astype(np.float64), exact_distances[:, 0].astype(np.float64)
        excess = np.divide(nearest - exact, exact, out=np.where(nearest > exact, np.inf, 0.0), where=exact > 0)
        return Recall(float(found[:, 0].mean()), float(found.mean()), float(excess.max()))

    def save(self, uri: str) -> None:
        """Write the bank to a folder: one FAISS file for each shard, and last the manifest that makes it whole."""
        write_bank(uri, StoredBank(self.shards, self.kind, self.metadata, self.origins, self.proposals))

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read a bank written by `save`.

        Raises:
            ModelError: the folder is not a whole bank of this format, or a file is damaged; the message names it.
        """
        return cls(*read_bank(uri))


class BankWithoutImage(MemoryBank):
    """A bank as it would be without the vectors of one image; it shares all others with the whole bank.

    Rows keep the numbers that they have in the whole bank, those added follow, and "ivf_flat" keeps its lists. Answers
    are those of a bank that was built of the other vectors and those added, in these lists.
    """

    def __init__(self, bank: MemoryBank, image: int, added: Float32 | None = None) -> None:
        super().__init__(bank.shards, bank.kind, bank.metadata, bank.origins, bank.proposals)
        if bank.origins is None:
            raise ModelError("this memory bank does not tell which image each vector came from; fit the model again")
        self._excluded = self._of_image = bank.origins.rows == image
        if self._excluded.all():
            raise OptionError("the memory bank has no vectors of other images; give it more images")
        if added is not None and len(added):
            added = checked_vectors(added, "vectors", self.dimension)
            self.shards.append(Shard(self._index_of(added), bank.rows))
            self._excluded = np.concatenate([self._excluded, np.zeros(len(added), bool)])

    def _index_of(self, vectors: Float32) -> Any:
        """Index further vectors as those of the bank are, in the same lists if it has lists."""
        if self.kind == "flat":
            return flat_index(vectors)
        index = self.shards[0].index
        quantizer = load_faiss().downcast_index(index.quantizer)
        lists = nearest_centroids(quantizer, longest_row(quantizer), vectors, 1)[1][:, 0]
        return ivf_flat_index(vectors, lists, quantizer, index.nprobe)

    @property
    def rows(self) -> int:
        return len(self._excluded) - int(self._excluded.sum())

    def vectors(self) -> Float32:
        """Return all rows but those of the image, and those added, shape (rows, dimension)."""
        return super().vectors()[~self._excluded]

    def search(self, queries: Float32, k: int = 1) -> tuple[Float32, Int64]:
        """Find the k nearest rows of other images; see `MemoryBank.search`."""
        self._check_k(k)
        edges = [slice(shard.first_row, shard.first_row + shard.rows) for shard in self.shards]
        parts = [shard.search(queries, k, self._excluded[edge]) for shard, edge in zip(self.shards, edges, strict=True)]
        return merge_results(parts, k)

    def _passed_over(self) -> Bool | None:
        return self._of_image

    def save(self, uri: str) -> None:
        """Refuse to be saved."""
        raise UnianomError("a memory bank without one of its images is only searched; save the whole bank")

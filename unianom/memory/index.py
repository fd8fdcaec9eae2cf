"""Memory bank: exact nearest-neighbour search over reference vectors, in shards, on FAISS.

FAISS compares a batch of queries by |x|² + |y|² − 2x·y in float32. That is fast, but its last bits depend on how
queries and bank are cut into blocks, so neighbours at nearly the same distance could swap, and scores change, with the
number of shards or the batch size. Here FAISS only proposes neighbours; the answer is made of distances taken from
their definition, Σ(x−y)², and is the same, bit for bit, however bank and queries are divided (see `Shard.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from unianom import files
from unianom.errors import DataError, ModelError, OptionError, UnianomError
from unianom.memory.origins import ORIGINS, Origins

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Kind = Literal["flat", "ivf_flat"]

DEFAULT_NPROBE = 8
"""Inverted lists that are compared with each query, unless told otherwise."""

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

SPARE = 8
"""Neighbours asked of FAISS beyond the k wanted, so that near ties can be told apart."""

CANDIDATES_AT_ONCE = 1 << 22
"""Most proposed neighbours held in memory at a time."""

ROWS_AT_ONCE = 1 << 16
"""Rows read back from an index at a time where not all are wanted at once."""

PAIRS_AT_ONCE = 1024
"""Exact distances computed at a time, so that they stay in cache."""


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


class Shard:
    """Consecutive rows of a bank in one FAISS index, searched on its own, e.g. on a machine of its own.

    Attributes:
        index: FAISS index of the rows (IndexFlatL2, or IndexIVFFlat with a direct map).
        first_row: number of its first row in the bank.
    """

    def __init__(self, index: Any, first_row: int) -> None:
        self.index = index
        self.first_row = first_row
        self._longest = _longest(index)
        self._quantizer: Any = None
        if hasattr(index, "quantizer"):
            self._quantizer = _faiss().downcast_index(index.quantizer)
            self._longest_centroid = _longest(self._quantizer)

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    def vectors(self) -> Float32:
        """Return all rows, shape (rows, dimension), exactly as they were put in."""
        return self.index.reconstruct_batch(np.arange(self.rows))

    def search(self, queries: Float32, k: int, excluded: Bool | None = None) -> tuple[Float32, Int64]:
        """Find the k nearest rows of this shard, by (squared distance, row).

        A distance is Σ(x−y)² summed in float64 and rounded to float32. The result is exact, near ties and duplicates
        included: FAISS's float32 distances are wrong by at most e = (D+16)·2⁻²⁴·(|x|+|y|)²; rows within 2e of the
        k-th proposed one are ranked by their own distance, and where proposals end within 2e, more are asked for.
        With "ivf_flat" the same holds within the `nprobe` lists whose centroids are nearest to the query.

        Args:
            queries: shape (Q, D).
            k: how many, at least 1.
            excluded: shape (rows,), which rows of this shard are passed over as if it did not hold them.

        Returns:
            Squared distances, shape (Q, min(k, rows)), ascending, and row numbers of the bank. Where fewer rows are
            left, or fewer lie in the probed lists of "ivf_flat", distances end with infinity and row numbers with −1.

        Raises:
            OptionError: k is below 1.
            DataError: queries have another dimension or hold NaN or infinity.
        """
        queries = _checked(queries, "queries", self.dimension)
        if k < 1:
            raise OptionError(f"k must be at least 1, got {k}")
        k = min(k, self.rows)
        if self._quantizer is None:
            distances, rows = _exact_nearest(self._search_flat, self.index, self._longest, queries, k, excluded)
        else:
            distances, rows = self._search_lists(queries, k, excluded)
        rows[rows >= 0] += self.first_row
        return distances, rows

    def _search_flat(self, queries: Float32, width: int, _block: Int64) -> tuple[Float32, Int64]:
        return self.index.search(queries, width)

    def _search_lists(self, queries: Float32, k: int, excluded: Bool | None) -> tuple[Float32, Int64]:
        centroid_distances, lists = _nearest_centroids(
            self._quantizer, self._longest_centroid, queries, self.index.nprobe
        )

        def search(some: Float32, width: int, block: Int64) -> tuple[Float32, Int64]:
            return self.index.search_preassigned(some, width, lists[block], centroid_distances[block])

        return _exact_nearest(search, self.index, self._longest, queries, k, excluded)


class MemoryBank:
    """Reference vectors in shards, searched as one.

    Attributes:
        shards: the parts, in order of rows.
        kind: "flat" compares with every row; "ivf_flat" with the rows of the nearest of `nlist` k-means lists.
            Vectors are never compressed: compressed distances move anomaly scores.
        metadata: what is known of the vectors (coreset ratio, seed, projection, measured recall …); saved with them.
        origins: the images that the vectors came from; None where that is not known, as of banks of before.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        kind: Kind,
        metadata: dict[str, Any] | None = None,
        origins: Origins | None = None,
    ) -> None:
        self.shards = list(shards)
        self.kind = kind
        self.metadata = dict(metadata or {})
        self.origins = origins

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
    ) -> Self:
        """Build a bank of vectors.

        Args:
            vectors: shape (N, D).
            shards: into how many parts of equal size (±1 row) the rows are cut.
            kind: see the class.
            nlist: number of lists of "ivf_flat"; √N if None.
            nprobe: lists compared with each query; `DEFAULT_NPROBE` (or all, if fewer) if None. On patch features of
                real images 8 of √N lists found 87–94 % of the nearest rows, 16 found 94–98 %, 32 over 99 %.
            seed: of the k-means that makes the lists.
            metadata, origins: see the class.

        Raises:
            OptionError: an option is out of range.
            DataError: vectors are not a finite matrix, or the origins are of another number of vectors.
        """
        vectors = _checked(vectors, "vectors")
        rows = len(vectors)
        if origins is not None and len(origins.rows) != rows:
            raise DataError(f"a bank of {rows} rows got the origins of {len(origins.rows)}; give one for each row")
        if not 1 <= shards <= rows:
            raise OptionError(f"a bank of {rows} rows cannot be cut into {shards} shards")
        edges = [rows * part // shards for part in range(shards + 1)]
        parts = [slice(first, last) for first, last in pairwise(edges)]
        if kind == "flat":
            indexes = [_flat(vectors[part]) for part in parts]
        elif kind == "ivf_flat":
            nlist = max(1, round(rows**0.5)) if nlist is None else nlist
            nprobe = min(DEFAULT_NPROBE, nlist) if nprobe is None else nprobe
            if not 1 <= nprobe <= nlist <= rows:
                raise OptionError(f"need 1 <= nprobe <= nlist <= rows, got nprobe {nprobe}, nlist {nlist}, rows {rows}")
            quantizer = _trained_quantizer(vectors, nlist, seed)
            # FAISS's own assignment would depend on the cut into shards, as its distances do.
            lists = _nearest_centroids(quantizer, _longest(quantizer), vectors, 1)[1][:, 0]
            indexes = [_ivf_flat(vectors[part], lists[part], quantizer, nprobe) for part in parts]
        else:
            raise OptionError(f"the kind of a bank must be 'flat' or 'ivf_flat', got '{kind}'")
        return cls([Shard(index, first) for index, first in zip(indexes, edges)], kind, metadata, origins)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def dimension(self) -> int:
        return self.shards[0].dimension

    def vectors(self) -> Float32:
        """Return all rows, shape (rows, dimension), exactly as they were put in."""
        return np.concatenate([shard.vectors() for shard in self.shards])

    def rows_at(self, rows: Int64) -> Float32:
        """Return the vectors of given row numbers: shape rows.shape + (dimension,).

        Raises:
            OptionError: a row number is not in the bank.
        """
        count = self.shards[-1].first_row + self.shards[-1].rows
        if rows.size and not (rows.min() >= 0 and rows.max() < count):
            raise OptionError(f"the memory bank has rows 0 to {count - 1}, asked for {rows.min()} to {rows.max()}")
        vectors = np.empty((*rows.shape, self.dimension), dtype=np.float32)
        for shard in self.shards:
            here = (rows >= shard.first_row) & (rows < shard.first_row + shard.rows)
            vectors[here] = shard.index.reconstruct_batch(rows[here] - shard.first_row)
        return vectors

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
        faiss = _faiss()
        for name in files.list_names(uri):
            if name in (MANIFEST, ORIGINS) or name.endswith(".faiss"):
                files.remove(files.join(uri, name))
        entries = []
        for number, shard in enumerate(self.shards):
            name = f"shard-{number:05d}-of-{len(self.shards):05d}.faiss"
            content = faiss.serialize_index(shard.index).tobytes()
            files.write_bytes(files.join(uri, name), content)
            entries.append(
                {"file": name, "first_row": shard.first_row, "rows": shard.rows, "sha256": files.sha256_of(content)}
            )
        origins = {}
        if self.origins is not None:
            origins = {"origins": {"file": ORIGINS, "sha256": self.origins.save(uri)}}
        index = self.shards[0].index
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "rows": self.rows,
            "dimension": self.dimension,
            "parameters": {} if self.kind == "flat" else {"nlist": index.nlist, "nprobe": index.nprobe},
            "shards": entries,
            **origins,
            "metadata": self.metadata,
        }
        files.write_json(files.join(uri, MANIFEST), manifest)

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read a bank written by `save`.

        Raises:
            ModelError: the folder is not a whole bank of this format, or a file is damaged; the message names it.
        """
        manifest = _read_manifest(uri)
        shards = [load_shard(uri, number) for number in range(len(manifest["shards"]))]
        first_row = 0
        for shard in shards:
            if shard.first_row != first_row:
                raise ModelError(
                    f"the shards of the memory bank at {uri} leave a gap at row {first_row}; build it again"
                )
            first_row += shard.rows
        if first_row != manifest["rows"]:
            raise ModelError(f"the memory bank at {uri} holds {first_row} rows, its manifest says {manifest['rows']}")
        entry = manifest.get("origins")
        origins = None if entry is None else Origins.load(uri, entry["sha256"], first_row)
        return cls(shards, manifest["kind"], manifest["metadata"], origins)


class BankWithoutImage(MemoryBank):
    """A bank as it would be without the vectors of one image; it shares all others with the whole bank.

    Rows keep the numbers that they have in the whole bank, those added follow, and "ivf_flat" keeps its lists. Answers
    are those of a bank that was built of the other vectors and those added, in these lists.
    """

    def __init__(self, bank: MemoryBank, image: int, added: Float32 | None = None) -> None:
        super().__init__(bank.shards, bank.kind, bank.metadata, bank.origins)
        if bank.origins is None:
            raise ModelError("this memory bank does not tell which image each vector came from; fit the model again")
        self._excluded = bank.origins.rows == image
        if self._excluded.all():
            raise OptionError("the memory bank has no vectors of other images; give it more images")
        if added is not None and len(added):
            added = _checked(added, "vectors", self.dimension)
            self.shards.append(Shard(self._index_of(added), bank.rows))
            self._excluded = np.concatenate([self._excluded, np.zeros(len(added), bool)])

    def _index_of(self, vectors: Float32) -> Any:
        """Index further vectors as those of the bank are, in the same lists if it has lists."""
        if self.kind == "flat":
            return _flat(vectors)
        index = self.shards[0].index
        quantizer = _faiss().downcast_index(index.quantizer)
        lists = _nearest_centroids(quantizer, _longest(quantizer), vectors, 1)[1][:, 0]
        return _ivf_flat(vectors, lists, quantizer, index.nprobe)

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

    def save(self, uri: str) -> None:
        """Refuse to be saved."""
        raise UnianomError("a memory bank without one of its images is only searched; save the whole bank")


def load_shard(uri: str, number: int) -> Shard:
    """Read one shard of a saved bank, to be searched apart; `merge_results` joins what the shards answer.

    Raises:
        OptionError: the bank has no shard of this number.
        ModelError: see `MemoryBank.load`.
    """
    manifest = _read_manifest(uri)
    if not 0 <= number < len(manifest["shards"]):
        raise OptionError(f"the memory bank at {uri} has {len(manifest['shards'])} shards, there is no shard {number}")
    entry = manifest["shards"][number]
    place = files.join(uri, entry["file"])
    try:
        content = files.read_bytes(place)
    except FileNotFoundError as error:
        raise ModelError(f"{place} is missing from the memory bank; copy the whole folder again") from error
    if files.sha256_of(content) != entry["sha256"]:
        raise ModelError(f"{place} is damaged: its SHA-256 is not the one in {MANIFEST}; copy the folder again")
    faiss = _faiss()
    try:
        index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    except RuntimeError as error:
        raise ModelError(f"{place} is not an index that FAISS {faiss.__version__} can read") from error
    expected = {"flat": faiss.IndexFlatL2, "ivf_flat": faiss.IndexIVFFlat}[manifest["kind"]]
    if type(index) is not expected or index.metric_type != faiss.METRIC_L2:
        raise ModelError(f"{place} holds a {type(index).__name__}, not the {expected.__name__} that its manifest says")
    if (index.ntotal, index.d) != (entry["rows"], manifest["dimension"]):
        raise ModelError(
            f"{place} holds {index.ntotal} rows of dimension {index.d}, "
            f"its manifest says {entry['rows']} of {manifest['dimension']}"
        )
    return Shard(index, entry["first_row"])


def merge_results(parts: Sequence[tuple[Float32, Int64]], k: int) -> tuple[Float32, Int64]:
    """Join what the shards of a bank answered to the same queries.

    Args:
        parts: (squared distances, row numbers) of each shard, in any order, see `Shard.search`.
        k: how many neighbours to keep.

    Returns:
        Squared distances, shape (Q, k), ascending, and row numbers, shape (Q, k).

    Raises:
        OptionError: a query has fewer than k neighbours.
    """
    distances = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    distances, rows = np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)
    if rows.shape[1] < k or (rows < 0).any():
        raise OptionError(f"a query has fewer than {k} neighbours; lower k, or raise nprobe of an 'ivf_flat' bank")
    return distances, rows


def _read_manifest(uri: str) -> dict[str, Any]:
    place = files.join(uri, MANIFEST)
    try:
        manifest = files.read_json(place)
    except FileNotFoundError as error:
        raise ModelError(f"{uri} is not a whole memory bank: it has no {MANIFEST}") from error
    except ValueError as error:
        raise ModelError(f"{place} is damaged: it is not JSON ({error}); copy the folder again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ModelError(f"{place} has format version {version}, this unianom reads {FORMAT_VERSION}")
    entries = manifest.get("shards")
    if (
        manifest.get("kind") not in get_args(Kind)
        or not all(isinstance(manifest.get(key), int) for key in ("rows", "dimension"))
        or not isinstance(manifest.get("metadata"), dict)
        or not _is_origins(manifest.get("origins"))
        or not (isinstance(entries, list) and entries and all(_is_entry(entry) for entry in entries))
    ):
        raise ModelError(f"{place} is damaged: kind, rows, dimension, metadata or shards are missing or not valid")
    return manifest


def _is_entry(entry: Any) -> bool:
    types = {"file": str, "first_row": int, "rows": int, "sha256": str}
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in types.items())
        and files.is_plain_name(entry["file"])  # never read outside the folder
    )


def _is_origins(entry: Any) -> bool:
    return entry is None or (isinstance(entry, dict) and isinstance(entry.get("sha256"), str))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UnianomError("a memory bank needs FAISS; run: pip install 'unianom[cpu]' (or 'unianom[gpu]')") from error
    # Below this many numbers in a batch of queries FAISS 1.14 and 1.15 avoid matrix products; their default suits
    # some 160 threads and is 4 to 6 times slower than need be on a few (facebookresearch/faiss, pull request 5109).
    if faiss.cvar.distance_compute_blas_threshold == 128_000:
        faiss.cvar.distance_compute_blas_threshold = 800 * faiss.omp_get_max_threads()
    return faiss


def _checked(vectors: Float32, what: str, dimension: int | None = None) -> Float32:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or (dimension is None and len(vectors) == 0):
        raise DataError(f"{what} of a memory bank must have shape (rows, dimension), got {vectors.shape}")
    if dimension is not None and vectors.shape[1] != dimension:
        raise DataError(f"{what} have dimension {vectors.shape[1]}, the memory bank has {dimension}")
    if not np.isfinite(np.einsum("nd,nd->n", vectors, vectors)).all():
        raise DataError(f"{what} of a memory bank hold NaN, infinite or absurdly large values")
    return vectors


def _lengths(vectors: Float32) -> Float64:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def _longest(index: Any) -> float:
    """Return the length of the longest row of an index."""
    starts = range(0, index.ntotal, ROWS_AT_ONCE)
    blocks = (np.arange(start, min(start + ROWS_AT_ONCE, index.ntotal)) for start in starts)
    return max(float(_lengths(index.reconstruct_batch(block)).max()) for block in blocks)


def _flat(vectors: Float32) -> Any:
    index = _faiss().IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return index


def _trained_quantizer(vectors: Float32, nlist: int, seed: int) -> Any:
    """Return a flat index of the `nlist` k-means centroids of the vectors."""
    faiss = _faiss()
    parameters = faiss.ClusteringParameters()
    parameters.seed = seed
    parameters.min_points_per_centroid = 1  # short lists are the caller's choice, not worth a warning from C++
    clustering = faiss.Clustering(vectors.shape[1], nlist, parameters)
    quantizer = faiss.IndexFlatL2(vectors.shape[1])
    clustering.train(vectors, quantizer)
    return quantizer


def _ivf_flat(vectors: Float32, lists: Int64, quantizer: Any, nprobe: int) -> Any:
    faiss = _faiss()
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], quantizer.ntotal)
    lists = np.ascontiguousarray(lists)
    index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
    index.make_direct_map()  # rows can be read back by number
    index.nprobe = nprobe
    return index


def _nearest_centroids(quantizer: Any, longest: float, vectors: Float32, count: int) -> tuple[Float32, Int64]:
    def search(some: Float32, width: int, _block: Int64) -> tuple[Float32, Int64]:
        return quantizer.search(some, width)

    return _exact_nearest(search, quantizer, longest, vectors, count)


def _exact_nearest(
    search: Callable[[Float32, int, Int64], tuple[Float32, Int64]],
    index: Any,
    longest: float,
    queries: Float32,
    k: int,
    excluded: Bool | None = None,
) -> tuple[Float32, Int64]:
    """Find the k nearest rows of an index by (distance, row), from proposals whose distances are nearly right.

    Args:
        search: (some queries, how many neighbours, which queries these are) -> FAISS's distances and rows, ascending.
        index: the FAISS index, to read proposed rows from.
        longest: length of its longest row.
        queries: shape (Q, D).
        k: at most the rows of the index.
        excluded: which rows of the index do not count; where fewer than k are left, distances end with infinity and
            rows with −1.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    # A float32 dot product of D terms is wrong by at most D·u·|x||y|, in any order of summation (Higham, "Accuracy and
    # Stability of Numerical Algorithms", §3.1); 16u more cover the squares, the sums and rounding the result.
    unit_error = (queries.shape[1] + 16) * np.finfo(np.float32).eps / 2
    error = unit_error * (_lengths(queries) + longest) ** 2 + np.finfo(np.float32).tiny
    pending, width = np.arange(len(queries)), min(k + SPARE, index.ntotal)
    while pending.size:
        unsettled = []
        step = max(1, CANDIDATES_AT_ONCE // width)
        for block in (pending[start : start + step] for start in range(0, len(pending), step)):
            near, proposed = search(queries[block], width, block)
            counted, kth = proposed >= 0, near[:, k - 1]
            if excluded is not None:
                counted &= ~excluded[proposed]
                kth = np.partition(np.where(counted, near, np.inf), k - 1, axis=1)[:, k - 1]  # infinite: ask for more
            # The true k-th distance is at most kth + error, any row not proposed at least near[-1] - error.
            limit = kth + 2 * error[block]
            settled = (near[:, -1] > limit) | (proposed[:, -1] < 0) | (width == index.ntotal)
            done = block[settled]
            candidates = counted & (near <= limit[:, None])
            distances[done], rows[done] = _ranked(index, queries, done, proposed[settled], candidates[settled], k)
            unsettled.append(block[~settled])
        pending, width = np.concatenate(unsettled), min(4 * width, index.ntotal)
    return distances, rows


def _ranked(
    index: Any, queries: Float32, which: Int64, proposed: Int64, candidates: NDArray[np.bool_], k: int
) -> tuple[Float32, Int64]:
    """Return, for some of the queries, the k nearest of the candidates among the proposed rows, by (distance, row)."""
    query, column = np.nonzero(candidates)
    row = proposed[query, column]
    squared = np.empty(len(row), dtype=np.float32)
    for start in range(0, len(row), PAIRS_AT_ONCE):
        pairs = slice(start, start + PAIRS_AT_ONCE)
        difference = queries[which[query[pairs]]].astype(np.float64)
        difference -= index.reconstruct_batch(row[pairs])
        squared[pairs] = np.einsum("nd,nd->n", difference, difference)
    distances = np.full(proposed.shape, np.inf, dtype=np.float32)
    distances[query, column] = squared
    proposed = np.where(candidates, proposed, -1)  # where there are fewer than k candidates, others fill up
    order = np.lexsort((proposed, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(proposed, order, axis=1)

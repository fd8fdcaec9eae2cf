"""Rows of shards to batches of a network's input, decoded by threads ahead of the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.decoded_rows import decode_fitted, is_listed, with_sizes
from pipelines.data.fetch import ERROR, STATUS, fetch_errors
from pipelines.data.timed_pool import TimedPool
from pipelines.runtime.stage_clock import StageClock
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.tensors import normalise_into
from unianom.errors import ImageError


@dataclass(frozen=True, eq=False)
class DecodedBatch:
    """Images as input of a network.

    Attributes:
        model: folder of the model.
        rows: the other columns of all B rows; height and width are those of the decoded images where they were listed.
        images: K×3×S×S float32, normalised, of those that can be read. Their memory is used again for a later batch,
            so they hold until the next one is asked for.
        places: K numbers of the rows of these images, ascending.
        errors: why the others cannot be read, by the number of their row.
    """

    model: str
    rows: pa.Table
    images: torch.Tensor
    places: np.ndarray
    errors: dict[int, ImageError]


class BatchDecoder:
    """Decodes batches ahead of their use, straight into the network's input.

    Args:
        pool: threads that decode, each image within its limit.
        threads: how many there are.
        limits: what an image may cost.
        clock: counts reading apart, decoding, resizing and normalising.
    """

    def __init__(self, pool: TimedPool, threads: int, limits: ImageLimits, clock: StageClock) -> None:
        self._pool, self._threads, self._limits, self._clock = pool, threads, limits, clock
        self._free: list[np.ndarray] = []  # memory of batches that are done with; new pages cost as much as normalising

    def decoded(
        self, batches: Iterator[tuple[str, pa.Table]], policy_of: Callable[[str], InputPolicy], ahead: int
    ) -> Iterator[DecodedBatch]:
        """Yield batches in their order.

        Args:
            batches: model folder and rows with `image`, the encoded file, as shards or an `ImageFetcher` give them.
            policy_of: returns the input policy of a model folder; called by this thread only.
            ahead: rows that are being decoded or wait, at least; one batch more may.
        """
        waiting: deque[_Pending] = deque()
        rows = 0
        for model, table in batches:
            waiting.append(self._begin(model, table, policy_of(model)))
            rows += len(table)
            while rows - len(waiting[0].rows) >= ahead:
                batch = waiting.popleft()
                rows -= len(batch.rows)
                yield batch.result()
                self._take_back(batch)
        for batch in waiting:
            yield batch.result()
            self._take_back(batch)

    def _begin(self, model: str, table: pa.Table, policy: InputPolicy) -> _Pending:
        """Have the images of a batch decoded, each thread a share of them."""
        images = self._memory(len(table), policy.side)
        sizes = np.zeros((len(table), 2), np.int32)
        share = -(-len(table) // self._threads)
        shares = [(start, min(start + share, len(table))) for start in range(0, len(table), share)]
        unread = fetch_errors(table)
        decode: Callable[[int], ImageError | None] = partial(
            self._decode, table["image"], images, sizes, policy, unread
        )
        futures = [self._pool.submit_each(decode, range(start, end)) for start, end in shares]
        return _Pending(
            model,
            table.drop_columns([name for name in table.column_names if name in ("image", STATUS, ERROR)]),
            images,
            sizes if is_listed(table) else None,
            futures,
        )

    def _memory(self, count: int, side: int) -> np.ndarray:
        """Return room for so many images."""
        while self._free:
            room = self._free.pop()
            if room.shape[2] == side and len(room) >= count:
                return room[:count]
        return np.empty((count, 3, side, side), np.float32)

    def _take_back(self, batch: _Pending) -> None:
        """Keep the memory of a batch that is done with for a later one."""
        if not batch.timed_out:  # else a thread that was given up may still write to it
            self._free.append(batch.images)

    def _decode(
        self,
        files: pa.ChunkedArray,
        images: np.ndarray,
        sizes: np.ndarray,
        policy: InputPolicy,
        unread: Mapping[int, ImageError],
        row: int,
    ) -> ImageError | None:
        """Decode the file of a row into its place; return why it cannot be read, or None."""
        if row in unread:
            return unread[row]
        try:
            pixels, sizes[row] = decode_fitted(files[row].as_py(), policy, self._limits, self._clock)
        except ImageError as error:
            return error
        with self._clock.stage("normalise"):
            normalise_into(images[row], pixels, policy)
        return None


@dataclass(frozen=True, eq=False)
class _Pending:
    """A batch that is being decoded."""

    model: str
    rows: pa.Table
    images: np.ndarray
    sizes: np.ndarray | None
    futures: Sequence[Future[list[ImageError | None]]]

    @property
    def timed_out(self) -> bool:
        """Return whether an image took too long; waits for all of them."""
        return any(
            error is not None and error.status == "timeout" for future in self.futures for error in future.result()
        )

    def result(self) -> DecodedBatch:
        found = [error for future in self.futures for error in future.result()]
        errors = {row: error for row, error in enumerate(found) if error is not None}
        places = np.array([row for row, error in enumerate(found) if error is None], np.int64)
        images = self.images[places] if errors else self.images
        rows = self.rows if self.sizes is None else with_sizes(self.rows, self.sizes, errors)
        return DecodedBatch(self.model, rows, torch.from_numpy(images), places, errors)

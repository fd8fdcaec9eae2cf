"""Which image each vector of a memory bank came from."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from unianom import files
from unianom.errors import DataError, ModelError, OptionError
from unianom.memory.bank_files import read_verified

ORIGINS = "origins.parquet"
"""File in a bank's folder, with a row for each image: `sample_id`, and `rows`, the numbers of its rows in the bank."""


@dataclass(frozen=True, eq=False)
class Origins:
    """The images that a bank was chosen from, and which of them each of its vectors came from.

    Attributes:
        images: their sample_ids, also of those that gave no vector.
        rows: for each row of the bank, the number of its image among these; int32.

    Raises:
        DataError: a number is that of no image.
    """

    images: tuple[str, ...]
    rows: NDArray[np.int32]

    def __post_init__(self) -> None:
        if len(self.rows) and not (self.rows.min() >= 0 and self.rows.max() < len(self.images)):
            raise DataError(
                f"the vectors of a bank came from images {self.rows.min()} to {self.rows.max()} of {len(self.images)}; "
                f"number the images from 0"
            )

    def rows_of(self, sample_id: str) -> NDArray[np.int64]:
        """Return the rows of the bank that came from an image, ascending; none where the coreset took none of it.

        Raises:
            OptionError: the bank was not chosen from this image.
        """
        if sample_id not in self.images:
            raise OptionError(
                f"the memory bank was not chosen from an image {sample_id}, but from {len(self.images)} others, such "
                f"as {self.images[0]}; give one of these"
            )
        return np.flatnonzero(self.rows == self.images.index(sample_id))

    def save(self, uri: str) -> str:
        """Write the file into a bank's folder; return its SHA-256."""
        import pyarrow as pa  # options import this module by way of the index
        import pyarrow.parquet as pq

        order = np.argsort(self.rows, kind="stable")
        ends = np.cumsum(np.bincount(self.rows, minlength=len(self.images)))
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        rows = pa.ListArray.from_arrays(offsets, pa.array(order, pa.int32()))
        table = pa.table({"sample_id": pa.array(self.images, pa.string()), "rows": rows})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        content = buffer.getvalue()
        files.write_bytes(files.join(uri, ORIGINS), content)
        return files.sha256_of(content)

    @classmethod
    def load(cls, uri: str, sha256: str, count: int) -> Self:
        """Read the file from a bank's folder.

        Args:
            uri: that folder.
            sha256: of the file, as the bank's manifest has it.
            count: number of the bank's rows.

        Raises:
            ModelError: it is missing or damaged, or does not name one image for each row of the bank.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = files.join(uri, ORIGINS)
        content = read_verified(path, sha256)
        try:
            table = pq.read_table(io.BytesIO(content))
            lists = table["rows"].combine_chunks()
            order = lists.flatten().to_numpy().astype(np.int64)
            counts = lists.value_lengths().to_numpy()
            images = tuple(table["sample_id"].to_pylist())
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}; fit the model again") from error
        if not np.array_equal(np.sort(order), np.arange(count)):
            raise ModelError(f"{path} does not name one image for each of the {count} rows of the bank; copy it again")
        rows = np.empty(count, np.int32)
        rows[order] = np.repeat(np.arange(len(images), dtype=np.int32), counts)
        return cls(images, rows)

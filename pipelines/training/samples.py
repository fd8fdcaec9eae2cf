"""Which images a training learns from."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.training.prepared import learnable
from unianom import files
from unianom.data.shards import ShardSet

_PLACES = ("part", "group", "row", "number")


@dataclass(frozen=True)
class TrainingImages:
    """The images a method learns from, in a fixed order.

    Attributes:
        category: N int64, index into the categories.
        label: N int64, 0 normal, 1 anomalous.
        part, group, row: N int64, where each lies: part number, row group, place among the `learnable` of its part.
        number: N int64, place among all `learnable` ones, in whose order they are cached.
    """

    category: np.ndarray
    label: np.ndarray
    part: np.ndarray
    group: np.ndarray
    row: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.category)

    @staticmethod
    def choose(
        shards: ShardSet, categories: list[str], learn: frozenset[str] | None, labels: bool = False
    ) -> TrainingImages:
        """Choose the shard set's `learnable` images whose sample_id is in `learn`, or all if that is None.

        They come in the order of parts and rows.
        """
        table = shards.locate(learnable(categories, labels), ["sample_id", "category", "label"])
        table = table.append_column("number", pa.array(range(len(table)), pa.int64()))
        if learn is not None:
            table = table.filter(pa.array([sample in learn for sample in table["sample_id"].to_pylist()]))
        numbers = {category: number for number, category in enumerate(categories)}
        category = np.array([numbers[name] for name in table["category"].to_pylist()], np.int64)
        label = table["label"].to_numpy().astype(np.int64)
        return TrainingImages(category, label, *(table[name].to_numpy() for name in _PLACES))

    def first(self, count: int) -> TrainingImages:
        """Return those that are among the first so many `learnable` images."""
        inside = self.number < count
        return TrainingImages(*(getattr(self, field.name)[inside] for field in fields(self)))

    def save(self, uri: str) -> None:
        """Write them as a Parquet file."""
        buffer = io.BytesIO()
        pq.write_table(pa.table({field.name: getattr(self, field.name) for field in fields(self)}), buffer)
        files.write_bytes(uri, buffer.getvalue())

    @staticmethod
    def load(uri: str) -> TrainingImages:
        """Read what `save` wrote."""
        table = pq.read_table(io.BytesIO(files.read_bytes(uri)))
        return TrainingImages(*(table[field.name].to_numpy() for field in fields(TrainingImages)))

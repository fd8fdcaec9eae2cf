"""What stages hand to each other: arrays, rows and plain data, as one row of Arrow that is read without a copy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

ARRAY = "array:"
"""Beginning of the columns that hold arrays; the name of the array follows."""


@dataclass(frozen=True, eq=False)
class Block:
    """What a stage makes of one task.

    Attributes:
        arrays: NumPy arrays of numbers by name, such as N×S×S×3 uint8 pixels or N scores; read-only at their receiver.
        rows: columns of the rows they are about, small beside the arrays; None if there are none.
        plain: anything else that is small, of the types that JSON has.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    rows: pa.Table | None = None
    plain: dict[str, Any] = field(default_factory=dict)


def block_to_arrow(block: Block) -> pa.Table:
    """Return a block as a table of one row, which no Ray Data splits.

    Each array is one value, whose memory it shares if it is contiguous.

    Raises:
        TypeError: an array holds Python objects.
    """
    columns: dict[str, pa.Array] = {}
    shapes: dict[str, list[Any]] = {}
    for name, array in block.arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name} holds Python objects; hand on numbers, and anything else in rows or plain")
        array = np.ascontiguousarray(array)
        columns[ARRAY + name] = _one_value(pa.py_buffer(array))
        shapes[name] = [array.dtype.str, *array.shape]
    if block.rows is not None:
        columns["rows"] = _one_value(_written(block.rows))
    columns["plain"] = pa.array([json.dumps({"arrays": shapes, "plain": block.plain})])
    return pa.table(columns)


def block_from_arrow(table: pa.Table) -> Block:
    """Return the block that `block_to_arrow` made a table of; its arrays are read-only and share the table's memory."""
    held = json.loads(table["plain"][0].as_py())
    arrays = {}
    for name, (dtype, *shape) in held["arrays"].items():
        arrays[name] = np.ndarray(shape, dtype, _the_value(table[ARRAY + name]) if math.prod(shape) else b"")
        arrays[name].flags.writeable = False
    rows = pa.ipc.open_stream(_the_value(table["rows"])).read_all() if "rows" in table.column_names else None
    return Block(arrays, rows, held["plain"])


def _one_value(data: pa.Buffer) -> pa.Array:
    """Return a large_binary array of one value, without a copy of it."""
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _the_value(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the memory of the only value of a large_binary column; a scalar of Arrow would be a copy."""
    array = next(chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = array.buffers()
    start, end = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2].tolist()
    return data.slice(start, end - start)


def _written(rows: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue()

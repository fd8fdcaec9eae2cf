"""The writer of a cache: what is computed of a range of images to the files of one part of the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any

import numpy as np
import torch

from pipelines.data.extractors import Arrays, BatchFunction, Extractor, ImageBatch
from pipelines.data.image_source import ImageSource, ReadRange
from pipelines.runtime import outputs
from pipelines.runtime.models import load_model
from pipelines.runtime.stage_clock import StageClock
from unianom import files
from unianom.data.row_ranges import RowRange
from unianom.execution import Execution
from unianom.methods import Method


def part_name(within: RowRange, group: str = "") -> str:
    """Return the name of the part of a cache that holds a range of a group's images."""
    place = f"{within.part.removesuffix('.parquet')}-{within.first:09d}"
    return f"{place}-{group}" if group else place


def array_name(part: str, name: str) -> str:
    """Return the name of the file of an array of a part, as `part_name` gives it."""
    return f"{part}-{name}.npy"


class CacheWriter:
    """Writes the part of a cache of one range of one group. A `PartTask`; its task is the range as plain data, and
    "group".

    Memory holds a batch at a time, whatever the size of the range.

    Args:
        uri: folder of the cache.
        images: by the name of their group.
        extractors: what is computed of the images of each group.
        batch_size: images at once.
        execution: how models are run.
        threads: images decoded at the same time, ahead of the network.
    """

    def __init__(
        self,
        uri: str,
        images: Mapping[str, ImageSource],
        extractors: Mapping[str, Extractor],
        batch_size: int,
        execution: Execution,
        threads: int,
    ) -> None:
        self._uri, self._images, self._batch_size, self._threads = uri, images, batch_size, threads
        self._functions = Functions(extractors, execution)
        self._readers: dict[str, ReadRange] = {}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write the arrays of a range, then their record."""
        group, within = task_range(task)
        if group not in self._readers:
            self._readers[group] = self._images[group].open(self._batch_size, self._threads)
        return write_part(self._uri, part_name(within, group), self._computed(group, within))

    @torch.inference_mode()
    def _computed(self, group: str, within: RowRange) -> Iterator[tuple[int, Arrays]]:
        function = self._functions.of(group)
        for samples in self._readers[group](within, function.policy, StageClock()):
            yield len(samples), function.compute(ImageBatch.of(samples, within.part))


def range_task(within: RowRange, group: str) -> dict[str, Any]:
    """Return the task of a range of a group's images, as plain data."""
    return {"group": group, "part": within.part, "first": within.first, "rows": within.rows, "opens": within.opens}


def task_range(task: Mapping[str, Any]) -> tuple[str, RowRange]:
    """Return group and range of what `range_task` gives."""
    return task["group"], RowRange(**{name: value for name, value in task.items() if name != "group"})


class Functions:
    """The functions of extractors, and the models that they run, each made once.

    Args:
        extractors: by the name of the group whose images they are for.
        execution: how models are run.
    """

    def __init__(self, extractors: Mapping[str, Extractor], execution: Execution) -> None:
        self._extractors, self._execution = extractors, execution
        self._methods: dict[str, Method] = {}
        self._functions: dict[str, BatchFunction] = {}

    def of(self, group: str) -> BatchFunction:
        """Return the function of a group."""
        if group not in self._functions:
            self._functions[group] = self._extractors[group].open(self._load)
        return self._functions[group]

    def _load(self, folder: str) -> Method:
        """Return the method of a model folder, loaded once for all groups."""
        if folder not in self._methods:
            self._methods[folder] = load_model(folder, self._execution).method
        return self._methods[folder]


def write_part(uri: str, name: str, batches: Iterable[tuple[int, Arrays]]) -> dict[str, Any]:
    """Write a part of a cache, and commit it.

    Args:
        uri: folder of the cache.
        name: of the part.
        batches: number of images and arrays of each, in order.

    Returns:
        The record of the part.
    """
    rows = 0
    written: dict[str, _ArrayFile] = {}
    with ExitStack() as stack:
        for images, arrays in batches:
            for key, array in arrays.items():
                if key not in written:
                    handle = stack.enter_context(files.open_atomic(files.join(uri, array_name(name, key))))
                    written[key] = _ArrayFile(handle, array)
                written[key].append(array)
            rows += images
        told = {key: file.finish() for key, file in written.items()}
    record = {"part": name, "rows": rows, "arrays": told, "bytes": sum(entry["bytes"] for entry in told.values())}
    outputs.commit_part(uri, name, record)
    return record


class _ArrayFile:
    """A .npy file whose rows come one batch after another; their number is known at the end."""

    def __init__(self, handle: IO[bytes], first: np.ndarray) -> None:
        self._handle, self._dtype, self._shape = handle, first.dtype, first.shape[1:]
        self._rows, self._digest = 0, hashlib.sha256()
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        if (array.dtype, array.shape[1:]) != (self._dtype, self._shape):
            raise ValueError(f"rows of {array.dtype} {array.shape[1:]} after rows of {self._dtype} {self._shape}")
        content = array_content(array)
        self._handle.write(content)
        self._digest.update(content)
        self._rows += len(array)

    def finish(self) -> dict[str, Any]:
        """Write the number of rows into the header; what the part's record says of the array."""
        size = self._handle.tell()
        self._handle.seek(0)
        self._write_header()  # NumPy leaves room for a first axis of any length, so it is as long as before
        self._handle.seek(size)
        shape = [self._rows, *self._shape]
        return {"shape": shape, "dtype": self._dtype.str, "sha256": self._digest.hexdigest(), "bytes": size}

    def _write_header(self) -> None:
        described = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._handle, described)


def array_content(array: np.ndarray) -> memoryview | bytes:
    """Return the bytes of an array, without a copy of one that is contiguous."""
    return memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""

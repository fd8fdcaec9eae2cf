"""What `CacheWriter` does in three stages, each on the processes that suit it; the files are the same.

any CPU: read, decode, resize ─uint8─▶ a device: normalise, forward ─▶ any CPU: write
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.cache_writer import Functions, part_name, task_range, write_part
from pipelines.data.extractors import Arrays, BatchFunction, Extractor, ImageBatch
from pipelines.data.image_source import ImageSource, ReadRange
from pipelines.runtime.device_turn import Turn, for_task_and_batch
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stages import Stages
from unianom.data.device_feed import DeviceFeed, Fetched
from unianom.data.image import InputPolicy
from unianom.execution import Execution


def caching_stages(
    uri: str,
    images: Mapping[str, ImageSource],
    extractors: Mapping[str, Extractor],
    batch_size: int,
    execution: Execution,
) -> Stages:
    """Return the stages of the filling of a cache; arguments as of `CacheWriter`."""
    policies = {group: extractor.policy() for group, extractor in extractors.items()}
    return Stages(
        read=partial(ImageReader, images=images, policies=policies, batch_size=batch_size),
        compute=partial(BatchExtractor, extractors=extractors, batch_size=batch_size, execution=execution),
        write=partial(ArrayWriter, uri=uri),
    )


class ImageReader:
    """Reads a range of images as input of a network. A `ReadStage`.

    Its block holds "pixels" N×S×S×3 uint8, "masks" N×S×S bool where these are read, what else is read of each image as
    rows, and the task as plain data.

    Args:
        images: by the name of their group.
        policies: how those of each group become input.
        batch_size: images read at once.
    """

    def __init__(self, images: Mapping[str, ImageSource], policies: Mapping[str, InputPolicy], batch_size: int) -> None:
        self._images, self._policies, self._batch_size = images, policies, batch_size
        self._readers: dict[str, ReadRange] = {}

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        """Return the images of a range.

        Raises:
            DataError: an image or mask cannot be read or takes too long, or an anomalous image has no mask.
        """
        group, within = task_range(task)
        if group not in self._readers:
            self._readers[group] = self._images[group].open(self._batch_size, threads=1)
        read = self._readers[group](within, self._policies[group], clock)
        batches = [ImageBatch.of(samples, within.part) for samples in read]
        if not batches:
            return Block(plain=task)
        arrays = {"pixels": np.concatenate([batch.pixels for batch in batches])}
        masks = [batch.masks for batch in batches if batch.masks is not None]
        if masks:
            arrays["masks"] = np.concatenate(masks)
        columns = {name: [value for batch in batches for value in batch.columns[name]] for name in batches[0].columns}
        return Block(arrays, pa.table(columns) if columns else None, task)


class BatchExtractor:
    """Computes the arrays of batches on a device. A `ComputeStage`.

    Its block holds the arrays of each batch, under "<number of the batch>/<name>", and as plain data the number of
    "images" of each.

    Args:
        extractors, batch_size, execution: see `CacheWriter`.
    """

    def __init__(self, extractors: Mapping[str, Extractor], batch_size: int, execution: Execution) -> None:
        self._functions, self._batch_size = Functions(extractors, execution), batch_size
        self._feeds: dict[str, DeviceFeed] = {}
        self._loading = threading.Lock()

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        """Return what is computed of the images of a block.

        Raises:
            DataError: a result is not finite.
        """
        if not block.arrays:
            return Block(plain={"images": []})
        group, within = task_range(block.plain)
        with self._loading:  # two tasks may come at once, and a model is loaded once
            function = self._functions.of(group)
        batches = list(_batches(block, within.part, self._batch_size))
        arrays: Arrays = {}

        def finish(number: int, fetched: Mapping[str, Fetched]) -> None:
            found = {name: values.numpy() for name, values in fetched.items()}
            for name, array in function.arrays(batches[number], found).items():
                arrays[f"{number}/{name}"] = array

        with torch.inference_mode():
            task_turn, batch_turn = for_task_and_batch(turn, function.device.type)
            # the first batches are on their way to the device while another task has its turn
            coming = self._computed(group, function, block.arrays["pixels"], len(batches), batch_turn)
            with task_turn, clock.stage("forward"):
                last: Mapping[str, Fetched] | None = None
                for number, fetched in enumerate(coming):
                    if last is not None:
                        finish(number - 1, last)  # while the device has the next one
                    last = fetched
                if last is not None:
                    finish(len(batches) - 1, last)
        return Block(arrays, plain={"images": [len(batch) for batch in batches]})

    def _computed(
        self,
        group: str,
        function: BatchFunction,
        pixels: np.ndarray,
        count: int,
        batch_turn: AbstractContextManager[None],
    ) -> Iterator[Mapping[str, Fetched]]:
        """Begin to copy images to the device; return what gives, for each batch, what the network makes of it."""
        network = function.network
        if network is None:
            return iter([{}] * count)
        with self._loading:
            if group not in self._feeds:
                self._feeds[group] = DeviceFeed(function.device, function.policy, self._batch_size)
            feed = self._feeds[group]
        batches = feed.batches(pixels)

        def forward(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
            with batch_turn:
                return network(images)

        return ({name: feed.fetch(values) for name, values in forward(images).items()} for images in batches)


def _batches(block: Block, part: str, size: int) -> Iterator[ImageBatch]:
    """Yield the images of a block of `ImageReader` in batches."""
    pixels, masks = block.arrays["pixels"], block.arrays.get("masks")
    columns = {} if block.rows is None else {name: block.rows[name].to_pylist() for name in block.rows.column_names}
    for start in range(0, len(pixels), size):
        some = slice(start, start + size)
        yield ImageBatch(
            pixels[some],
            part,
            None if masks is None else masks[some],
            {name: values[some] for name, values in columns.items()},
        )


class ArrayWriter:
    """Writes the part of a cache of one range. A `WriteStage`.

    Args:
        uri: folder of the cache.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        """Write the arrays of a range and their record."""
        group, within = task_range(task)
        arrays: defaultdict[int, Arrays] = defaultdict(dict)
        for key, array in block.arrays.items():
            number, _, name = key.partition("/")
            arrays[int(number)][name] = array
        batches = ((images, arrays[number]) for number, images in enumerate(block.plain["images"]))
        with clock.stage("write"):
            return write_part(self._uri, part_name(within, group), batches)

"""Arrays of training images that are computed once and read in every epoch: prepared pixels, masks, frozen features.

    shards ─▶ actors: decode, prepare (and encode) ─▶ one .npy file per part and array ─▶ memory-mapped by training

A set lies below its content key (shards, input policy, encoder …), so runs that need the same arrays share them, and
a killed run continues. Rows are the images of `learnable`, in the order of the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from pipelines.data.ingest import map_ahead
from pipelines.data.reader import decode_row, decode_row_mask
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from unianom import __version__, files
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.options import to_plain

PIXELS = "pixels"
"""Name of the array of prepared images, N×S×S×3 uint8."""

MASKS = "masks"
"""Name of the array of prepared masks beside the pixels, N×S×S bool."""

DESCRIPTOR = "descriptor"
"""Name of the array of descriptors, N×D float32: every frozen feature, averaged over its places."""


@dataclass(frozen=True)
class PreparedSet:
    """A finished set of arrays.

    Attributes:
        uri: its folder.
        names: of its arrays, descriptors not counted.
        bytes: on disk.
        images_per_second: at which it was computed; 0 if it was there already.
    """

    uri: str
    names: tuple[str, ...]
    bytes: int
    images_per_second: float


def normals(categories: list[str]) -> Selection:
    """The images that prepared sets hold for methods that learn from normal images."""
    return Selection(("train", "val"), tuple(categories), (NORMAL,))


def learnable(categories: list[str], labels: bool) -> Selection:
    """The images that prepared sets hold.

    Args:
        categories: of the model.
        labels: whether the method learns from anomalous images, too; only the "train" split has any to learn from.
    """
    return Selection(("train",), tuple(categories), (NORMAL, ANOMALOUS)) if labels else normals(categories)


def prepare(
    shards: ShardSet,
    categories: list[str],
    policy: InputPolicy,
    folder: str,
    limits: ImageLimits,
    runtime: RuntimeOptions,
    encoder: TrainedMethod | None = None,
    key: dict[str, Any] | None = None,
    half: bool = True,
    batch_size: int = 8,
    labels: bool = False,
    masks: bool = False,
) -> PreparedSet:
    """Compute a set, or find it computed.

    Args:
        shards, categories: whose images.
        policy: how images become input.
        folder: below which sets lie, each under its key.
        limits: what an image may cost.
        runtime: actors.
        encoder: method whose frozen features are wanted; None for pixels.
        key: what the features depend on besides images and policy.
        half: keep features as float16 instead of float32.
        batch_size: images in one forward pass.
        labels: see `learnable`.
        masks: keep masks beside the pixels.

    Raises:
        DataError: features are not finite in the chosen precision, an image or mask cannot be read, or an anomalous
            image has no mask.
    """
    selection = learnable(categories, labels)
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "categories": categories,
        "input": to_plain(policy),
        "encoder": key,
        "half": half and encoder is not None,
        "limits": to_plain(limits),
        "labels": labels,
        "masks": masks,
    }
    uri = files.join(folder, files.digest_of(plan)[:20])
    with outputs.open_cache(uri, "features", plan) as complete:
        if complete:
            made = files.read_json(files.join(uri, "_manifest.json"))
            return PreparedSet(uri, tuple(made["names"]), made["bytes"], 0.0)
        model = None
        if encoder is not None:
            model = files.join(uri, "encoder")
            Model(encoder, categories).save(model)
        arguments = {
            "shards": shards,
            "selection": selection,
            "policy": policy,
            "output": uri,
            "limits": limits,
            "model": model,
            "half": half,
            "batch_size": batch_size,
            "device": runtime.device if model else "cpu",
            "threads": runtime.cpus_per_worker,
            "masks": masks,
        }
        progress = Progress("frozen features" if model else "prepare images", shards.count(selection))
        tasks = {part: {"part": part} for part in shards.parts}
        records, rate = run_unfinished(PartPreparer, arguments, tasks, uri, runtime, progress, "rows")
        size = sum(record["bytes"] for record in records.values())
        names: list[str] = next((record["names"] for record in records.values() if record["rows"]), [])
        if model:
            files.remove(model)
        outputs.finish(uri, {"names": names, "bytes": size, "rows": sum(record["rows"] for record in records.values())})
        return PreparedSet(uri, tuple(names), size, rate)


def array_name(part: str, name: str) -> str:
    """File of one array of one part."""
    return f"{part.removesuffix('.parquet')}-{name}.npy"


class PartPreparer:
    """Writes the arrays of one part. A `PartTask`; arguments as of `prepare`."""

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        policy: InputPolicy,
        output: str,
        limits: ImageLimits,
        model: str | None,
        half: bool,
        batch_size: int,
        device: str,
        threads: int,
        masks: bool = False,
    ) -> None:
        self._shards, self._selection, self._policy, self._masks = shards, selection, policy, masks
        self._output, self._limits, self._half, self._batch_size = output, limits, half, batch_size
        self._encoder: TrainedMethod | None = None
        if model is not None:
            method = load_model(model, device).method
            assert isinstance(method, TrainedMethod)
            self._encoder = method
        self._pool = ThreadPoolExecutor(threads)

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write the arrays of a part and their record."""
        part = task["part"]
        rows = sum(batch.num_rows for batch in self._shards.read(part, self._selection, ["sample_id"]))
        size = 0
        with ExitStack() as stack:
            handles: dict[str, IO[bytes]] = {}
            for arrays in self._batches(part):
                for name, array in arrays.items():
                    if name not in handles:
                        path = files.join(self._output, array_name(part, name))
                        handles[name] = stack.enter_context(files.open_atomic(path))
                        size += write_npy_header(handles[name], array.dtype, (rows, *array.shape[1:]))
                    handles[name].write(array.tobytes())
                    size += array.nbytes
        names = [name for name in handles if name != DESCRIPTOR]
        record = {"part": part, "rows": rows, "names": names, "bytes": size}
        outputs.commit_part(self._output, part, record)
        return record

    def _batches(self, part: str) -> Iterator[dict[str, np.ndarray]]:
        waiting: list[dict[str, np.ndarray]] = []
        for decoded in map_ahead(self._pool, self._decode, self._rows(part), 2 * self._batch_size):
            waiting.append(decoded)
            if len(waiting) == self._batch_size:
                yield self._arrays(waiting, part)
                waiting = []
        if waiting:
            yield self._arrays(waiting, part)

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        columns = ["sample_id", "image", "label", "mask"] if self._masks else ["sample_id", "image"]
        for batch in self._shards.read(part, self._selection, columns):
            yield from batch.to_pylist()

    def _decode(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        decoded = {PIXELS: decode_row(row, self._policy, self._limits)}
        if self._masks:
            decoded[MASKS] = decode_row_mask(row, self._policy, self._limits)
        return decoded

    def _arrays(self, decoded: list[dict[str, np.ndarray]], part: str) -> dict[str, np.ndarray]:
        if self._encoder is None:
            return {name: np.stack([arrays[name] for arrays in decoded]) for name in decoded[0]}
        images = normalise([arrays[PIXELS] for arrays in decoded], self._policy)
        features = self._encoder.frozen_features(images.to(self._encoder.device))
        means = [value.flatten(2).mean(2) for value in features.values()]  # each B C
        arrays = {DESCRIPTOR: torch.cat(means, dim=1).float().cpu().numpy()}
        for name, value in features.items():
            kept = (value.half() if self._half else value.float()).cpu().numpy()
            if not np.isfinite(kept).all():
                kind = "half precision; use --data.feature_precision full" if self._half else "float32; check weights"
                raise DataError(f"frozen features of {part} are not finite in {kind}")
            arrays[name] = kept
        return arrays


def write_npy_header(handle: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Header of a .npy file whose rows follow; returns its length."""
    start = handle.tell()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(handle, described)
    return handle.tell() - start


class Arrays:
    """The arrays of a prepared set, memory-mapped, with rows by (part number, row).

    Args:
        uri: the set's folder.
        parts: shard parts, in order.
        names: arrays wanted.
        copies: folder on this machine's disk to copy files to that lie on an object store.
    """

    def __init__(self, uri: str, parts: list[str], names: tuple[str, ...], copies: Path) -> None:
        self._uri, self._parts, self._copies = uri, parts, copies
        self.names = names
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def row(self, name: str, part: int, row: int) -> np.ndarray:
        """One row of an array."""
        key = (part, name)
        if key not in self._open:
            path = files.join(self._uri, array_name(self._parts[part], name))
            self._open[key] = files.map_array(path, self._copies)
        return self._open[key][row]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # maps are opened anew in every process

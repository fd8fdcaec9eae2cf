"""The cache of what a frozen network computes of images, for training, memory banks, calibration, tuning and protocols.

    shards or validation images ─▶ actors: decode, run the network ─▶ <part>-<array>.npy ─▶ memory-mapped by readers

A cache is a folder named by the digest of its plan, that is of all that its bytes depend on, so that runs share it. It
is written part by part and continued where it was left. Any of these folders may be removed while no job runs; a later
run computes it again.
"""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch

from pipelines.data.image_source import ImageSource, ReadPart
from pipelines.data.reader import DecodedSample
from pipelines.runtime import outputs
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_unfinished
from unianom import __version__, files
from unianom.data.image import InputPolicy
from unianom.data.shards import MANIFEST
from unianom.data.tensors import normalise
from unianom.errors import DataError
from unianom.execution import Execution
from unianom.methods import Method
from unianom.model import Model, is_model

FORMAT = 2
"""Version of the files of a cache; caches of another one have another key."""

CHECKED_BYTES = 32 << 20
"""Size of an array up to which its checksum is compared when it is opened. The shapes and types of all are."""

Arrays = dict[str, np.ndarray]
"""Arrays of a batch by name; the rows of each are added to those of the batches before."""


# ------------------------------------------------------------------------------------------------- what is computed
@dataclass(frozen=True)
class ImageBatch:
    """Images that are computed on at once.

    Attributes:
        samples: the images.
        part: the part they are of, for errors.
    """

    samples: list[DecodedSample]
    part: str

    def __len__(self) -> int:
        return len(self.samples)

    def column(self, name: str) -> list[Any]:
        """Return a column of the source, a value for each image."""
        return [sample.row[name] for sample in self.samples]

    def tensor(self, method: Method) -> torch.Tensor:
        """Return B×3×S×S normalised images on the method's device."""
        return normalise([sample.pixels for sample in self.samples], method.input).to(method.device)


class BatchFunction(NamedTuple):
    """What computes the arrays of a batch.

    Attributes:
        policy: how images become its input.
        compute: the function.
    """

    policy: InputPolicy
    compute: Callable[[ImageBatch], Arrays]


class Extractor(Protocol):
    """What is computed of images: plain data that is pickled on the way to the workers, and gives the function there.
    Extractors that are equal compute the same."""

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        """Return the function of a batch.

        Args:
            load: gives the method of a model folder, on the device of the worker.

        Raises:
            ModelError: the model cannot be loaded, or is of another kind.
        """


def finite(array: np.ndarray, error: str) -> np.ndarray:
    """Return an array whose values are all finite.

    Raises:
        DataError: one is not; with the text given.
    """
    if not np.isfinite(array).all():
        raise DataError(error)
    return array


# ---------------------------------------------------------------------------------------------------------- the cache
@dataclass(frozen=True)
class FeatureCache:
    """A folder of arrays computed of images, by its key.

    Attributes:
        uri: the folder.
        kind: which of `outputs.KINDS` it is.
        plan: all that its bytes depend on.
        images: by the name of their group; the only group of a cache may be named "".
    """

    uri: str
    kind: str
    plan: dict[str, Any]
    images: Mapping[str, ImageSource]

    @staticmethod
    def below(
        folder: str,
        kind: str,
        images: Mapping[str, ImageSource],
        computed: Mapping[str, Any],
        runtime: RuntimeOptions | None = None,
        batch_size: int | None = None,
    ) -> FeatureCache:
        """Return the cache that lies below a folder under its key; nothing is computed yet.

        Args:
            folder: of many caches.
            kind: which of `outputs.KINDS`.
            images: by the name of their group.
            computed: what is computed of them, with its options and the digests of weights, as plain data.
            runtime, batch_size: where the bits of results depend on device, engine, threads and what shares a batch.
        """
        plan: dict[str, Any] = {
            "tool": __version__,
            "format": FORMAT,
            "kind": kind,
            "images": {name: source.key() for name, source in images.items()},
            "computed": dict(computed),
        }
        if runtime is not None:
            plan |= {"batch_size": batch_size, **runtime.execution.plan, "threads": runtime.cpus_per_worker}
        return FeatureCache(files.join(folder, files.digest_of(plan)[:20]), kind, plan, images)

    @property
    def encoder(self) -> str:
        """Folder inside the cache for a model that is made for it."""
        return files.join(self.uri, "encoder")

    def parts(self, group: str = "") -> list[str]:
        """Return the names of the parts of a group, as of its files."""
        return [part_name(part, group) for part in self.images[group].parts()]

    def fill(
        self,
        extractors: Mapping[str, Extractor],
        batch_size: int,
        runtime: RuntimeOptions,
        label: str,
        encoder: Callable[[], Model] | None = None,
        temporary: bool = False,
    ) -> float:
        """Compute the arrays, or those that are missing, or find them computed.

        Args:
            extractors: what is computed of the images of each group.
            batch_size: images at once.
            runtime: actors.
            label: of the progress shown.
            encoder: makes the model that is saved at `encoder` before anything is computed.
            temporary: whether the caller removes the folder, so that nobody need know of it.

        Returns:
            Images per second; 0 if all was there.

        Raises:
            DataError: an image cannot be read, or a result is not finite.
            BusyError: see `outputs.open_cache`.
        """
        with outputs.open_cache(self.uri, self.kind, self.plan) as complete:
            if complete:
                return 0.0
            if encoder is not None and not is_model(self.encoder):
                encoder().save(self.encoder)
            arguments = {
                "cache": self,
                "extractors": dict(extractors),
                "batch_size": batch_size,
                "execution": runtime.execution,
                "threads": runtime.cpus_per_worker,
            }
            tasks = {
                part_name(part, group): {"group": group, "part": part}
                for group, source in self.images.items()
                for part in source.parts()
            }
            count = sum(source.count() for source in self.images.values())
            progress = Progress(label, count)
            records, rate = run_unfinished(CacheWriter, arguments, tasks, self.uri, runtime, progress, count, "rows")
            size = sum(record["bytes"] for record in records.values())
            names = dict.fromkeys(name for record in records.values() for name in record["arrays"])
            if not temporary:
                progress.note(f"{size / 1e6:,.1f} MB kept in {self.uri}")
            rows = sum(record["rows"] for record in records.values())
            outputs.finish(self.uri, {"parts": list(tasks), "names": list(names), "rows": rows, "bytes": size})
            return rate

    def open(self, copies: Path | None = None) -> CachedFeatures:
        """Return what reads the arrays; see `CachedFeatures`."""
        return CachedFeatures(self.uri, copies)


def part_name(part: str, group: str = "") -> str:
    """Return the name of a part of a group in the names of its files."""
    stem = part.removesuffix(".parquet")
    return f"{stem}-{group}" if group else stem


def array_name(part: str, name: str) -> str:
    """Return the name of the file of an array of a part, as `part_name` gives it."""
    return f"{part}-{name}.npy"


# ------------------------------------------------------------------------------------------------------------ writing
class CacheWriter:
    """Writes the arrays of one part of one group. A `PartTask`.

    Memory holds a batch at a time, whatever the size of the part.

    Args:
        cache: where to.
        extractors: what is computed of the images of each group.
        batch_size: images at once.
        execution: how models are run.
        threads: images decoded at the same time, ahead of the network.
    """

    def __init__(
        self,
        cache: FeatureCache,
        extractors: Mapping[str, Extractor],
        batch_size: int,
        execution: Execution,
        threads: int,
    ) -> None:
        self._cache, self._extractors, self._execution = cache, extractors, execution
        self._batch_size, self._threads = batch_size, threads
        self._methods: dict[str, Method] = {}
        self._readers: dict[str, ReadPart] = {}
        self._functions: dict[str, BatchFunction] = {}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write the arrays of a part, then their record."""
        group, part = task["group"], task["part"]
        if group not in self._readers:
            self._readers[group] = self._cache.images[group].open(self._batch_size, self._threads)
            self._functions[group] = self._extractors[group].open(self._load)
        record = self._write(part, part_name(part, group), self._readers[group], self._functions[group])
        outputs.commit_part(self._cache.uri, record["part"], record)
        return record

    @torch.inference_mode()
    def _write(self, part: str, name: str, read: ReadPart, function: BatchFunction) -> dict[str, Any]:
        uri, rows = self._cache.uri, 0
        written: dict[str, _ArrayFile] = {}
        with ExitStack() as stack:
            for samples in read(part, function.policy):
                for key, array in function.compute(ImageBatch(samples, part)).items():
                    if key not in written:
                        handle = stack.enter_context(files.open_atomic(files.join(uri, array_name(name, key))))
                        written[key] = _ArrayFile(handle, array)
                    written[key].append(array)
                rows += len(samples)
            arrays = {key: file.finish() for key, file in written.items()}
        return {"part": name, "rows": rows, "arrays": arrays, "bytes": sum(entry["bytes"] for entry in arrays.values())}

    def _load(self, folder: str) -> Method:
        """Return the method of a model folder, loaded once for all groups."""
        if folder not in self._methods:
            self._methods[folder] = load_model(folder, self._execution).method
        return self._methods[folder]


class _ArrayFile:
    """A .npy file whose rows come one batch after another; their number is known at the end."""

    def __init__(self, handle: IO[bytes], first: np.ndarray) -> None:
        self._handle, self._dtype, self._shape = handle, first.dtype, first.shape[1:]
        self._rows, self._digest = 0, hashlib.sha256()
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        if (array.dtype, array.shape[1:]) != (self._dtype, self._shape):
            raise ValueError(f"rows of {array.dtype} {array.shape[1:]} after rows of {self._dtype} {self._shape}")
        content = _content(array)
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


def _content(array: np.ndarray) -> memoryview | bytes:
    """Return the bytes of an array, without a copy of one that is contiguous."""
    return memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""


# ------------------------------------------------------------------------------------------------------------ reading
class CachedFeatures:
    """The arrays of a cache, memory-mapped. It may be pickled; arrays are opened anew in every process.

    Args:
        uri: the folder of a cache.
        copies: folder on this machine's disk to copy files to that lie on an object store; None takes one of its own.
        parts: names of the parts, in order; None takes those of the finished cache.

    Attributes:
        uri: the folder.
        parts: names of the parts, in order.

    Raises:
        DataError: the cache is not finished.
    """

    def __init__(self, uri: str, copies: Path | None = None, parts: Sequence[str] | None = None) -> None:
        self.uri, self._copies = uri, copies
        self._own_copies = False
        self._records: dict[str, dict[str, Any]] = {}
        self._open: dict[tuple[str, str], np.ndarray] = {}
        self.parts = list(self.manifest()["parts"] if parts is None else parts)

    def manifest(self) -> dict[str, Any]:
        """Return what is known of the whole cache: its parts, the names of its arrays, rows and bytes.

        Raises:
            DataError: the cache is not finished.
        """
        try:
            manifest: dict[str, Any] = files.read_json(files.join(self.uri, MANIFEST))
        except FileNotFoundError as error:
            raise DataError(f"{self.uri} is not finished; run the same command again, it continues") from error
        except ValueError as error:
            raise self._damaged(MANIFEST) from error
        return manifest

    def rows(self, part: str) -> int:
        """Return how many images a part has."""
        return int(self._record(part)["rows"])

    def has(self, part: str, name: str) -> bool:
        """Return whether there is such an array of a part; none is there of a part without images."""
        return name in self._record(part)["arrays"]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a row of an array.

        Raises:
            DataError: no part has it.
        """
        for part in self.parts:
            if self.has(part, name):
                return tuple(self._record(part)["arrays"][name]["shape"][1:])
        raise DataError(f"{self.uri} holds no {name}; remove that folder and run the same command again")

    def array(self, part: str, name: str) -> np.ndarray:
        """Return an array of a part, memory-mapped.

        Raises:
            DataError: there is none, or its file is missing, damaged or another one.
        """
        if (part, name) not in self._open:
            self._open[part, name] = self._checked(part, name)
        return self._open[part, name]

    def arrays(self, name: str, parts: Sequence[str] | None = None) -> list[np.ndarray]:
        """Return an array of every part that has it, in order; `parts` are all unless given."""
        return [self.array(part, name) for part in (self.parts if parts is None else parts) if self.has(part, name)]

    def row(self, name: str, part: int, row: int) -> np.ndarray:
        """Return one row of an array, by the number of its part."""
        return self.array(self.parts[part], name)[row]

    def _record(self, part: str) -> dict[str, Any]:
        if part not in self._records:
            try:
                record = outputs.part_record(self.uri, part)
            except ValueError as error:
                raise self._damaged(f"_{part}.json") from error
            if record is None or "arrays" not in record:
                raise DataError(f"{self.uri} has no part {part}; remove that folder and run the same command again")
            self._records[part] = record
        return self._records[part]

    def _checked(self, part: str, name: str) -> np.ndarray:
        entry = self._record(part)["arrays"].get(name)
        if entry is None:
            raise DataError(f"{self.uri} holds no {name} of {part}; remove that folder and run the same command again")
        file = array_name(part, name)
        try:
            array = files.map_array(files.join(self.uri, file), self._copies_folder())
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise self._damaged(file) from error
        if (list(array.shape), array.dtype.str) != (entry["shape"], entry["dtype"]):
            raise self._damaged(file)
        if array.nbytes <= CHECKED_BYTES and hashlib.sha256(_content(array)).hexdigest() != entry["sha256"]:
            raise self._damaged(file)
        return array

    def _copies_folder(self) -> Path:
        if self._copies is not None:
            return self._copies
        if files.is_local(self.uri):
            return Path()  # of which no use is made
        self._copies, self._own_copies = Path(mkdtemp(prefix="unianom-features-")), True
        weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return self._copies

    def _damaged(self, file: str) -> DataError:
        path = files.join(self.uri, file)
        return DataError(
            f"{path} is missing, damaged or another one than was written; remove the folder {self.uri} and run the "
            f"same command again, which computes it anew"
        )

    def __getstate__(self) -> dict[str, Any]:
        copies = None if self._own_copies else self._copies
        return {**self.__dict__, "_open": {}, "_copies": copies, "_own_copies": False}


class JoinedRows:
    """The rows of several arrays, one after another, by number; memory-mapped arrays stay on disk.

    Args:
        arrays: of the same type and shape but for their number of rows; one with a row at least.

    Attributes:
        rows: number of all rows.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [array for array in arrays if len(array)]
        self._starts = np.cumsum([0, *(len(array) for array in self._arrays)])
        self.rows = int(self._starts[-1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return rows, in the order of `indices`."""
        first = self._arrays[0]
        taken = np.empty((len(indices), *first.shape[1:]), first.dtype)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers):
            inside = numbers == number
            taken[inside] = self._arrays[number][indices[inside] - self._starts[number]]
        return taken

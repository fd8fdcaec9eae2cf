"""The cache of what a frozen network computes of images, for training, memory banks, calibration, tuning and protocols.

    shards or validation images ─▶ ranges: decode, run the network ─▶ <part>-<array>.npy ─▶ memory-mapped by readers

A cache is a folder named by the digest of its plan, that is of all that its bytes depend on, so that runs share it. A
part of it is of one range of images; it is written part by part and continued where it was left. Any of these folders
may be removed while no job runs; a later run computes it again.
"""

from __future__ import annotations

import hashlib
import shutil
import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from pipelines.data.cache_writer import CacheWriter, array_content, array_name, part_name, range_task
from pipelines.data.extractors import Extractor
from pipelines.data.image_source import ImageSource
from pipelines.data.staged_cache_writer import caching_stages
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_unfinished
from unianom import __version__, files
from unianom.data.shards import MANIFEST
from unianom.errors import DataError
from unianom.model import Model, is_model

FORMAT = 3
"""Version of the files of a cache; caches of another one have another key."""

CHECKED_BYTES = 8 << 20
"""Size of an array up to which its checksum is compared when it is opened. The shapes and types of all are."""


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
            shared: dict[str, Any] = {
                "uri": self.uri,
                "images": self.images,
                "extractors": dict(extractors),
                "batch_size": batch_size,
                "execution": runtime.execution,
            }
            ranges = {group: source.ranges() for group, source in self.images.items()}
            tasks = {
                part_name(within, group): range_task(within, group) for group, own in ranges.items() for within in own
            }
            count = sum(source.count() for source in self.images.values())
            progress = Progress(label, count)
            records, rate = run_unfinished(
                CacheWriter,
                {**shared, "threads": runtime.cpus_per_worker},
                tasks,
                self.uri,
                runtime,
                progress,
                count,
                "rows",
                partial(caching_stages, **shared),
            )
            size = sum(record["bytes"] for record in records.values())
            names = dict.fromkeys(name for record in records.values() for name in record["arrays"])
            if not temporary:
                progress.note(f"{size / 1e6:,.1f} MB kept in {self.uri}")
            rows = sum(record["rows"] for record in records.values())
            parts = {
                group: {name: records[name]["rows"] for name in (part_name(within, group) for within in own)}
                for group, own in ranges.items()
            }
            outputs.finish(self.uri, {"parts": parts, "names": list(names), "rows": rows, "bytes": size})
            return rate

    def open(self, copies: Path | None = None) -> CachedFeatures:
        """Return what reads the arrays; see `CachedFeatures`."""
        return CachedFeatures(self.uri, copies)


# ------------------------------------------------------------------------------------------------------------ reading
class CachedFeatures:
    """The arrays of a cache, memory-mapped. It may be pickled; arrays are opened anew in every process.

    Args:
        uri: the folder of a cache.
        copies: folder on this machine's disk to copy files to that lie on an object store; None takes one of its own.
        parts: names of the parts, in order; None takes those of the finished cache.

    Attributes:
        uri: the folder.
        parts: names of the parts, in order; each is of one range of images.

    Raises:
        DataError: the cache is not finished.
    """

    def __init__(self, uri: str, copies: Path | None = None, parts: Sequence[str] | None = None) -> None:
        self.uri, self._copies = uri, copies
        self._own_copies = False
        self._records: dict[str, dict[str, Any]] = {}
        self._open: dict[tuple[str, str], np.ndarray] = {}
        # rows of the parts by group, so that finding an image reads no record
        self._groups: dict[str, dict[str, int]] = self.manifest()["parts"] if parts is None else {}
        self.parts = [name for group in self._groups.values() for name in group] if parts is None else list(parts)

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

    def parts_of(self, group: str) -> list[str]:
        """Return the names of the parts of a group of a finished cache, in order."""
        return list(self._groups[group])

    def rows(self, part: str) -> int:
        """Return how many images a part has."""
        known = next((group[part] for group in self._groups.values() if part in group), None)
        return int(self._record(part)["rows"]) if known is None else known

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

    def row(self, name: str, number: int) -> np.ndarray:
        """Return the row of an array that belongs to an image, by its number among those of all parts."""
        part = bisect_right(self._starts, number) - 1
        return self.array(self.parts[part], name)[number - self._starts[part]]

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first image of each part, and of the one after all."""
        return list(accumulate((self.rows(part) for part in self.parts), initial=0))

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
        if array.nbytes <= CHECKED_BYTES and hashlib.sha256(array_content(array)).hexdigest() != entry["sha256"]:
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

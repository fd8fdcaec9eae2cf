"""How fast files are read where images lie, and written where scores go."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unianom import files

AT_ONCE = 16
"""Files that are read at the same time, as a worker fetches listed images."""

CHUNK = 8 << 20
"""Bytes that are read or written at once."""

MOST_BYTES = 1 << 30
"""Bytes that are read in a round, about."""

WRITTEN_BYTES = 64 << 20

FEW_BYTES, FEW_FILES = 64 << 20, 500
"""Bytes and files below which, both, a rate of reading says nothing."""


@dataclass(frozen=True)
class DiskRates:
    """What a disk, or a store, does.

    Attributes:
        read: bytes per second, median of the rounds.
        write: bytes per second, until they are on the disk.
        read_bytes: that were read in a round.
        read_files: in a round.
        cached: whether the files may have come from memory instead.
    """

    read: float
    write: float
    read_bytes: int
    read_files: int
    cached: bool

    @property
    def enough(self) -> bool:
        """Whether enough was read for a rate that means something."""
        return self.read_bytes >= FEW_BYTES or self.read_files >= FEW_FILES


def disk_rates(stored: Sequence[str], folder: str, rounds: int) -> DiskRates:
    """Read the files that hold images, and write a file.

    What the operating system keeps of local files in memory is dropped before, where it can be told so.

    Args:
        stored: paths or URIs.
        folder: local, on the disk that is written to.
        rounds: how often.
    """
    reads, writes = [], []
    chunk = os.urandom(CHUNK)  # which no file system packs
    total, cached = 0, False
    for _ in range(rounds):
        local = [files.resolve(uri)[1] for uri in stored if files.is_local(uri)]
        cached = not all([_dropped(path) for path in local if Path(path).exists()])
        start = time.perf_counter()
        total = _read(stored)
        reads.append(total / (time.perf_counter() - start))
        start = time.perf_counter()
        _write(Path(folder) / "written", chunk)
        writes.append(WRITTEN_BYTES / (time.perf_counter() - start))
    return DiskRates(statistics.median(reads), statistics.median(writes), total, len(stored), cached)


def _read(stored: Sequence[str]) -> int:
    """Read files, at most about `MOST_BYTES` of them; return how many bytes."""
    share = max(CHUNK, MOST_BYTES // len(stored))

    def read(uri: str) -> int:
        taken = 0
        # one that is not there is counted among the images that cannot be read
        with suppress(FileNotFoundError), files.open_for_reading(uri) as handle:
            while taken < share and (chunk := handle.read(CHUNK)):
                taken += len(chunk)
        return taken

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(read, stored))


def _write(path: Path, chunk: bytes) -> None:
    with path.open("wb") as handle:
        for _ in range(WRITTEN_BYTES // CHUNK):
            handle.write(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    path.unlink()


def _dropped(path: str) -> bool:
    """Have the operating system forget what it keeps of a file in memory; return whether it could be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on the disk yet is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True

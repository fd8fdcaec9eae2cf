"""One process at a time: a small file that says who is at work, on disks and on object stores.

On disks the kernel holds the lock (flock), which falls with the process, however it ends. What the kernel does not
see, another machine on a shared disk and an object store, is told by signs of life that the holder leaves every
`HEARTBEAT` seconds; after `PATIENCE` seconds without one it is taken for dead.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from unianom import files
from unianom.errors import DataError

try:
    import fcntl
except ImportError:  # not on Windows, where signs of life must do
    fcntl = None  # type: ignore[assignment]

HEARTBEAT = 20.0
PATIENCE = 180.0
SETTLE = 1.0
"""Seconds after which of two processes that take over a dead one's lock on an object store both see who was last."""
POLL = 2.0
"""Seconds between two looks at a lock that is waited for."""


class BusyError(DataError):
    """Another process is at work there."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of its machine.
        process: its number there.
        since: when it began, in UTC.
        boot: identifies the running kernel of that machine.
        namespace: identifies the process numbers of its container.
        started: when the process started, in the kernel's clock ticks, so that its number is not taken for another's.
        token: this holding of the lock, different each time.
        seen: last sign of life, in seconds since 1970.
    """

    host: str
    process: int
    since: str
    boot: str
    namespace: str
    started: str
    token: str
    seen: float

    @staticmethod
    def this_process() -> Holder:
        """Describe this process, with a new token."""
        return Holder(
            host=platform.node(),
            process=os.getpid(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            boot=_boot(),
            namespace=_namespace(),
            started=_started(os.getpid()) or "",
            token=uuid.uuid4().hex,
            seen=time.time(),
        )

    @staticmethod
    def parse(content: bytes) -> Holder | None:
        """Read what a lock file holds; None of one that was just made, or that no lock wrote."""
        try:
            return Holder(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def content(self) -> bytes:
        """Return what the lock file holds."""
        return files.json_bytes(asdict(self))

    def is_dead(self, seen: float) -> bool:
        """Return whether its process is gone, for certain on this machine, else by its last sign of life."""
        if (self.boot, self.namespace) == (_boot(), _namespace()):
            return _started(self.process) != self.started
        return time.time() - seen > PATIENCE

    def sentence(self, what: str) -> str:
        """Say that it is at work on something."""
        where = f"process {self.process} on {self.host} has been at work on {what} since {self.since}"
        if (self.boot, self.namespace) == (_boot(), _namespace()):
            return f"{where}; wait for it to end, stop it, or choose another output"
        return (
            f"{where}; wait for it to end, or, if it is dead, run the same command again in {PATIENCE / 60:g} minutes"
        )


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else platform.node()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """Return when a process of this machine started; None if there is none of that number."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] in ("Z", "X") else fields[19]


# -------------------------------------------------------------------------------------------------- the two kinds of it
class _Lock(Protocol):
    def beat(self) -> bool:
        """Leave a sign of life; False if the lock was taken over."""

    def release(self) -> None:
        """Remove the file."""


class _LocalLock:
    def __init__(self, path: str, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    @classmethod
    def take(cls, path: str) -> _LocalLock | Holder:
        """Take the lock, or return who holds it."""
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        end = time.monotonic() + SETTLE
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                sure, held = _flock(descriptor)
                content = os.pread(descriptor, 1 << 16, 0)
                before = Holder.parse(content)
                if held:
                    if before is None and time.monotonic() < end:
                        time.sleep(0.01)  # its holder just took it, and is about to write who it is
                        continue
                    return before or _unknown()
                if not _names(path, descriptor):
                    continue  # its holder just removed it
                if before is None and content:
                    raise DataError(f"{path} is no lock that a job wrote; choose another output, or move that file")
                if before is not None:
                    gone_with_kernel = sure and before.boot == _boot()
                    if not gone_with_kernel and not before.is_dead(os.fstat(descriptor).st_mtime):
                        return before
                    _say_taking_over(before, path)
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, Holder.this_process().content(), 0)
                except OSError as error:  # a full disk, of which the error tells no name
                    error.filename = error.filename or path
                    with suppress(OSError):
                        os.remove(path)  # noqa: PTH107
                    raise
                taken, descriptor = cls(path, descriptor), -1
                return taken
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def beat(self) -> bool:
        os.utime(self._descriptor)
        return _names(self._path, self._descriptor)

    def release(self) -> None:
        if _names(self._path, self._descriptor):
            with suppress(FileNotFoundError):
                os.remove(self._path)  # noqa: PTH107
        os.close(self._descriptor)


def _flock(descriptor: int) -> tuple[bool, bool]:
    """Ask the kernel for a file; whether it knows such locks here, and whether another process holds it."""
    if fcntl is None:
        return False, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, True
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            return False, False
        raise
    return True, False


def _names(path: str, descriptor: int) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _unknown() -> Holder:
    """Return a holder that has not written yet who it is."""
    return Holder("this machine", 0, "just now", _boot(), _namespace(), "", "", time.time())


class _StoreLock:
    def __init__(self, uri: str, holder: Holder) -> None:
        self._uri, self._holder = uri, holder

    @classmethod
    def take(cls, uri: str) -> _StoreLock | Holder:
        """Take the lock, or return who holds it."""
        own = Holder.this_process()
        before = _read(uri)
        if before is not None and not before.is_dead(before.seen):
            return before
        if before is not None:
            _say_taking_over(before, uri)
            files.write_bytes(uri, own.content())
            time.sleep(SETTLE)
        else:
            _create(uri, own.content())
        last = _read(uri)  # not what the store said: it may have written, and its answer been lost
        return cls(uri, own) if last is not None and last.token == own.token else (last or _unknown())

    def beat(self) -> bool:
        last = _read(self._uri)
        if last is None or last.token != self._holder.token:
            return False
        files.write_bytes(self._uri, Holder(**{**asdict(self._holder), "seen": time.time()}).content())
        return True

    def release(self) -> None:
        last = _read(self._uri)
        if last is not None and last.token == self._holder.token:
            files.remove(self._uri)


def _read(uri: str) -> Holder | None:
    if not files.exists(uri):
        return None
    with suppress(FileNotFoundError):
        return Holder.parse(files.read_bytes(uri))
    return None


def _create(uri: str, content: bytes) -> None:
    """Write a file unless it is there already, where the store can tell."""
    fs, path = files.resolve(uri)
    try:
        with suppress(FileExistsError):
            fs.pipe_file(path, content, mode="create")
    except (TypeError, NotImplementedError, ValueError):  # a store without conditional writes
        files.write_bytes(uri, content)
        time.sleep(SETTLE)


def _say_taking_over(before: Holder, uri: str) -> None:
    print(f"process {before.process} on {before.host} left {uri} behind and is gone; going on", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------- holding a lock
_guard = threading.Lock()
_held: dict[str, _Lock | None] = {}
_heart: list[threading.Thread] = []


def _beat_for_ever() -> None:
    while True:
        time.sleep(HEARTBEAT)
        with _guard:
            locks = list(_held.items())
        for uri, lock in locks:
            # a store that does not answer now may do so next time; a lost lock is not fought for
            with suppress(Exception):
                if lock is not None and not lock.beat():
                    print(f"another process took {uri} over; this one seemed dead to it", file=sys.stderr)
                    with _guard:
                        _held[uri] = None


@contextmanager
def exclusive(uri: str, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock for the length of the block. One that this process holds already is not taken again.

    Args:
        uri: of the lock's file, which is there as long as the lock is held.
        what: it protects, in words.
        wait: wait until it is free.

    Raises:
        BusyError: another process holds it and `wait` is not set; says which, and since when.
    """
    uri = files.full_uri(uri)
    with _guard:
        nested = uri in _held
        if not nested:
            _held[uri] = None
    if nested:
        yield
        return
    lock: _Lock | None = None
    try:
        lock = _take(uri, what, wait)
        with _guard:
            _held[uri] = lock
            if not _heart:
                _heart.append(threading.Thread(target=_beat_for_ever, daemon=True))
                _heart[0].start()
        yield
    finally:
        with _guard:
            _held.pop(uri)
        if lock is not None:
            lock.release()


def _take(uri: str, what: str, wait: bool) -> _Lock:
    kind: Any = _LocalLock if files.is_local(uri) else _StoreLock
    announced = False
    while True:
        taken = kind.take(uri)
        if not isinstance(taken, Holder):
            lock: _Lock = taken
            return lock
        if not wait:
            raise BusyError(taken.sentence(what))
        if not announced:
            print(f"waiting for process {taken.process} on {taken.host}, which is making {what}", file=sys.stderr)
            announced = True
        time.sleep(POLL)

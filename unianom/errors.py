"""Errors meant for the user: one sentence that says what, where and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile


class UnianomError(Exception):
    """Base of every error that a user can cause and mend. Jobs print it without a traceback."""


class OptionError(UnianomError):
    """An option has a wrong value or does not fit the others."""


class EngineError(OptionError):
    """An engine cannot compute a method's encoder, or not as PyTorch does."""


class DataError(UnianomError):
    """A data source, shard set or score set is missing, unfinished or not what it claims to be."""


class WeightsError(UnianomError):
    """Backbone weights are missing or do not fit the backbone."""


class ModelError(UnianomError):
    """A model folder cannot be read, is damaged or does not fit this version."""


class MachineError(UnianomError):
    """A machine failed: a disk is full, a store cannot be reached or refuses, a worker was lost. No fault of options or
    data; the same command continues once it is mended."""


class ImageError(UnianomError):
    """One image cannot be used.

    Attributes:
        status: one of `unianom.data.schema.STATUSES` except "ok"; what the row of this image will carry.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Return both arguments, so that the error survives the way from a worker to the driver."""
        return type(self), (self.status, str(self))


class NotAFileError(OSError):
    """What lies there is a named pipe, a socket or a device: opening it might wait for ever."""


def image_error(uri: str | os.PathLike[str], error: OSError) -> ImageError | None:
    """Return what an error in reading an image's file says of this one image; None if it says nothing of it, as when a
    connection was lost."""
    name = os.fspath(uri)
    if isinstance(error, NotAFileError):
        return ImageError("unsupported", f"{error.strerror}: {name}")
    if isinstance(error, IsADirectoryError):
        return ImageError("unsupported", f"a folder, not an image file: {name}")
    if error.errno == errno.ELOOP:
        return ImageError("missing", f"a link that leads back to itself: {name}")
    if error.errno == errno.ENAMETOOLONG:
        return ImageError("missing", f"no such file, its name is longer than the file system takes: {name}")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if os.path.islink(name):  # noqa: PTH114
            return ImageError("missing", f"no such file: {name} is a link to {os.readlink(name)}")  # noqa: PTH115
        return ImageError("missing", f"no such file: {name}")
    if isinstance(error, PermissionError):
        return ImageError("missing", f"no permission to read {name}")
    return None


_OF_ONE_PLACE = frozenset(
    number
    for name in (
        *("EIO", "ENXIO", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "ESTALE", "ENOTCONN", "ETIMEDOUT"),
        *("EHOSTDOWN", "EHOSTUNREACH", "EMFILE", "ENFILE", "EFBIG", "EREMOTEIO", "ENODEV"),
    )
    if (number := getattr(errno, name, None)) is not None
)
"""Errors that name a place which cannot be used, whatever the program does."""


def storage_error(error: BaseException) -> MachineError | None:
    """Return what the user should know of an error that a disk or an object store raised.

    Args:
        error: an OSError with the file or URI it is about as `filename`, where whoever raised it knew that.

    Returns:
        The error for the user; None if this is none of a disk or store, or one that a mistake in the program may have
        caused, such as a file that is not there.
    """
    if not isinstance(error, OSError):
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            f"the disk is full{f' at {where}' if where else _full_disks()}; free space and run the same command "
            f"again, it continues"
        )
    if not where:
        return None
    if "://" in where:
        return MachineError(f"{where}: {error.strerror}")
    if isinstance(error, NotAFileError):
        return MachineError(f"{where} is {error.strerror}")
    if isinstance(error, PermissionError):
        return MachineError(f"no permission to read or write {where}; mend its permissions, or name another place")
    if error.errno in _OF_ONE_PLACE:
        return MachineError(f"cannot read or write {where}: {error.strerror}; mend that, or name another place")
    return None


def _full_disks() -> str:
    """Name those places without space that programs write to unasked, in brackets after a blank; empty if none."""
    full = []
    for place in dict.fromkeys((tempfile.gettempdir(), os.getcwd(), "/dev/shm")):  # noqa: PTH109
        try:
            if shutil.disk_usage(place).free < 1 << 20:
                full.append(place)
        except OSError:
            continue
    return f" (no space is left in {' and '.join(full)})" if full else ""

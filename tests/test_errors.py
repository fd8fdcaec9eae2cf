"""Errors on their way between processes, and what becomes of those of disks."""

import errno
import pickle
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from unianom.errors import ImageError, MachineError, NotAFileError, image_error, storage_error


def test_an_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("too_large", "20000 x 20000 pixels")))
    assert (error.status, str(error)) == ("too_large", "20000 x 20000 pixels")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "full", "/a/b"), "the disk is full at /a/b; free space"),
        (OSError(errno.EDQUOT, "full", b"/a/b"), "the disk is full at /a/b; free space"),
        (PermissionError(errno.EACCES, "no", "/a/b"), "no permission to read or write /a/b; mend its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "cannot read or write /a: Read-only file system; mend"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a"), "cannot read or write /a: Not a directory; mend"),
        (NotAFileError(errno.EINVAL, "a socket, not a file", "/a"), "/a is a socket, not a file"),
        (OSError(errno.EIO, "it says no", "s3://b/k"), "s3://b/k: it says no"),
    ],
)
def test_an_error_of_a_disk_or_store_names_the_place(error: OSError, sentence: str) -> None:
    found = storage_error(error)
    assert isinstance(found, MachineError)
    assert str(found).startswith(sentence)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no", "/a"), OSError("odd"), ValueError("odd"), OSError(errno.EIO, "odd")]
)
def test_other_errors_are_none_of_a_disk(error: BaseException) -> None:
    assert storage_error(error) is None


def test_of_a_full_disk_without_a_name_the_full_places_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {tempfile.gettempdir(): 100, str(Path.cwd()): 1 << 30, "/dev/shm": 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    found = str(storage_error(OSError(errno.ENOSPC, "No space left on device")))
    assert found.startswith(f"the disk is full (no space is left in {tempfile.gettempdir()}); free space")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "no"), "missing", "no such file: /x/a.png"),
        (NotADirectoryError(errno.ENOTDIR, "no"), "missing", "no such file: /x/a.png"),
        (IsADirectoryError(errno.EISDIR, "no"), "unsupported", "a folder, not an image file: /x/a.png"),
        (PermissionError(errno.EACCES, "no"), "missing", "no permission to read /x/a.png"),
        (OSError(errno.ELOOP, "no"), "missing", "a link that leads back to itself: /x/a.png"),
        (OSError(errno.ENAMETOOLONG, "no"), "missing", "no such file, its name is longer"),
        (NotAFileError(errno.EINVAL, "a named pipe, not a file"), "unsupported", "a named pipe, not a file: /x/a.png"),
    ],
)
def test_what_an_error_says_of_one_image(error: OSError, status: str, words: str) -> None:
    found = image_error("/x/a.png", error)
    assert found is not None
    assert found.status == status
    assert str(found).startswith(words)


def test_a_lost_connection_says_nothing_of_an_image() -> None:
    assert image_error("s3://b/a.png", ConnectionResetError(errno.ECONNRESET, "reset")) is None

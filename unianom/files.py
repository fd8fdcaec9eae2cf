"""Files on local disks and object stores, named by path or URI, through fsspec.

Every output appears whole or not at all: local files are written beside their name, synced and renamed; for object
stores they are written on this machine's disk and uploaded when they are complete.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import inspect
import io
import json
import os
import posixpath
import re
import stat
import tempfile
import unicodedata
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from unianom.errors import DataError, NotAFileError


def resolve(uri: str | os.PathLike[str]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Split a path or URI into its file system and the path inside it.

    A text without a scheme ("s3://") is a local path, whatever else it holds. Two colons chain file systems after one
    that works on another ("zip://inner.png::s3://bucket/archive.zip", "simplecache::s3://bucket/file"); elsewhere they
    are part of a name, such as that of a time.

    Raises:
        DataError: unknown URI scheme, its fsspec package is not installed, or no bucket of S3 can have such a name.
    """
    text = os.fspath(uri)
    scheme = _SCHEME.match(text)
    if scheme is None:
        fs = fsspec.filesystem("file")
        # a relative name that fsspec would take for a scheme or for somebody's home
        odd = text.startswith(("file:", "local:")) or (text.startswith("~") and os.path.expanduser(text) == text)  # noqa: PTH111
        return fs, fs._strip_protocol(f"./{text}" if odd else text)
    try:
        if text.startswith(("s3://", "s3a://")) and not is_chained(text):
            from unianom.s3 import PatientS3

            path = str(PatientS3._strip_protocol(text.replace("::", "\0")))  # as below
            bucket = path.partition("/")[0]
            if not _BUCKET.fullmatch(bucket):
                raise DataError(f"{text}: no bucket can have the name {bucket!r}; mend it")
            return PatientS3(), path.replace("\0", "::")
        if "::" in text and not is_chained(text):
            cls = fsspec.get_filesystem_class(scheme[1])
            path = cls._strip_protocol(text.replace("::", "\0"))  # some would leave out what follows two colons
            return cls(**cls._get_kwargs_from_urls(text)), path.replace("\0", "::")
        return url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"cannot open {text}: no file system for '{scheme[1]}://' is installed ({error}); "
            f"install its fsspec package (s3fs, gcsfs, adlfs …)"
        ) from error


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(://|(::[a-z0-9+.\-]+)*::[a-z0-9+.\-]+://)")


_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}|arn:.*")


def is_chained(uri: str | os.PathLike[str]) -> bool:
    """Return whether a URI chains file systems, as fsspec does by two colons."""
    text = os.fspath(uri)
    scheme = _SCHEME.match(text)
    if scheme is None or "::" not in text:
        return False
    if scheme[2] != "://":
        return True
    try:
        outer = fsspec.get_filesystem_class(scheme[1])
    except (ValueError, ImportError):
        return False
    # those that work on another file system say so by the arguments they are made with
    return bool({"fo", "target_protocol"} & set(inspect.signature(outer.__init__).parameters))


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Return whether `uri` lies on this machine's file system."""
    return isinstance(resolve(uri)[0], LocalFileSystem)


def full_uri(uri: str | os.PathLike[str]) -> str:
    """Return the same place named absolutely, so that a process with another working directory finds it."""
    fs, path = resolve(uri)
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """Return the path or URI of something below `uri`."""
    text = os.fspath(uri)
    return posixpath.join(text if text.endswith("://") else text.rstrip("/") or "/", *parts)


def exists(uri: str | os.PathLike[str]) -> bool:
    """Return whether a file or folder is there."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def beside(uri: str | os.PathLike[str], name: str) -> str:
    """Return the path or URI of `name` in the folder that a file or folder lies in."""
    return join(full_uri(uri).rstrip("/").rpartition("/")[0], name)


def list_names(uri: str | os.PathLike[str]) -> list[str]:
    """Return sorted names of what lies directly in a folder; empty if the folder does not exist."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    if not fs.isdir(path):
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(path, detail=False))


def iter_infos(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[dict[str, Any]]:
    """Yield what a file system says of all that lies directly in a folder; of this machine's disk and of S3, whose
    folders may hold millions, without holding all of it.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    if isinstance(fs, LocalFileSystem) and fs.isdir(path):
        with os.scandir(path) as found:
            for entry in found:
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    yield fs.info(entry)
    elif hasattr(fs, "iter_dir"):
        yield from fs.iter_dir(path)
    else:
        yield from fs.ls(path, detail=True)


def list_files(uri: str | os.PathLike[str]) -> list[str]:
    """Return sorted paths, relative to a folder, of all files below it; links are not followed, but listed
    themselves."""
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return sorted(_walk(path))
    fs.invalidate_cache()
    root = path.rstrip("/") + "/"
    return sorted(name.removeprefix(root) for name in fs.find(path) if name.startswith(root))


def _walk(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        for name in [*names, *links]:
            yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118


def is_file(uri: str | os.PathLike[str]) -> bool:
    """Return whether a file, and no folder, is there."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    return bool(fs.isfile(path))


def is_folder(uri: str | os.PathLike[str]) -> bool:
    """Return whether a folder is there."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    return bool(fs.isdir(path))


def lies_within(inner: str | os.PathLike[str], outer: str | os.PathLike[str]) -> bool:
    """Return whether a place is another one or lies below it, whatever links lead there."""
    (fs, path), (other_fs, other) = resolve(inner), resolve(outer)
    if isinstance(fs, LocalFileSystem) and isinstance(other_fs, LocalFileSystem):
        folder, real = Path(os.path.realpath(path)), Path(os.path.realpath(other))
        # by identity as well: letters of another case, and places mounted twice
        return any(
            place == real or (place.exists() and real.exists() and place.samefile(real))
            for place in (folder, *folder.parents)
        )
    one, two = fs.unstrip_protocol(path).rstrip("/"), other_fs.unstrip_protocol(other).rstrip("/")
    return one == two or one.startswith(two + "/")


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths or URIs name one place, whatever links lead there."""
    return lies_within(one, other) and lies_within(other, one)


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        NotAFileError: it is a named pipe, a socket or a device.
    """
    fs, path = resolve(uri)
    check_regular(fs, path)
    return bytes(fs.cat_file(path))


def composed_otherwise(uri: str | os.PathLike[str]) -> str | None:
    """Return the path or URI of the file or folder whose name is the same text with its accents composed otherwise
    (Unicode NFC and NFD, which differ between macOS and other systems); None if there is none."""
    fs, path = resolve(uri)
    if path.isascii():
        return None
    reached = path
    missing: list[str] = []
    while reached and not fs.exists(reached):
        reached, _, name = reached.rpartition("/")
        missing.append(name)
    for name in reversed(missing):
        wanted = unicodedata.normalize("NFC", name)
        names = (posixpath.basename(each.rstrip("/")) for each in fs.ls(reached or "/", detail=False))
        found = next((each for each in sorted(names) if unicodedata.normalize("NFC", each) == wanted), None)
        if found is None:
            return None
        reached = f"{reached}/{found}"
    return reached if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(reached))


def check_regular(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Refuse what is on this machine's disk and neither file nor folder, before it is opened.

    Raises:
        NotAFileError: a named pipe, a socket or a device.
        FileNotFoundError: nothing is there, or no file can have such a name.
        OSError: a link that leads back to itself, a name that is too long, …
    """
    if not isinstance(fs, LocalFileSystem):
        return
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, f"no file can have this name ({error})", path) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise NotAFileError(errno.EINVAL, f"a {kind}, not a file", path)


@contextmanager
def open_for_reading(uri: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file to read pieces of it.

    Raises:
        FileNotFoundError, NotAFileError: as `read_bytes`.
    """
    fs, path = resolve(uri)
    check_regular(fs, path)
    with fs.open(path, "rb") as handle:
        yield handle


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Return the parsed content of a JSON file.

    Raises:
        FileNotFoundError, NotAFileError: as `read_bytes`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_bytes(uri))


def parse_json(content: bytes) -> Any:
    """Return the parsed content of a JSON file.

    Raises:
        ValueError: it holds no JSON, or brackets so deep within each other that no job can have written it.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("its brackets lie too deep within each other") from error


@contextmanager
def open_atomic(uri: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when the block ends without an error."""
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # noqa: PTH103, PTH120
        beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(beside, "wb") as handle:  # noqa: PTH123
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)  # noqa: PTH105
        except BaseException as error:
            _name_full_disk(error, path)
            if os.path.exists(beside):  # noqa: PTH110
                os.remove(beside)  # noqa: PTH107
            raise
        return
    with tempfile.NamedTemporaryFile() as held:
        try:
            yield held  # type: ignore[misc]
            held.flush()
        except OSError as error:
            _name_full_disk(error, held.name)
            raise
        fs.put_file(held.name, path)


def _name_full_disk(error: BaseException, path: str) -> None:
    """Let an error of a full disk, which tells no name when it comes of writing to an open file, say which disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
        error.filename = path


def write_bytes(uri: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all."""
    with open_atomic(uri) as handle:
        handle.write(content)


def write_json(uri: str | os.PathLike[str], content: Any) -> None:
    """Write JSON whole or not at all; keys keep their order, so equal content gives equal bytes."""
    write_bytes(uri, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return what `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def csv_bytes(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> bytes:
    """Return rows as a CSV file; the columns are by default the keys of the rows, in the order they first come."""
    text = io.StringIO()
    names = columns or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_array(uri: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    with open_atomic(uri) as handle:
        np.save(handle, array, allow_pickle=False)


def read_array(uri: str | os.PathLike[str]) -> np.ndarray:
    """Return a .npy file in memory."""
    return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)


def map_array(uri: str, copies: Path) -> np.ndarray:
    """Return a .npy file, memory-mapped; one on an object store is fetched to the local folder `copies` first, once."""
    if not is_local(uri):
        copy = copies / f"{sha256_of(uri.encode())[:16]}.npy"
        if not copy.exists():
            write_bytes(copy, read_bytes(uri))
        uri = str(copy)
    return np.load(uri, mmap_mode="r", allow_pickle=False)


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file or a whole folder if it is there."""
    fs, path = resolve(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def is_plain_name(name: Any) -> bool:
    """Return whether something read from a JSON file names one file directly inside a folder, and so none elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def safe_name(name: str, taken: Collection[str] = ()) -> str:
    """Return a file or folder name for a name that comes from data, such as a category.

    A harmless name stays as it is. Any other is cleaned (separators, leading dots and underscores, characters that
    file systems or URIs take for something else, more than 100 bytes) and told apart by a digest of the whole name, so
    two names never share a file and none leaves its folder.

    Args:
        name: any text.
        taken: names of other files of that folder, which nothing else may have, in lower case.
    """
    cleaned = re.sub(r"[^\w.\- ]", "_", unicodedata.normalize("NFC", name)).lstrip("._- ").rstrip(". ")
    shortened = cleaned.encode()[:_LONGEST_NAME].decode(errors="ignore")
    if name and shortened == name and not _DIGEST_ENDING.search(name) and name.lower() not in taken:
        return name
    return f"{shortened or 'unnamed'}-{sha256_of(name.encode(errors='surrogatepass'))[:8]}"


_LONGEST_NAME = 100
_DIGEST_ENDING = re.compile(r"-[0-9a-f]{8}$")


def remove_file(folder: str, name: str) -> None:
    """Remove a file below a folder, a link as such, and then the folders between them that it leaves empty."""
    fs, path = resolve(join(folder, name))
    if not isinstance(fs, LocalFileSystem):
        remove(join(folder, name))
        return
    with suppress(FileNotFoundError):
        os.remove(path)  # noqa: PTH107
    for parent in list(PurePosixPath(name).parents)[:-1]:
        try:
            os.rmdir(resolve(join(folder, str(parent)))[1])  # noqa: PTH106
        except OSError:
            return  # it holds something else


_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{8}\.tmp$")


def is_half_written(name: str) -> bool:
    """Return whether a name is one that `open_atomic` gives to a file until it is whole."""
    return _HALF_WRITTEN.search(name) is not None


def sha256_of(content: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(uri: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_for_reading(uri) as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digest_of(content: Any) -> str:
    """Return the hexadecimal SHA-256 of anything JSON can hold, independent of the order of keys.

    Values that compare equal have one digest: 4 and 4.0, which YAML and Python write for the same option.
    """
    return sha256_of(json.dumps(_one_form(content), sort_keys=True, separators=(",", ":")).encode())


def _one_form(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _one_form(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_one_form(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    return content

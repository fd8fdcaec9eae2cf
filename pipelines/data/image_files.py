"""Files of images, wherever they lie, and how many of them are fetched at a time."""

from __future__ import annotations

import time

from unianom import files
from unianom.errors import DataError, image_error, storage_error

AT_ONCE = 16
"""Images whose files a worker fetches at the same time; on object stores that is waiting."""

AHEAD = 2 * AT_ONCE
"""Images whose files are being fetched or wait, at most."""

AHEAD_BYTES = 256 << 20
"""Beyond this size of the files that are being fetched or wait no other is taken; a size that a listing does not tell
counts as nothing."""


def read_image_file(uri: str, tries: int = 3) -> bytes:
    """Return the bytes of an image file; what may pass (a lost connection) is tried again.

    Raises:
        ImageError: the file is not there, is no file but a folder or a named pipe, or may not be read.
        DataError, MachineError: the store cannot be read.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return files.read_bytes(uri)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                otherwise = files.composed_otherwise(uri)  # the name may come from a list made on another system
                if otherwise is not None and otherwise != uri and attempt < tries:
                    uri = otherwise
                    continue
            if not files.is_local(uri):
                if (known := storage_error(error)) is not None:
                    raise known from error  # S3 has been asked again and again by then
                if isinstance(error, PermissionError):
                    # a store answers so when credentials expire, which is no fault of the image
                    raise DataError(f"no permission to read {uri}; renew the credentials and run again") from error
            if (fault := image_error(uri, error)) is not None:
                raise fault from error
            if attempt == tries:
                raise DataError(f"cannot read {uri}: {error}; run the same command again, it continues") from error
            time.sleep(2.0**attempt)

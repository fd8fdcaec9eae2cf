"""S3 that names the bucket in every error, says when it waits, and does not wait for ever.

Credentials, region and endpoint are those that AWS's own tools take from the environment and their files; what a user
set in fsspec's configuration for "s3" comes before the defaults here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import time
from typing import Any, NoReturn

from botocore import exceptions as boto
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

logger = logging.getLogger(__name__)

GIVE_UP = 60.0
"""Seconds after which a request that the store answers with an error of its own, or whose connection fails, is not
made again. One that is never answered is made `S3FileSystem.retries` times, each with the time-outs below."""

TELL = 10.0
"""Seconds after which a request without an answer is worth a line."""

PAUSE = 0.2
"""Seconds before a request is made again, doubled each time up to 5."""

_told: set[str] = set()


class StoreTimeoutError(OSError):
    """A store that did not answer. No TimeoutError, which S3FileSystem would take for a reason to begin anew."""


class PatientS3(S3FileSystem):
    """See the module. Errors are OSErrors with the URI as `filename` and what to do in `strerror`."""

    connect_timeout = 10
    read_timeout = 15

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._prepare_config_kwargs()
        if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & set(os.environ):
            # tries are made here and in S3FileSystem, and those of three layers multiply
            config.setdefault("retries", {"total_max_attempts": 1})
        return config

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        uri = "s3://" + "/".join(str(kwargs[key]) for key in ("Bucket", "Key", "Prefix") if kwargs.get(key))
        telling = asyncio.get_running_loop().call_later(TELL, self._tell, kwargs.get("Bucket") or "")
        end, pause = time.monotonic() + GIVE_UP, PAUSE
        try:
            while True:
                try:
                    return await super()._call_s3(method, *akwarglist, **kwargs)
                except (OSError, boto.BotoCoreError) as error:
                    if not _may_pass(error) or time.monotonic() + pause > end:
                        self._raise_named(error, uri)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)
        finally:
            telling.cancel()

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        try:
            return bytes(await super()._cat_file(path, *args, **kwargs))
        except (OSError, *S3_RETRYABLE_ERRORS) as error:  # what breaks off in the middle of an answer
            if getattr(error, "filename", None):
                raise
            self._raise_named(error, f"s3://{path}")

    @property
    def _endpoint(self) -> str:
        meta = getattr(self._s3, "meta", None)
        return _without_user(str(getattr(meta, "endpoint_url", None) or "its endpoint"))

    def _tell(self, bucket: str) -> None:
        if bucket not in _told:
            _told.add(bucket)
            logger.warning("waiting for s3://%s: no answer from %s so far, trying on", bucket, self._endpoint)

    def _raise_named(self, error: BaseException, uri: str) -> NoReturn:
        """Raise the error as an OSError of the same class, if it was one, that names the URI and what to do."""
        code = _code(error)
        bucket = "/".join(uri.split("/")[:3])
        keys = "give credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
        if code == "NoSuchBucket":
            raise FileNotFoundError(
                errno.ENOENT, f"there is no such bucket at {self._endpoint}; mend its name, or make it", bucket
            ) from error
        if isinstance(error, FileNotFoundError | FileExistsError | boto.ParamValidationError):
            raise error  # S3FileSystem knows what to make of these
        if isinstance(error, PermissionError):
            raise PermissionError(
                errno.EACCES, f"access is denied ({code or error}); {keys} that may read or write there", uri
            ) from error
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            raise PermissionError(errno.EACCES, f"no credentials were found ({_words(error)}); {keys}", uri) from error
        if isinstance(error, boto.SSOError | boto.TokenRetrievalError | boto.CredentialRetrievalError):
            raise PermissionError(errno.EACCES, f"the credentials cannot be used ({_words(error)})", uri) from error
        if isinstance(error, boto.ConnectionError | boto.HTTPClientError | TimeoutError):
            raise StoreTimeoutError(
                errno.ETIMEDOUT,
                f"no answer from {self._endpoint} ({_words(error)}); check AWS_ENDPOINT_URL and the network, then "
                f"run the same command again, it continues",
                uri,
            ) from error
        if isinstance(error, OSError):
            raise OSError(
                error.errno or errno.EIO, f"{self._endpoint} answered {code or ''} {_words(error)}", uri
            ) from error
        raise OSError(errno.EIO, f"the request cannot be made: {_words(error)}", uri) from error


def _code(error: BaseException) -> str:
    """Return S3's name of the error, empty if it is none of S3's."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _words(error: BaseException) -> str:
    """Return the error's message on one line, without a URL's user and password."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _without_user(" ".join(text.split()).rstrip("."))


def _without_user(text: str) -> str:
    """Return a text without the user and password that a URL in it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def _may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later. Time-outs have been tried again already."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    unreached = isinstance(error, boto.ConnectionError) and not isinstance(error, boto.ConnectTimeoutError)
    return status >= 500 or status == 429 or _code(error) == "SlowDown" or unreached

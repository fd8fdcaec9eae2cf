"""S3 that makes requests again with growing pauses, says when it waits and does not wait for ever, and names bucket or
object in every error.

Credentials, region and endpoint are those that AWS's own tools take from the environment and their files; what a user
set in fsspec's configuration for "s3" comes before the defaults here.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import random
import re
from asyncio import sleep
from contextlib import suppress
from time import monotonic
from typing import Any, NoReturn

from botocore import exceptions as boto
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS, version_id_kw
from s3fs.errors import translate_boto_error

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10
"""Seconds after which a connection that is not made counts as failed."""

READ_TIMEOUT = 15
"""Seconds without a byte of the answer after which a request counts as failed."""

TRIES = 5
"""How often a request that fails for a reason that may pass is made at least …"""

GIVE_UP = 60.0
"""… and the seconds after which it is not made again."""

PAUSE = 0.2
"""Seconds before a request is made again, doubled each time up to 5; drawn from half of that to the whole, so that many
workers do not come back at one moment."""

TELL = 10.0
"""Seconds after which a request without an answer is worth a line."""

UPLOADS = 3
"""How often a file is uploaded whose upload in parts the store no longer knows."""

_PASSING = frozenset(
    {
        *(
            "InternalError",
            "ServiceUnavailable",
            "SlowDown",
            "Throttling",
            "ThrottlingException",
            "RequestLimitExceeded",
        ),
        *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),  # broken on the way there
        *("OperationAborted", "ConditionalRequestConflict"),
    }
)
"""S3's names of errors after which the same request may succeed, whatever their HTTP status."""

_OF_CREDENTIALS = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        *("RequestTimeTooSkewed", "InvalidSecurity"),
    }
)
"""S3's names of errors that are none of a bucket or object."""

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"

_told: set[str] = set()
_drawing = random.Random()


class StoreTimeoutError(OSError):
    """A store that did not answer. No TimeoutError, which S3FileSystem would take for a reason to begin anew."""


class NoBucketError(OSError):
    """There is no such bucket. No FileNotFoundError, which would mean that one file is not there."""


class UploadGoneError(OSError):
    """The store does not know an upload in parts: it is complete, but the answer that said so was lost, or somebody
    aborted it."""


class PatientS3(S3FileSystem):
    """See the module. Errors are OSErrors with the URI as `filename` and what to do in `strerror`."""

    connect_timeout = CONNECT_TIMEOUT
    read_timeout = READ_TIMEOUT
    retries = 1  # tries are made here; those of three layers would multiply

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._prepare_config_kwargs()
        if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & set(os.environ):
            config.setdefault("retries", {"total_max_attempts": 1})
        return config

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        uri = "s3://" + "/".join(str(kwargs[key]) for key in ("Bucket", "Key", "Prefix") if kwargs.get(key))
        telling = asyncio.get_running_loop().call_later(TELL, self._tell, kwargs.get("Bucket") or "")
        end, pause, tries = monotonic() + GIVE_UP, PAUSE, 0
        try:
            while True:
                tries += 1
                try:
                    return await self._ask(method, *akwarglist, **kwargs)
                except (OSError, boto.BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
                    if not _may_pass(error) or (tries >= TRIES and monotonic() + pause > end):
                        self._raise_named(await self._reason(error, method, kwargs), uri)
                await sleep(pause * _drawing.uniform(0.5, 1))
                pause = min(2 * pause, 5.0)
        finally:
            telling.cancel()

    call_s3 = sync_wrapper(_call_s3)

    async def _ask(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        """Make a request once. What it is answered is whole, but for an object too large to be read at one go."""
        answer = await super()._call_s3(method, *akwarglist, **kwargs)
        if method == "get_object" and ("Range" in kwargs or answer["ContentLength"] <= self.default_block_size):
            body = answer["Body"]
            try:
                answer["Body"] = _ReadBody(await body.read())
            finally:
                body.close()
        if method == "delete_objects" and answer.get("Errors"):  # those of single objects, within an answer of success
            raise translate_boto_error(boto.ClientError({"Error": answer["Errors"][0]}, method))
        return answer

    async def _reason(self, error: BaseException, method: str, kwargs: dict[str, Any]) -> BaseException:
        """Return an error that says why a request was refused, as answers to HEAD, which have no content, cannot."""
        if method == "head_object" and _code(error) in ("400", "403"):  # 400 may be a token that has expired
            try:
                await self._ask("get_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"], Range="bytes=0-0")
            except OSError as told:
                if _code(told) in ("AccessDenied", *_OF_CREDENTIALS):
                    return told
        return error

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Return the content of a file, or of a range of it; a file that is not large by a single request, whose
        refusal says why, which one for its size would not."""
        if start is not None or end is not None:
            return bytes(await super()._cat_file(path, version_id, start, end, **kwargs))
        bucket, key, version = self.split_path(path)
        version = version_id or version
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **version_id_kw(version))
        size = answer["ContentLength"]
        if size <= self.default_block_size:
            return bytes(await answer["Body"].read())
        answer["Body"].close()
        ranges = self._cat_file_concurrent(bucket, key, size, self.default_block_size, version_id=version)
        return bytes(await ranges)

    async def _exists(self, path: str) -> bool:
        bucket, key, _ = self.split_path(path)
        if key or not bucket:
            return bool(await super()._exists(path))
        await self._call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)  # S3FileSystem takes any error for an absence
        return True

    exists = sync_wrapper(_exists)

    async def _isfile(self, path: str) -> bool:
        try:
            return bool((await self._info(path))["type"] == "file")
        except FileNotFoundError:  # fsspec takes any error for an absence
            return False

    async def _put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        for uploads in range(1, UPLOADS + 1):
            try:
                await super()._put_file(lpath, rpath, *args, **kwargs)
                return
            except UploadGoneError:
                if uploads == UPLOADS:
                    raise

    async def _abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
        with suppress(UploadGoneError):
            await super()._abort_mpu(bucket, key, mpu)

    abort_mpu = sync_wrapper(_abort_mpu)

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
        if code == "NoSuchBucket" or (code == "404" and uri == bucket):
            raise NoBucketError(
                errno.ENOENT, f"there is no such bucket at {self._endpoint}; mend its name, or make it", bucket
            ) from error
        if code == "NoSuchUpload":
            raise UploadGoneError(
                errno.EIO, f"{self._endpoint} does not know the upload of it any more; run the same command again", uri
            ) from error
        if isinstance(error, FileNotFoundError | FileExistsError | boto.ParamValidationError):
            raise error  # S3FileSystem knows what to make of these
        if code in _OF_CREDENTIALS:
            raise PermissionError(
                errno.EACCES, f"{self._endpoint} refuses the credentials ({code}: {_words(error)}); mend {_KEYS}", uri
            ) from error
        if isinstance(error, PermissionError):
            raise PermissionError(
                errno.EACCES,
                f"access is denied ({code or error}); give credentials by {_KEYS} that may read or write there",
                uri,
            ) from error
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            raise PermissionError(
                errno.EACCES, f"no credentials were found ({_words(error)}); give credentials by {_KEYS}", uri
            ) from error
        if isinstance(error, boto.SSOError | boto.TokenRetrievalError | boto.CredentialRetrievalError):
            raise PermissionError(errno.EACCES, f"the credentials cannot be used ({_words(error)})", uri) from error
        if isinstance(error, boto.SSLError):
            raise OSError(
                errno.EIO,
                f"no safe connection to {self._endpoint} ({_words(error)}); check http or https in AWS_ENDPOINT_URL, "
                f"and AWS_CA_BUNDLE",
                uri,
            ) from error
        if _unanswered(error):
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


class _ReadBody:
    """The body of an answer that has been read."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    async def read(self, size: int = -1) -> bytes:
        return self._content.read(size)

    def close(self) -> None:
        """Do nothing: the connection serves the next request already."""


def _code(error: BaseException) -> str:
    """Return S3's name of the error, empty if it is none of S3's."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _response(error: BaseException) -> dict[str, Any]:
    return getattr(error.__cause__, "response", None) or {}


def _words(error: BaseException) -> str:
    """Return the error's message on one line, without a URL's user and password."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _without_user(" ".join(text.split()).rstrip("."))


def _without_user(text: str) -> str:
    """Return a text without the user and password that a URL in it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def _may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    refused = (status >= 500 and status != 501) or status == 429 or _code(error) in _PASSING
    return refused or _unanswered(error)


def _unanswered(error: BaseException) -> bool:
    """Return whether a request failed without an answer, or without the whole of it."""
    return isinstance(error, (*S3_RETRYABLE_ERRORS, boto.ConnectionError)) and not isinstance(error, boto.SSLError)

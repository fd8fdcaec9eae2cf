"""S3 that makes requests again with growing pauses, says when it waits and does not wait for ever, and names bucket or
object in every error.

Credentials, region and endpoint are those that AWS's own tools take from the environment and their files; what a user
set in fsspec's configuration for "s3" comes before the defaults here.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
from asyncio import sleep
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import IO, Any

from botocore import exceptions as boto
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS, version_id_kw
from s3fs.errors import translate_boto_error

from unianom.s3_errors import OF_CREDENTIALS, UploadGoneError, code_of, may_pass, named, without_user

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

PAGE = 1000
"""Objects that a folder is listed by at a time; S3 tells no more."""

UPLOADS = 3
"""How often a file is uploaded whose upload in parts the store no longer knows."""

_FAILURES = (OSError, boto.BotoCoreError, *S3_RETRYABLE_ERRORS)
"""What a request may end with."""

_told: set[str] = set()
_drawing = random.Random()


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
                except _FAILURES as error:
                    if not may_pass(error) or (tries >= TRIES and monotonic() + pause > end):
                        told = named(await self._reason(error, method, kwargs), uri, self._endpoint)
                        if told is error:
                            raise
                        raise told from error
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
        if method == "head_object" and code_of(error) in ("400", "403"):  # 400 may be a token that has expired
            try:
                await self._ask("get_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"], Range="bytes=0-0")
            except _FAILURES as told:
                if code_of(told) in ("AccessDenied", *OF_CREDENTIALS):
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

    async def _isdir(self, path: str) -> bool:
        bucket, key, _ = self.split_path(path)
        if not bucket:
            return True
        below = f"{key.strip('/')}/" if key else ""
        try:  # S3FileSystem lists, and keeps, all that lies there
            found = await self._call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1, **self.req_kw)
        except FileNotFoundError:
            return False
        return not key or bool(found.get("Contents"))

    isdir = sync_wrapper(_isdir)

    def iter_dir(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield name, type and size of what lies directly in a folder, `PAGE` at a time, which are all that is held; of
        a file its own.

        Raises:
            FileNotFoundError: there is no such folder or file.
        """
        bucket, key, _ = self.split_path(path)
        below = f"{key.strip('/')}/" if key else ""
        asked = {"Bucket": bucket, "Prefix": below, "Delimiter": "/", "MaxKeys": PAGE, **self.req_kw}
        empty, more = True, True
        while more:
            page = self.call_s3("list_objects_v2", **asked)
            for folder in page.get("CommonPrefixes", ()):
                empty = False
                yield {"name": f"{bucket}/{folder['Prefix'][:-1]}", "type": "directory", "size": 0}
            for file in page.get("Contents", ()):
                empty = False
                yield {"name": f"{bucket}/{file['Key']}", "type": "file", "size": file["Size"]}
            more = page.get("IsTruncated", False)
            asked["ContinuationToken"] = page.get("NextContinuationToken")
        if empty and key:
            yield self.info(path)

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

    async def _upload_file_part_concurrent(
        self,
        bucket: str,
        key: str,
        mpu: dict[str, Any],
        f0: IO[bytes],
        chunksize: int,
        callback: Any = None,
        max_concurrency: int | None = None,
    ) -> list[dict[str, Any]]:
        """Upload the parts of a file, some at a time, and return what was answered. One that fails ends the others,
        which would else come to the store after the upload was aborted."""
        answers: list[dict[str, Any]] = []
        at_a_time = range(max_concurrency or self.max_concurrency)
        while parts := [part for _ in at_a_time if (part := f0.read(chunksize))]:
            where = {"Bucket": bucket, "Key": key, "UploadId": mpu["UploadId"]}
            uploads = [
                asyncio.ensure_future(self._call_s3("upload_part", **where, PartNumber=number, Body=part))
                for number, part in enumerate(parts, len(answers) + 1)
            ]
            try:
                answers += await asyncio.gather(*uploads)
            except BaseException:
                for upload in uploads:
                    upload.cancel()
                await asyncio.gather(*uploads, return_exceptions=True)
                raise
        return answers

    async def _abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
        with suppress(UploadGoneError):
            await super()._abort_mpu(bucket, key, mpu)

    abort_mpu = sync_wrapper(_abort_mpu)

    @property
    def _endpoint(self) -> str:
        meta = getattr(self._s3, "meta", None)
        return without_user(str(getattr(meta, "endpoint_url", None) or "its endpoint"))

    def _tell(self, bucket: str) -> None:
        if bucket not in _told:
            _told.add(bucket)
            logger.warning("waiting for s3://%s: no answer from %s so far, trying on", bucket, self._endpoint)


class _ReadBody:
    """The body of an answer that has been read."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    async def read(self, size: int = -1) -> bytes:
        return self._content.read(size)

    def close(self) -> None:
        """Do nothing: the connection serves the next request already."""

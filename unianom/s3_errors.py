"""What the errors of S3 mean: which may pass, and what to tell of the others."""

from __future__ import annotations

import errno
import re
from typing import Any

from botocore import exceptions as boto
from s3fs.core import S3_RETRYABLE_ERRORS

_PASSING = frozenset(
    {
        *("InternalError", "ServiceUnavailable"),
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
        *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),  # broken on the way there
        *("OperationAborted", "ConditionalRequestConflict"),
    }
)
"""S3's names of errors after which the same request may succeed, whatever their HTTP status."""

OF_CREDENTIALS = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        *("RequestTimeTooSkewed", "InvalidSecurity"),
    }
)
"""S3's names of errors that are none of a bucket or object."""

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"


class StoreTimeoutError(OSError):
    """A store that did not answer. No TimeoutError, which S3FileSystem would take for a reason to begin anew."""


class NoBucketError(OSError):
    """There is no such bucket. No FileNotFoundError, which would mean that one file is not there."""


class UploadGoneError(OSError):
    """The store does not know an upload in parts: it is complete, but the answer that said so was lost, or somebody
    aborted it."""


def named(error: BaseException, uri: str, endpoint: str) -> BaseException:
    """Return an error as an OSError of the same class, if it was one, that names the URI and what to do; the error
    itself if S3FileSystem knows what to make of it, such as a file that is not there.

    Args:
        error: what a request ended with.
        uri: what it was about: a bucket, a prefix or an object.
        endpoint: where the store is, without a password.
    """
    code = code_of(error)
    bucket = "/".join(uri.split("/")[:3])
    if code == "NoSuchBucket" or (code == "404" and uri == bucket):
        return NoBucketError(errno.ENOENT, f"there is no such bucket at {endpoint}; mend its name, or make it", bucket)
    if code == "NoSuchUpload":
        return UploadGoneError(
            errno.EIO, f"{endpoint} does not know the upload of it any more; run the same command again", uri
        )
    if isinstance(error, FileNotFoundError | FileExistsError | boto.ParamValidationError):
        return error
    if code in OF_CREDENTIALS:
        return PermissionError(
            errno.EACCES, f"{endpoint} refuses the credentials ({code}: {_words(error)}); mend {_KEYS}", uri
        )
    if isinstance(error, PermissionError):
        return PermissionError(
            errno.EACCES,
            f"access is denied ({code or error}); give credentials by {_KEYS} that may read or write there",
            uri,
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return PermissionError(
            errno.EACCES, f"no credentials were found ({_words(error)}); give credentials by {_KEYS}", uri
        )
    if isinstance(error, boto.SSOError | boto.TokenRetrievalError | boto.CredentialRetrievalError):
        return PermissionError(errno.EACCES, f"the credentials cannot be used ({_words(error)})", uri)
    if isinstance(error, boto.SSLError):
        return OSError(
            errno.EIO,
            f"no safe connection to {endpoint} ({_words(error)}); check http or https in AWS_ENDPOINT_URL, "
            f"and AWS_CA_BUNDLE",
            uri,
        )
    if _unanswered(error):
        return StoreTimeoutError(
            errno.ETIMEDOUT,
            f"no answer from {endpoint} ({_words(error)}); check AWS_ENDPOINT_URL and the network, then "
            f"run the same command again, it continues",
            uri,
        )
    if isinstance(error, OSError):
        return OSError(error.errno or errno.EIO, f"{endpoint} answered {code or ''} {_words(error)}", uri)
    return OSError(errno.EIO, f"the request cannot be made: {_words(error)}", uri)


def code_of(error: BaseException) -> str:
    """Return S3's name of the error, empty if it is none of S3's."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _response(error: BaseException) -> dict[str, Any]:
    return getattr(error.__cause__, "response", None) or {}


def _words(error: BaseException) -> str:
    """Return the error's message on one line, without a URL's user and password."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return without_user(" ".join(text.split()).rstrip("."))


def without_user(text: str) -> str:
    """Return a text without the user and password that a URL in it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    refused = (status >= 500 and status != 501) or status == 429 or code_of(error) in _PASSING
    return refused or _unanswered(error)


def _unanswered(error: BaseException) -> bool:
    """Return whether a request failed without an answer, or without the whole of it."""
    return isinstance(error, (*S3_RETRYABLE_ERRORS, boto.ConnectionError)) and not isinstance(error, boto.SSLError)

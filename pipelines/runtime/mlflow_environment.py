"""MLflow's environment: quiet, and what it raises turned into one sentence."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipelines.runtime.mlflow_text import cut, mask_credentials
from unianom.errors import UnianomError

QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

ONE_RETRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""How often MLflow tries again by itself, as after a connection was cut; `mlflow_queue` tries on."""

IMPATIENT = {**ONE_RETRY, "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""The same for requests of which each holds a job up, with the seconds that an answer may take."""


class TrackingError(UnianomError):
    """The MLflow tracking server, database or artifact store cannot be used."""


@contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """Turn what MLflow raises into one sentence."""
    try:
        yield
    except UnianomError:
        raise
    except Exception as error:  # MLflow passes on whatever its database, network or artifact store raises
        raise TrackingError(f"{what}: {reason(error)}; {cure}") from error


def reason(error: BaseException) -> str:
    """Return the system's own words where disk or network failed, else MLflow's, on one short line."""
    words = " ".join(str(error).split()) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.strerror):
            words = str(cause)
            break
        for name in ("reason", "orig"):  # where urllib3 and SQLAlchemy keep what they were told
            if isinstance(told := getattr(cause, name, None), Exception):
                words = " ".join(str(told).split())
        cause = cause.__cause__ or cause.__context__
    return cut(mask_credentials(words), 300)


def is_refusal(error: Exception) -> bool:
    """Return whether a request that failed would fail for ever, not for a server that is away or out of order.

    Wrong credentials count as a server that is out of order: they may be mended while a job runs.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException
    from sqlalchemy.exc import ArgumentError

    if isinstance(error, UnianomError | ImportError | ArgumentError | UnsupportedModelRegistryStoreURIException):
        return True
    if isinstance(error, MlflowException):  # no endpoint there: what answers in place of a server that is away
        return error.get_http_status_code() in _REFUSALS and error.error_code != "ENDPOINT_NOT_FOUND"
    return getattr(getattr(error, "response", None), "status_code", None) in _REFUSALS  # an artifact's, of Requests


_REFUSALS = (400, 404, 409, 413)
"""HTTP status of a request that is wrong in itself."""


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of the block; those that the user has set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Let through only warnings and errors of MLflow and its database migrations, for the length of the block.

    Those of its database are raised as well, and are not logged with their long tracebacks.
    """
    level = os.environ["MLFLOW_LOGGING_LEVEL"].upper()
    of_database = "CRITICAL" if level == QUIET["MLFLOW_LOGGING_LEVEL"] else level
    levels = {"mlflow": level, "alembic": level, "mlflow.store.db.utils": of_database}
    loggers = [logging.getLogger(name) for name in levels]
    before = [logger.level for logger in loggers]
    for logger, new in zip(loggers, levels.values(), strict=True):
        logger.setLevel(new)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


@contextmanager
def global_tracking_uri(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI, without which no model is logged or registered, for the length of the block."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow keeps its global in this variable as well
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]

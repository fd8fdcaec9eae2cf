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

# A wrong address should show within seconds of the start; later, when hours of work are at stake, MLflow's own
# patience of minutes holds.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


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
        raise TrackingError(f"{what}: {cut(mask_credentials(_reason(error)), 300)}; {cure}") from error


def _reason(error: BaseException) -> str:
    """Return the system's own words where disk or network failed, else MLflow's, on one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.strerror):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__


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
    """Let through only warnings and errors of MLflow and its database migrations, for the length of the block."""
    level = os.environ["MLFLOW_LOGGING_LEVEL"].upper()
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
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

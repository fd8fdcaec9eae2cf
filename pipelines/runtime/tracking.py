"""MLflow: one run per job, found again when the job is.

Nothing of MLflow is imported before a job is tracked. While a run is tracked, MLflow's progress bars, chatter and usage
reports are off, unless the user's environment says otherwise; afterwards all is as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines.runtime.mlflow_text import mask_credentials
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.run_record import Run
from unianom import files


@contextmanager
def track(
    options: TrackingOptions,
    job: str,
    output: str,
    params: Mapping[str, Any],
    *,
    plan: str = "",
    default_folder: str | None = None,
    parent: Run | None = None,
) -> Iterator[Run]:
    """Record a job as one MLflow run, for the length of a `with` block.

    The run of the same job, output and plan is continued if there is one. It ends FINISHED, or FAILED if the block
    raises (KILLED if it is interrupted), and the exception goes on.

    A server that is away costs a line on stderr, never the job: what is recorded meanwhile waits in memory and is sent
    when the server answers, at the latest at the end, which waits a minute for it; what is missing then is told.

    Args:
        options: where to record.
        job: name of the job, e.g. "train".
        output: path or URI of what the job makes.
        params: the job's options as plain data.
        plan: digest of what the output depends on, where the job has one.
        default_folder: where `mlflow.db` lies if no tracking URI is given; None takes the folder around `output`.
        parent: run that this one belongs to, e.g. the tuning of a trial. It outlives this one.

    Raises:
        TrackingError: MLflow cannot use this URI, or refuses.
        OptionError: the experiment was deleted.
    """
    if not options.enabled:
        yield Run()
        return
    from pipelines.runtime.mlflow_environment import QUIET, TrackingError, environment, quiet_loggers
    from pipelines.runtime.mlflow_run import MlflowRun
    from pipelines.runtime.mlflow_store import ERROR, RunIdentity, default_uri

    output = files.full_uri(output)
    with environment(QUIET), quiet_loggers():
        uri = options.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(default_folder, output)
        if uri is None:
            print(
                f"not recorded in MLflow: {mask_credentials(output)} lies on an object store, beside which MLflow can "
                f"keep no SQLite file; give a server with --tracking.mlflow_uri or MLFLOW_TRACKING_URI"
            )
            yield Run()
            return
        above = parent if isinstance(parent, MlflowRun) else None
        run = MlflowRun(uri, RunIdentity(options.experiment, job, output, plan), above)
        run.open()
        run.params(params)
        try:
            yield run
        except BaseException as error:
            run.tags({ERROR: f"{type(error).__name__}: {error}"})
            at_once = isinstance(error, KeyboardInterrupt | TrackingError)  # the latter has waited
            run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", 0.0 if at_once else None)
            raise
        run.end("FINISHED")


def scope(category: str) -> str:
    """Return what the metrics of one category are grouped by: its name, told apart from what is measured over all."""
    if category.split("/")[0] not in _OVER_ALL:
        return category
    return f"{category}-{files.sha256_of(category.encode())[:8]}"


_OVER_ALL = ("mean", "union", "calibrated", "best", "figures")

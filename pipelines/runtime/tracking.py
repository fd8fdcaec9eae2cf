"""MLflow: one run per job, found again when the job is.

Nothing of MLflow is imported before a job is tracked. While a run is tracked, MLflow's progress bars, chatter and usage
reports are off, unless the user's environment says otherwise; afterwards all is as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsFloat

from pipelines.runtime.mlflow_text import mask_all, mask_credentials
from pipelines.runtime.options import TrackingOptions
from unianom import files

CANDIDATE = "candidate"
"""Alias of the version registered last; "champion" is given by people."""


class Run:
    """What a job records of itself. This one, of a job that is not tracked, records nothing.

    Attributes:
        id: MLflow's run id; None if the job is not tracked.
        uri: the tracking URI, without credentials; None if the job is not tracked.
    """

    id: str | None = None
    uri: str | None = None

    def metrics(self, values: Mapping[str, SupportsFloat | None], step: int | None = None) -> None:
        """Record numbers; None, NaN and infinite ones are left out.

        Args:
            values: by name; "/" groups them in MLflow's pages.
            step: iteration they belong to, where there is one.
        """

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""

    def artifacts(self, contents: Mapping[str, bytes]) -> None:
        """Store files, by their path inside the run; one of the same path is replaced."""

    def artifact_bytes(self, name: str, content: bytes) -> None:
        """Store one file."""
        self.artifacts({name: content})

    def json(self, name: str, content: Any) -> None:
        """Store plain data as a JSON file."""
        self.artifacts({name: json.dumps(mask_all(content), indent=2, ensure_ascii=False).encode() + b"\n"})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows as a CSV file; the columns are the keys of the rows, in the order they first come."""
        self.artifacts({name: files.csv_bytes(rows)})

    def figures(self, figures: Mapping[str, bytes]) -> None:
        """Store encoded pictures, by file name, in the folder `figures`."""
        self.artifacts({f"figures/{name}": content for name, content in figures.items()})

    def register_model(self, model_uri: str, name: str, alias: str = CANDIDATE) -> str | None:
        """Log a model folder as an MLflow model and register it.

        The very same model (by its digest) is registered once, however often this is called. The alias moves to it
        unless a later version has it.

        Args:
            model_uri: model folder, local or remote.
            name: of the registered model.
            alias: that the version gets.

        Returns:
            The version; None if the job is not tracked.

        Raises:
            ModelError: there is no finished model folder.
            TrackingError: the server refuses, or does not answer.
        """
        return None


@contextmanager
def track(
    options: TrackingOptions,
    job: str,
    output: str,
    params: Mapping[str, Any],
    *,
    plan: str = "",
    default_folder: str | None = None,
    parent: str | None = None,
) -> Iterator[Run]:
    """Record a job as one MLflow run, for the length of a `with` block.

    The run of the same job, output and plan is continued if there is one. It ends FINISHED, or FAILED if the block
    raises (KILLED if it is interrupted), and the exception goes on.

    Args:
        options: where to record.
        job: name of the job, e.g. "train".
        output: path or URI of what the job makes.
        params: the job's options as plain data.
        plan: digest of what the output depends on, where the job has one.
        default_folder: where `mlflow.db` lies if no tracking URI is given; None takes the folder around `output`.
        parent: id of the run that this one belongs to, e.g. the tuning of a trial.

    Raises:
        TrackingError: the tracking server cannot be reached (within a minute), or refuses.
    """
    if not options.enabled:
        yield Run()
        return
    from pipelines.runtime.mlflow_environment import IMPATIENT, QUIET, TrackingError, environment, quiet_loggers
    from pipelines.runtime.mlflow_run import open_run
    from pipelines.runtime.mlflow_store import default_uri

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
        with environment(IMPATIENT):
            run = open_run(uri, options.experiment, job, output, plan, parent)
            run.params(params)
        try:
            yield run
        except BaseException as error:
            try:
                run.tags({"unianom.error": f"{type(error).__name__}: {error}"})
                run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            except TrackingError as also:
                error.add_note(str(also))  # the job's own error is the one to show
            raise
        run.end("FINISHED")


def scope(category: str) -> str:
    """Return what the metrics of one category are grouped by: its name, told apart from what is measured over all."""
    if category.split("/")[0] not in _OVER_ALL:
        return category
    return f"{category}-{files.sha256_of(category.encode())[:8]}"


_OVER_ALL = ("mean", "union", "calibrated", "best", "figures")

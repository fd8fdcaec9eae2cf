"""What a job records of itself; this one records nothing, that of `mlflow_run` in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

from pipelines.runtime.mlflow_text import mask_all
from unianom import files

CANDIDATE = "candidate"
"""Alias of the version registered last; "champion" is given by people."""


class Run:
    """What a job records of itself. This one, of a job that is not tracked, records nothing.

    Attributes:
        id: MLflow's run id; None if the job is not tracked, or the server has not answered yet.
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

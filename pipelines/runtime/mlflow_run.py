"""A run in MLflow: what is recorded of a job, and its model in the registry."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import unianom
from pipelines.runtime import mlflow_queue
from pipelines.runtime.mlflow_environment import (
    IMPATIENT,
    ONE_RETRY,
    TrackingError,
    environment,
    explained,
    global_tracking_uri,
    is_refusal,
)
from pipelines.runtime.mlflow_queue import SendQueue, until_answered
from pipelines.runtime.mlflow_store import RunIdentity, open_run
from pipelines.runtime.mlflow_text import MAX_PARAM, MAX_TAG, cut, legal_name, legal_path, mask_credentials, to_text
from pipelines.runtime.run_record import CANDIDATE, Run
from unianom import files
from unianom.data.image import encode_png
from unianom.errors import ModelError
from unianom.options import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_SCRIPT = Path(__file__).with_name("mlflow_model.py")

_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000


class MlflowRun(Run):
    """A run in MLflow; `track` makes it.

    All of it goes through a client of its own, so that a caller's active run and tracking URI are left alone. Nothing
    but `open` and `register_model` raises what MLflow does: what cannot be sent waits in a queue.

    Args:
        tracking_uri: of a server, or a database.
        identity: by which the run is found again.
        parent: run that this one belongs to, and whose queues it shares.
    """

    def __init__(self, tracking_uri: str, identity: RunIdentity, parent: MlflowRun | None = None) -> None:
        self._tracking_uri, self._identity, self._parent = tracking_uri, identity, parent
        self.uri = mask_credentials(tracking_uri)
        self._client: MlflowClient
        self._experiment_id: str
        self._where = f"MLflow at {self.uri}"
        if parent is None:
            self._records = SendQueue(self._where, IMPATIENT)
            self._files = SendQueue(f"the artifact store of {self._where}", ONE_RETRY, after=self._records)
        else:
            self._records, self._files = parent._records, parent._files

    def open(self) -> None:
        """Find or make the run; if the server is away, as soon as it answers.

        Raises:
            TrackingError: MLflow cannot use this URI, or refuses.
            OptionError: the experiment was deleted.
        """
        if self._records.away:  # as the parent's run has found
            self._records.put("runs", self._open, needed=True)
            return
        cure = "mend --tracking.mlflow_uri or MLFLOW_TRACKING_URI, or turn recording off with --tracking.enabled false"
        with explained(f"cannot record in {self._where}", cure):
            try:
                with environment(IMPATIENT):
                    self._open()
            except Exception as error:
                if is_refusal(error):
                    raise
                self._records.wait("runs", self._open, error)

    def _open(self) -> None:
        above = None if self._parent is None else self._parent.id
        self._client, self._experiment_id, self.id = open_run(self._tracking_uri, self._identity, above)

    def _log(self, **records: Any) -> None:
        self._client.log_batch(self._id, **records)

    @property
    def _id(self) -> str:
        """MLflow's id of the run. What asks for it waits behind what opens the run."""
        assert self.id is not None
        return self.id

    def metrics(self, values: Mapping[str, SupportsFloat | None], step: int | None = None) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [
            Metric(legal_name(name), float(value), now, step or 0)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            batch = metrics[start : start + _METRICS_PER_BATCH]
            self._records.put("metrics", partial(self._log, metrics=batch))

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(legal_name(name), cut(to_text(value), MAX_TAG)) for name, value in values.items()]
        self._records.put("tags", partial(self._log, tags=tags))

    def artifacts(self, contents: Mapping[str, bytes]) -> None:
        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in contents.items():
                    path = Path(folder, legal_path(name))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                self._client.log_artifacts(self._id, folder)

        self._files.put("files", send)

    def params(self, plain: Mapping[str, Any]) -> None:
        """Record a job's options: whole as `config.json`, and one parameter each.

        MLflow's parameters cannot change, so those of a continued run keep their first values; what differs this
        time is told by the tag `unianom.changed_params`.
        """
        self.json("config.json", dict(plain))
        flat = flatten(dict(plain))
        values = {legal_name(name): cut(to_text(value), MAX_PARAM) for name, value in flat.items()}
        self._records.put("options", lambda: self._send_params(values))

    def _send_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        before = self._client.get_run(self._id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in before]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            self._log(params=new[start : start + _PARAMS_PER_BATCH])
        changed = {name: value for name, value in values.items() if before.get(name, value) != value}
        if changed:
            self._log(tags=[RunTag("unianom.changed_params", cut(to_text(changed), MAX_TAG))])

    def register_model(self, model_uri: str, name: str, alias: str = CANDIDATE) -> str | None:
        from unianom.model import is_model

        if not is_model(model_uri):
            raise ModelError(f"{mask_credentials(model_uri)} holds no finished model; give the folder of a trained one")
        digest = files.sha256_file(files.join(model_uri, "model.json"))
        cure = "the model itself is complete: run the same command again to register it"
        with explained(f"cannot register model '{name}' in {self._where}", cure):
            self._records.flush(mlflow_queue.PATIENCE)
            if self._records.away:
                raise ConnectionError(self._records.away)
            with environment(ONE_RETRY), global_tracking_uri(self._tracking_uri):
                return until_answered(lambda: self._register(model_uri, digest, name, alias), mlflow_queue.PATIENCE)

    def _register(self, model_uri: str, digest: str, name: str, alias: str) -> str:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        named = name.replace("'", "''")
        found = self._client.search_model_versions(f"name = '{named}' and tags.`unianom.digest` = '{digest}'")
        if found:
            number = str(found[0].version)
        else:
            model_id = self._log_model(model_uri, digest)
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            created = self._client.create_model_version(
                name, f"models:/{model_id}", self._id, {"unianom.digest": digest}, model_id=model_id
            )
            number = str(created.version)
            link = json.dumps([{"name": name, "version": number}])  # what MLflow's pages show with the model
            self._client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})
        self._move_alias(name, alias, int(number))
        if not found:  # two jobs at once may both have found the alias free, and moved it in the wrong order
            versions = self._client.search_model_versions(f"name = '{named}'")
            self._move_alias(name, alias, max(int(v.version) for v in versions if "unianom.digest" in v.tags))
        return number

    def _move_alias(self, name: str, alias: str, number: int) -> None:
        """Give a version the alias, unless a later one has it."""
        holder = self._client.get_registered_model(name).aliases.get(alias)
        if holder is None or int(holder) < number:
            self._client.set_registered_model_alias(name, alias, str(number))

    def _log_model(self, model_uri: str, digest: str) -> str:
        """Log the model folder with the code that loads it; returns MLflow's model id."""
        import mlflow.pyfunc
        import pandas as pd
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        from unianom.model import local_copy

        signature = ModelSignature(
            inputs=Schema([ColSpec("binary", "image"), ColSpec("string", "category", required=False)]),
            outputs=Schema(
                [
                    ColSpec("double", "score", required=False),
                    ColSpec("string", "decision", required=False),
                    ColSpec("string", "status"),
                    ColSpec("string", "error", required=False),
                    ColSpec("double", "calibrated_score", required=False),
                    ColSpec("binary", "anomaly_map", required=False),
                    ColSpec("double", "map_offset", required=False),
                    ColSpec("double", "map_scale", required=False),
                ]
            ),
            params=ParamSchema([ParamSpec("maps", "boolean", False)]),
        )
        logged = self._client.create_logged_model(
            self._experiment_id, "model", self._id, tags={"unianom.digest": digest}
        )
        with tempfile.TemporaryDirectory() as folder:
            Model.log(
                artifact_path=None,  # the old way of naming
                flavor=mlflow.pyfunc,
                name="model",
                run_id=self._id,
                model_id=logged.model_id,
                python_model=str(MODEL_SCRIPT),
                artifacts={"model": local_copy(model_uri, Path(folder, "model"))},
                code_paths=[str(Path(unianom.__file__).parent)],
                signature=signature,
                input_example=pd.DataFrame({"image": [_example_image()]}),
                pip_requirements=pinned_requirements(),
                metadata={"unianom.digest": digest},
            )
        return logged.model_id

    def end(self, status: str, patience: float | None = None) -> None:
        """Close the run as FINISHED, FAILED or KILLED, and say what of it could not be recorded.

        Args:
            status: how it ends.
            patience: seconds to wait for a server that is away; None takes `mlflow_queue.PATIENCE`. Records of a run
                that has a parent go on waiting with those of the parent.
        """
        patience = mlflow_queue.PATIENCE if patience is None else patience
        if self._parent is None:
            self._records.flush(patience)
            self._files.flush(patience)
            if (lost := self._missing()) and not self._records.away:
                self.tags({"unianom.missing": lost})
        self._records.put("ends of runs", lambda: self._client.set_terminated(self._id, status))
        if self._parent is None and (lost := self._missing()):
            why = self._records.away or self._files.away
            print(
                f"not all of this job is recorded in {self._where}{f' ({why})' if why else ''}: there are missing "
                f"{lost}; the same command, run again, records its results",
                file=sys.stderr,
                flush=True,
            )

    def _missing(self) -> str:
        missing = self._records.missing + self._files.missing
        return ", ".join(f"{what} ({count})" for what, count in missing.items())


def pinned_requirements() -> list[str]:
    """Return what a model needs to run, in the versions installed here."""
    names = [
        "torch",
        "torchvision",
        "timm",
        "safetensors",
        "numpy",
        "pillow",
        "simplejpeg",
        "pyarrow",
        "fsspec",
        "scipy",
        "pyyaml",
    ]
    names += ["annotated-types"]
    pins = [f"{name}=={_public_version(name)}" for name in names]
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            return [*pins, f"{name}=={_public_version(name)}"]
        except PackageNotFoundError:
            continue
    raise TrackingError("neither faiss-cpu nor faiss-gpu is installed, so the model cannot say what it needs")


def _public_version(name: str) -> str:
    """Return a package's version without a local part such as "+cu130", which package indexes do not know."""
    return version(name).split("+")[0]


def _example_image() -> bytes:
    """Return a small grey ramp as PNG."""
    import numpy as np

    return encode_png(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))

"""A run in MLflow: what is recorded of a job, and its model in the registry."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import unianom
from pipelines.runtime.mlflow_environment import TrackingError, explained, global_tracking_uri
from pipelines.runtime.mlflow_store import artifact_folder, experiment_id_of
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

    All of it goes through a client of its own, so that a caller's active run and tracking URI are left alone.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, experiment_id: str, run_id: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri
        self._experiment_id = experiment_id
        self._id = run_id
        self.id = run_id
        self.uri = mask_credentials(tracking_uri)

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
            with self._explained("record metrics"):
                self._client.log_batch(self._id, metrics=batch)

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(legal_name(name), cut(to_text(value), MAX_TAG)) for name, value in values.items()]
        with self._explained("set tags"):
            self._client.log_batch(self._id, tags=tags)

    def artifacts(self, contents: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                path = Path(folder, legal_path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            with self._explained("store artifacts"):
                self._client.log_artifacts(self._id, folder)

    def params(self, plain: Mapping[str, Any]) -> None:
        """Record a job's options: whole as `config.json`, and one parameter each.

        MLflow's parameters cannot change, so those of a continued run keep their first values; what differs this
        time is told by the tag `unianom.changed_params`.
        """
        from mlflow.entities import Param

        self.json("config.json", dict(plain))
        flat = flatten(dict(plain))
        values = {legal_name(name): cut(to_text(value), MAX_PARAM) for name, value in flat.items()}
        with self._explained("read the run"):
            before = self._client.get_run(self._id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in before]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            batch = new[start : start + _PARAMS_PER_BATCH]
            with self._explained("record options"):
                self._client.log_batch(self._id, params=batch)
        changed = {name: value for name, value in values.items() if before.get(name, value) != value}
        if changed:
            self.tags({"unianom.changed_params": changed})

    def register_model(self, model_uri: str, name: str, alias: str = CANDIDATE) -> str | None:
        from unianom.model import is_model

        if not is_model(model_uri):
            raise ModelError(f"{mask_credentials(model_uri)} holds no finished model; give the folder of a trained one")
        digest = files.sha256_file(files.join(model_uri, "model.json"))
        with self._explained(f"register model '{name}'"), global_tracking_uri(self._tracking_uri):
            return self._register(model_uri, digest, name, alias)

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
        holder = self._client.get_registered_model(name).aliases.get(alias)
        if holder is None or int(holder) < int(number):
            self._client.set_registered_model_alias(name, alias, number)
        return number

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

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        with self._explained("end the run"):
            self._client.set_terminated(self._id, status)

    def _explained(self, what: str) -> AbstractContextManager[None]:
        return explained(f"cannot {what} in MLflow at {self.uri}", "run the same command again, it continues")


def open_run(uri: str, experiment: str, job: str, output: str, plan: str, parent: str | None) -> MlflowRun:
    """Return the job's run, new or continued."""
    from mlflow import MlflowClient

    where = f"cannot record in MLflow at {mask_credentials(uri)}"
    cure = "mend --tracking.mlflow_uri or MLFLOW_TRACKING_URI, or turn recording off with --tracking.enabled false"
    with explained(where, cure):
        client = MlflowClient(uri)
        experiment_id = experiment_id_of(client, experiment, artifact_folder(uri))
        shown = mask_credentials(output)
        key = files.digest_of([job, output, plan])
        found = client.search_runs([experiment_id], f"tags.`unianom.key` = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {
                "unianom.key": key,
                "unianom.job": job,
                "unianom.output": cut(shown, MAX_TAG),
                "unianom.version": unianom.__version__,
            }
            if plan:
                tags["unianom.plan"] = plan
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            name = f"{job} {shown.rstrip('/').rsplit('/', 1)[-1]}"
            run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    return MlflowRun(client, uri, experiment_id, run_id)


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

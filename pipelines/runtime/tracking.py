"""MLflow: one run per job, found again when the job is; the logged model and its place in the registry.

Importing this module touches nothing of MLflow. While a run is tracked, MLflow's progress bars, chatter and usage
reports are off, unless the user's environment says otherwise; afterwards all is as it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat
from urllib.parse import quote

import unianom
from pipelines.runtime.options import TrackingOptions
from unianom import files
from unianom.data.image import encode_png
from unianom.errors import ModelError, OptionError, UnianomError
from unianom.model import is_model, local_copy
from unianom.options import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_SCRIPT = Path(__file__).with_name("mlflow_model.py")
CANDIDATE = "candidate"
"""Alias of the version registered last; "champion" is given by people."""

_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# A wrong address should show within seconds of the start; later, when hours of work are at stake, MLflow's own
# patience of minutes holds.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

_MAX_PARAM, _MAX_TAG = 6000, 5000
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000


class TrackingError(UnianomError):
    """The MLflow tracking server, database or artifact store cannot be used."""


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
        self.artifacts({name: json.dumps(_mask_all(content), indent=2, ensure_ascii=False).encode() + b"\n"})

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
            Metric(_legal_name(name), float(value), now, step or 0)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            batch = metrics[start : start + _METRICS_PER_BATCH]
            with self._explained("record metrics"):
                self._client.log_batch(self._id, metrics=batch)

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_legal_name(name), _cut(_to_text(value), _MAX_TAG)) for name, value in values.items()]
        with self._explained("set tags"):
            self._client.log_batch(self._id, tags=tags)

    def artifacts(self, contents: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                path = Path(folder, _legal_path(name))
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
        values = {_legal_name(name): _cut(_to_text(value), _MAX_PARAM) for name, value in flat.items()}
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
        if not is_model(model_uri):
            raise ModelError(f"{mask_credentials(model_uri)} holds no finished model; give the folder of a trained one")
        digest = files.sha256_file(files.join(model_uri, "model.json"))
        with self._explained(f"register model '{name}'"), _tracking_uri(self._tracking_uri):
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

        signature = ModelSignature(
            inputs=Schema([ColSpec("binary", "image"), ColSpec("string", "category", required=False)]),
            outputs=Schema(
                [
                    ColSpec("double", "score"),
                    ColSpec("string", "decision", required=False),
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
        return _explained(f"cannot {what} in MLflow at {self.uri}", "run the same command again, it continues")


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
    output = files.full_uri(output)
    with _environment(_QUIET), _quiet_loggers():
        uri = options.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or _default_uri(default_folder, output)
        if uri is None:
            print(
                f"not recorded in MLflow: {mask_credentials(output)} lies on an object store, beside which MLflow can "
                f"keep no SQLite file; give a server with --tracking.mlflow_uri or MLFLOW_TRACKING_URI"
            )
            yield Run()
            return
        with _environment(_IMPATIENT):
            run = _open_run(uri, options.experiment, job, output, plan, parent)
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


def _open_run(uri: str, experiment: str, job: str, output: str, plan: str, parent: str | None) -> MlflowRun:
    """The job's run, new or continued."""
    from mlflow import MlflowClient

    where = f"cannot record in MLflow at {mask_credentials(uri)}"
    cure = "mend --tracking.mlflow_uri or MLFLOW_TRACKING_URI, or turn recording off with --tracking.enabled false"
    with _explained(where, cure):
        client = MlflowClient(uri)
        experiment_id = _experiment(client, experiment, _artifact_folder(uri))
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
                "unianom.output": _cut(shown, _MAX_TAG),
                "unianom.version": unianom.__version__,
            }
            if plan:
                tags["unianom.plan"] = plan
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            name = f"{job} {shown.rstrip('/').rsplit('/', 1)[-1]}"
            run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    return MlflowRun(client, uri, experiment_id, run_id)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of the experiment, made if it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job made it meanwhile
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise OptionError(
            f"the MLflow experiment '{name}' was deleted; restore it (mlflow experiments restore -x "
            f"{found.experiment_id}) or choose another with --tracking.experiment"
        )
    return found.experiment_id


def _default_uri(default_folder: str | None, output: str) -> str | None:
    """The SQLite store beside the output; None beside an output that is not on this machine's disk."""
    if not files.is_local(default_folder or output):
        return None
    path = Path(files.full_uri(default_folder)) if default_folder else Path(output).parent
    path.mkdir(parents=True, exist_ok=True)
    _check_store(path / "mlflow.db")
    return sqlite_uri(path / "mlflow.db")


def _check_store(path: Path) -> None:
    """Refuse a file that is not MLflow's: MLflow would make its tables in anybody's database.

    Raises:
        TrackingError: it is no SQLite file, or one with tables of something else, or a link that leads nowhere.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_file() and path.stat().st_size == 0:
        return
    cure = (
        "give a server with --tracking.mlflow_uri, move that file, or turn recording off with --tracking.enabled false"
    )
    if not path.is_file():  # opening a named pipe would wait for ever
        raise TrackingError(f"{path} is no file, or a link that leads nowhere; {cure}")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            return  # another job is making it
        raise TrackingError(f"{path} is no SQLite file of MLflow ({error}); {cure}") from error
    if "experiments" not in tables and tables - _mlflow_tables():  # some of its own: another job is making it
        raise TrackingError(f"{path} is a database of something else ({', '.join(sorted(tables)[:3])}); {cure}")


def _mlflow_tables() -> set[str]:
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.dbmodels import models  # noqa: F401  # declares them

    return {"alembic_version", *Base.metadata.tables}


def sqlite_uri(path: Path) -> str:
    """MLflow's URI of an SQLite file.

    Raises:
        TrackingError: its name cannot be written as a URI.
    """
    plain = f"sqlite:///{path}"
    if not set("?%#") & set(plain):
        return plain
    from sqlalchemy import make_url

    # Escaped whole, separators too: MLflow makes the folders that it reads in a URI without unescaping them. How much
    # is unescaped differs by version of SQLAlchemy, so it is asked.
    for uri in (plain, f"sqlite:///{quote(str(path), safe='')}"):
        url = make_url(uri)
        if url.database == str(path) and not url.query:
            return uri
    raise TrackingError(
        f"MLflow cannot keep an SQLite file at {path}, because of its '?' or '%'; rename the folder, or give a server "
        f"with --tracking.mlflow_uri"
    )


def _artifact_folder(uri: str) -> str | None:
    """Where the artifacts of an SQLite store lie: MLflow would put them into the working directory."""
    if not uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    return (Path(make_url(uri).database or "").absolute().parent / "mlartifacts").as_uri()


def pinned_requirements() -> list[str]:
    """What a model needs to run, in the versions installed here."""
    names = ["torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pyarrow", "fsspec", "scipy", "pyyaml"]
    names += ["annotated-types"]
    pins = [f"{name}=={_public_version(name)}" for name in names]
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            return [*pins, f"{name}=={_public_version(name)}"]
        except PackageNotFoundError:
            continue
    raise TrackingError("neither faiss-cpu nor faiss-gpu is installed, so the model cannot say what it needs")


def _public_version(name: str) -> str:
    """Without a local part such as "+cu130", which package indexes do not know."""
    return version(name).split("+")[0]


def _example_image() -> bytes:
    """A small grey ramp as PNG."""
    import numpy as np

    return encode_png(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))


_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:sig|token|key|secret|password|credential)[^=&\s]*=)[^&\s\"',;]+", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """Text with user names, passwords and secret query values taken out of its URIs."""
    return _SECRET.sub(r"\1***", _USERINFO.sub("***@", text))


def _mask_all(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _mask_all(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_mask_all(value) for value in plain]
    return mask_credentials(plain) if isinstance(plain, str) else plain


def _to_text(value: Any) -> str:
    """As it is written in YAML and on the command line, without credentials."""
    return mask_credentials(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}… ({len(text)} long)"


def scope(category: str) -> str:
    """Return what the metrics of one category are grouped by: its name, told apart from what is measured over all."""
    if category.split("/")[0] not in _OVER_ALL:
        return category
    return f"{category}-{files.sha256_of(category.encode())[:8]}"


_OVER_ALL = ("mean", "union", "calibrated", "best", "figures")


def _legal_name(name: str) -> str:
    """Return the name of a metric, parameter or tag as MLflow allows it, of one length at most.

    Parts between "/" that are harmless stay; others are cleaned and told apart by a digest, so no two names become one.
    """
    parts = [
        part if _HARMLESS.fullmatch(part) and part.strip(".") else files.safe_name(part) for part in name.split("/")
    ]
    legal = "/".join(parts)
    if len(legal) > _MAX_NAME:
        return f"{legal[: _MAX_NAME - 9]}-{files.sha256_of(name.encode())[:8]}"
    return legal


_HARMLESS = re.compile(r"[\w.\- ]+")
_MAX_NAME = 250


def _legal_path(name: str) -> str:
    """Return the path of an artifact inside its run; parts that would lead elsewhere or that no disk takes are
    cleaned."""
    parts = name.split("/")
    return "/".join(
        part if part.strip(".") and len(part.encode()) <= 250 and not set(part) & set("\\\0") else files.safe_name(part)
        for part in parts
    )


@contextmanager
def _explained(what: str, cure: str) -> Iterator[None]:
    """Turn what MLflow raises into one sentence."""
    try:
        yield
    except UnianomError:
        raise
    except Exception as error:  # MLflow passes on whatever its database, network or artifact store raises
        raise TrackingError(f"{what}: {_cut(mask_credentials(_reason(error)), 300)}; {cure}") from error


def _reason(error: BaseException) -> str:
    """The system's own words where disk or network failed, else MLflow's, on one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.strerror):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of the block; those that the user has set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Warnings and errors only from MLflow and its database migrations, for the length of the block."""
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
def _tracking_uri(uri: str) -> Iterator[None]:
    """MLflow's global tracking URI, without which no model is logged or registered, for the length of the block."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow keeps its global in this variable as well
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]

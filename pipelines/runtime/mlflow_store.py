"""Where MLflow keeps runs: its store, experiment and artifacts, and the run of a job in them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import unianom
from pipelines.runtime.mlflow_environment import TrackingError
from pipelines.runtime.mlflow_text import MAX_TAG, cut, mask_credentials
from unianom import files
from unianom.errors import OptionError

if TYPE_CHECKING:
    from mlflow import MlflowClient


ERROR = "unianom.error"
"""Tag of what ended a run that failed."""


@dataclass(frozen=True)
class RunIdentity:
    """By what the run of a job is found again.

    Attributes:
        experiment: MLflow experiment.
        job: name of the job.
        output: path or URI of what it makes.
        plan: digest of what the output depends on; empty if there is none.
    """

    experiment: str
    job: str
    output: str
    plan: str


def open_run(uri: str, identity: RunIdentity, parent_id: str | None) -> tuple[MlflowClient, str, str]:
    """Return a client, the experiment's id and that of the job's run, which is new or continued.

    Args:
        uri: tracking URI.
        identity: of the run.
        parent_id: of the run that a new one belongs to.

    Raises:
        OptionError: the experiment was deleted.
        Exception: whatever MLflow raises.
    """
    from mlflow import MlflowClient

    _check_database(uri)
    client = MlflowClient(uri)
    experiment_id = experiment_id_of(client, identity.experiment, artifact_folder(uri))
    shown = mask_credentials(identity.output)
    key = files.digest_of([identity.job, identity.output, identity.plan])
    found = client.search_runs([experiment_id], f"tags.`unianom.key` = '{key}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        if ERROR in found[0].data.tags:
            client.delete_tag(run_id, ERROR)
    else:
        tags = {
            "unianom.key": key,
            "unianom.job": identity.job,
            "unianom.output": cut(shown, MAX_TAG),
            "unianom.version": unianom.__version__,
        }
        if identity.plan:
            tags["unianom.plan"] = identity.plan
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        name = f"{identity.job} {shown.rstrip('/').rsplit('/', 1)[-1]}"
        run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    return client, experiment_id, run_id


def _check_database(uri: str) -> None:
    """Connect to a database server once: MLflow would try for minutes."""
    from mlflow.store.db.db_types import DATABASE_ENGINES, SQLITE
    from sqlalchemy import create_engine

    if uri.split("://")[0].split("+")[0] in set(DATABASE_ENGINES) - {SQLITE}:
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()


def experiment_id_of(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment, made if it is not there."""
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


def default_uri(default_folder: str | None, output: str) -> str | None:
    """Return the SQLite store beside the output; None beside an output that is not on this machine's disk."""
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
    """Return MLflow's URI of an SQLite file.

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


def artifact_folder(uri: str) -> str | None:
    """Return where the artifacts of an SQLite store lie: MLflow would put them into the working directory."""
    if not uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    return (Path(make_url(uri).database or "").absolute().parent / "mlartifacts").as_uri()

import base64
import csv
import http.server
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlparse, urlsplit
from urllib.request import url2pathname

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

import unianom
from pipelines.runtime import mlflow_queue, mlflow_run
from pipelines.runtime.mlflow_environment import TrackingError
from pipelines.runtime.mlflow_run import MlflowRun, pinned_requirements
from pipelines.runtime.mlflow_store import RunIdentity, artifact_folder, open_run, sqlite_uri
from pipelines.runtime.mlflow_text import legal_name, mask_credentials
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.run_record import CANDIDATE, Run
from pipelines.runtime.tracking import scope, track
from pipelines.training.options import train_options
from unianom import files
from unianom.configs.backbone import BackboneConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.data.image import InputPolicy, decode_map, encode_png
from unianom.errors import ModelError, OptionError
from unianom.memory.index import MemoryBank
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model
from unianom.thresholds import fit_threshold

OPTIONS = TrackingOptions()

pytestmark = [  # of MLflow's own, with SQLAlchemy 2.1 and pandas 3
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the module, since making MLflow's database takes seconds."""
    return tmp_path_factory.mktemp("räw runs")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Every test runs in an empty folder and leaves nothing there; no tracking server of the user's is touched."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.glob("ml*")) == []


@pytest.fixture(scope="module")
def client(folder):
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def artifact(client, run, name):
    return Path(unquote(urlsplit(client.get_run(run.id).info.artifact_uri).path), name)


def save_model(path, seed=0):
    config = UniFormalyConfig(
        backbone=BackboneConfig("vit_tiny_patch16_224", weights="random"),
        input=InputPolicy(resize="stretch", size=32, crop=None),
        blocks=(0, 1),
        attention_block=2,
    )
    vectors = np.random.default_rng(seed).normal(size=(20, 192)).astype(np.float32)
    method = UniFormaly(config, MemoryBank.build(vectors))
    threshold = fit_threshold(np.linspace(0, 1, 100), target_fpr=0.1)
    model = Model(method.eval(), ["tile"], threshold)
    model.save(path)
    return model


def test_a_run_holds_options_metrics_and_files(folder, client):
    params = {"bank": {"coreset_ratio": 0.1, "lists": [1, 2]}, "seed": None, "method": "uniformaly", "empty": {}}
    with track(OPTIONS, "evaluate", f"{folder}/evaluation", params) as run:
        run.metrics({"mean/image_auroc": 0.75, "tile/aupro": None, "x": float("nan"), "y": float("inf")})
        run.metrics({"loss": np.float32(0.5)}, step=10)
        run.metrics({"loss": 0.25}, step=20)
        run.tags({"unianom.shards": "abc"})
        run.table("categories.csv", [{"category": "a,b", "n": 1}, {"category": "c", "aupro": 0.5}])
        run.figures({"roc.png": b"png"})
        run.json("evaluation.json", {"mean": {"ü": None}})
        run.artifact_bytes("report/page.html", b"<p>")
        assert client.get_run(run.id).info.status == "RUNNING"
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "evaluate evaluation"
    assert client.get_experiment(found.info.experiment_id).name == "unianom"
    assert found.data.params == {
        "bank.coreset_ratio": "0.1",
        "bank.lists": "[1, 2]",
        "seed": "null",
        "method": "uniformaly",
        "empty": "{}",
    }
    assert found.data.metrics == {"mean/image_auroc": 0.75, "loss": 0.25}
    assert [(m.step, m.value) for m in client.get_metric_history(run.id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert found.data.tags["unianom.shards"] == "abc"
    assert found.data.tags["unianom.output"] == f"{folder}/evaluation"
    rows = list(csv.DictReader(artifact(client, run, "categories.csv").open()))
    assert rows == [{"category": "a,b", "n": "1", "aupro": ""}, {"category": "c", "n": "", "aupro": "0.5"}]
    assert artifact(client, run, "figures/roc.png").read_bytes() == b"png"
    assert json.loads(artifact(client, run, "evaluation.json").read_bytes()) == {"mean": {"ü": None}}
    assert json.loads(artifact(client, run, "config.json").read_bytes()) == params
    assert artifact(client, run, "report/page.html").read_bytes() == b"<p>"


@pytest.mark.parametrize("content", [b"my notes", None])
def test_a_file_of_that_name_that_is_not_mlflow_s_stays(tmp_path, content):
    path = tmp_path / "mlflow.db"
    if content is not None:
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("create table holidays (day text)")
            connection.execute("create table runs (day text)")
    before = path.read_bytes()
    words = "is no SQLite file of MLflow" if content else r"is a database of something else \(holidays, runs\)"
    sentence = rf"mlflow.db {words}.*--tracking.mlflow_uri"
    with pytest.raises(TrackingError, match=sentence), track(OPTIONS, "evaluate", str(tmp_path / "output"), {}):
        pass
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["mlflow.db"]
    path.unlink()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    """SQLite would wait for ever at a named pipe, and MLflow try for minutes to make what a link leads to."""
    path = tmp_path / "mlflow.db"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda at: at.symlink_to("nowhere/mlflow.db")}[kind](path)
    with (
        pytest.raises(TrackingError, match=r"mlflow.db is no file, or a link that leads nowhere; give a server"),
        track(OPTIONS, "evaluate", str(tmp_path / "output"), {}),
    ):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["mlflow.db"]
    (Path.rmdir if kind == "folder" else Path.unlink)(path)


def test_the_store_lies_beside_the_output(folder, client):
    with track(OPTIONS, "ingest", f"{folder}/shards", {}) as run:
        pass
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("ml")) == ["mlartifacts", "mlflow.db"]
    assert artifact(client, run, "config.json").is_relative_to(folder / "mlartifacts")
    assert run.uri == f"sqlite:///{folder}/mlflow.db"


def test_the_same_job_continues_its_run(folder):
    def run_id(job="train", output="model", plan="p"):
        with track(OPTIONS, job, f"{folder}/{output}", {"seed": 1}, plan=plan) as run:
            return run.id

    first = run_id()
    assert run_id() == first
    others = {run_id(job="score"), run_id(output="model2"), run_id(plan="q")}
    assert len(others) == 3
    assert first not in others


def test_a_continued_run_keeps_its_options_and_tells_of_changed_ones(folder, client):
    with track(OPTIONS, "train", f"{folder}/changing", {"workers": 1, "seed": 0}):
        pass
    with track(OPTIONS, "train", f"{folder}/changing", {"workers": 2, "seed": 0, "new": True}) as run:
        pass
    data = client.get_run(run.id).data
    assert data.params == {"workers": "1", "seed": "0", "new": "true"}
    assert json.loads(data.tags["unianom.changed_params"]) == {"workers": "2"}
    assert json.loads(artifact(client, run, "config.json").read_bytes())["workers"] == 2


def test_many_and_long_values(folder, client):
    params = {"long": "x" * 7000, "group": {f"p{n}": n for n in range(250)}}
    with track(OPTIONS, "train", f"{folder}/many", params) as run:
        run.metrics({f"m{n}": n for n in range(1500)})
        run.metrics({"tile (new)/AUROC": 1})
    data = client.get_run(run.id).data
    assert len(data.params) == 251
    assert len(data.params["long"]) <= 6000
    assert data.params["long"].endswith("x… (7000 long)")
    assert json.loads(artifact(client, run, "config.json").read_bytes())["long"] == "x" * 7000
    assert len(data.metrics) == 1501
    assert data.metrics["m1234"] == 1234
    assert data.metrics["tile _new_-382cbf84/AUROC"] == 1


@pytest.mark.parametrize(("error", "status"), [(ValueError("no good"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_an_error_ends_the_run_and_goes_on(folder, client, error, status):
    output = f"{folder}/failing-{status}"
    with pytest.raises(type(error)) as caught, track(OPTIONS, "train", output, {}) as run:
        raise error
    assert caught.value is error
    found = client.get_run(run.id)
    assert found.info.status == status
    assert found.data.tags["unianom.error"] == f"{type(error).__name__}: {error}"
    with track(OPTIONS, "train", output, {}) as again:
        assert client.get_run(again.id).info.status == "RUNNING"
    assert again.id == run.id
    ended = client.get_run(run.id)
    assert ended.info.status == "FINISHED"
    assert "unianom.error" not in ended.data.tags


class Away:
    """A client of a server that answers only when told to, in front of a real one."""

    def __init__(self, client):
        self.client, self.away, self.asked = client, True, 0

    def __getattr__(self, name):
        self.asked += 1
        if self.away:
            raise ConnectionRefusedError(111, "Connection refused")
        return getattr(self.client, name)


@pytest.fixture
def away(client, monkeypatch):
    """MLflow as every run finds it from now on: not there, and not waited for."""
    stand_in = Away(client)

    def opened(uri, identity, parent_id):
        if stand_in.away:
            raise ConnectionRefusedError(111, "Connection refused")
        _, experiment_id, run_id = open_run(uri, identity, parent_id)
        return stand_in, experiment_id, run_id

    monkeypatch.setattr(mlflow_run, "open_run", opened)
    monkeypatch.setattr(mlflow_queue, "PATIENCE", 0.0)
    monkeypatch.setattr(mlflow_queue, "FIRST_PAUSE", 0.0)
    return stand_in


def test_what_is_recorded_while_the_server_is_away_is_sent_when_it_answers(folder, client, away, capfd):
    with track(OPTIONS, "train", f"{folder}/away", {"seed": 3}) as run:
        run.metrics({"loss": 0.5}, step=1)
        run.artifact_bytes("a.txt", b"a")
        with track(OPTIONS, "trial", f"{folder}/away/1", {}, default_folder=str(folder), parent=run) as trial:
            trial.metrics({"x": 1.0})
        assert (run.id, trial.id) == (None, None)
        away.away = False
        run.metrics({"loss": 0.25}, step=2)
    assert [(m.step, m.value) for m in client.get_metric_history(run.id, "loss")] == [(1, 0.5), (2, 0.25)]
    found, child = client.get_run(run.id), client.get_run(trial.id)
    assert found.data.params == {"seed": "3"}
    assert artifact(client, run, "a.txt").read_bytes() == b"a"
    assert (found.info.status, child.info.status, child.data.metrics) == ("FINISHED", "FINISHED", {"x": 1.0})
    assert child.data.tags["mlflow.parentRunId"] == run.id
    assert "unianom.missing" not in found.data.tags
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"MLflow at sqlite:///{folder}/mlflow.db cannot be used for now (")
    assert "Connection refused" in first
    assert last == f"MLflow at sqlite:///{folder}/mlflow.db answers again, and what waited was sent"


def test_a_server_that_stays_away_costs_a_sentence(folder, client, away, capfd):
    with track(OPTIONS, "train", f"{folder}/lost", {"seed": 3}) as run:
        run.metrics({"loss": 0.5}, step=1)
        run.metrics({"loss": 0.25}, step=2)
        run.artifact_bytes("a.txt", b"a")
    _, last = capfd.readouterr().err.splitlines()
    assert last == (
        f"not all of this job is recorded in MLflow at sqlite:///{folder}/mlflow.db ([Errno 111] Connection refused): "
        f"there are missing runs (1), options (1), metrics (2), ends of runs (1), files (2); the same command, run "
        f"again, records its results"
    )
    model = folder / "unregistered"
    save_model(str(model))
    cannot = "cannot register model 'demo' in MLflow.*refused; the model itself is complete: run the same command again"
    with pytest.raises(TrackingError, match=cannot), track(OPTIONS, "train", str(model), {}) as run:
        run.register_model(str(model), "demo")


def test_a_server_that_goes_away_leaves_a_run_to_go_on_with(folder, client, away):
    away.away = False
    with track(OPTIONS, "train", f"{folder}/halfway", {}) as run:
        run.metrics({"loss": 0.5}, step=1)
        away.away = True
        run.metrics({"loss": 0.25}, step=2)
    assert client.get_run(run.id).info.status == "RUNNING"
    away.away = False
    with track(OPTIONS, "train", f"{folder}/halfway", {}) as again:
        again.metrics({"loss": 0.125}, step=3)
    assert again.id == run.id
    assert [m.step for m in client.get_metric_history(run.id, "loss")] == [1, 3]
    assert client.get_run(run.id).info.status == "FINISHED"


def test_a_server_that_is_away_is_asked_less_and_less_often(folder, away, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(mlflow_queue.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(mlflow_queue, "FIRST_PAUSE", 5.0)
    away.away = False
    asked = []
    with track(OPTIONS, "train", f"{folder}/seldom", {}) as run:
        away.away = True
        for now[0] in range(1000):
            before = away.asked
            run.metrics({"loss": 0.5}, step=now[0])
            asked += [now[0]] * (away.asked > before)
    assert asked == [0, 5, 15, 35, 75, 155, 315, 615, 915]


def test_what_is_refused_is_said_and_holds_up_nothing(folder, client, monkeypatch, capfd):
    with track(OPTIONS, "train", f"{folder}/refused", {}) as run:
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_run, "legal_name", lambda name: name)
            run.tags({"what?": 1})
        run.metrics({"loss": 0.5})
    found = client.get_run(run.id)
    assert found.data.metrics == {"loss": 0.5}
    assert found.data.tags["unianom.missing"] == "tags (1)"
    assert found.info.status == "FINISHED"
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"MLflow at sqlite:///{folder}/mlflow.db refuses tags (")
    assert "there are missing tags (1); the same command" in last


def test_a_job_s_own_error_is_not_hidden_by_a_lost_server(folder, away):
    with pytest.raises(ValueError, match="no good"), track(OPTIONS, "train", f"{folder}/lost", {}):
        raise ValueError("no good")


def test_trials_belong_to_their_parent(folder, client):
    with (
        track(OPTIONS, "tune", f"{folder}/tune", {}) as parent,
        track(OPTIONS, "trial", f"{folder}/tune/1", {}, default_folder=str(folder), parent=parent) as child,
    ):
        pass
    assert client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id
    assert client.get_run(parent.id).info.status == "FINISHED"


def test_nothing_global_is_left_changed_and_nothing_printed(folder, capfd):
    environment, logger = dict(os.environ), logging.getLogger("mlflow")
    level, uri = logger.level, mlflow.get_tracking_uri()
    model = folder / "global"
    save_model(str(model))
    with track(OPTIONS, "train", str(model), {}) as run:
        assert os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] == "false"
        assert logger.getEffectiveLevel() == logging.WARNING
        run.register_model(str(model), "global")
    assert dict(os.environ) == environment
    assert logger.level == level
    assert mlflow.get_tracking_uri() == uri
    assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")


def test_a_job_that_is_not_tracked_leaves_no_trace(tmp_path):
    with track(TrackingOptions(enabled=False), "train", str(tmp_path / "out" / "model"), {"a": 1}) as run:
        assert type(run) is Run
        run.metrics({"a": 1.0}, step=1)
        run.tags({"a": 1})
        run.table("t.csv", [{"a": 1}])
        run.figures({"a.png": b""})
        run.json("a.json", {})
        run.artifact_bytes("a", b"")
        assert run.register_model(str(tmp_path), "name") is None
        assert run.id is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:hunter2@host/path", "https://***@host/path"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("mail me@host", "mail me@host"),
        ("https://h/x?version=2&X-Amz-Signature=hunter2&b=1", "https://h/x?version=2&X-Amz-Signature=***&b=1"),
        ("two: ftp://a:b@c and ftp://d@e", "two: ftp://***@c and ftp://***@e"),
    ],
)
def test_credentials_are_masked(text, masked):
    assert mask_credentials(text) == masked


def test_no_credential_reaches_the_store(folder, monkeypatch):
    secret = "sftp://me:hunter2@host/weights.pth"
    params = {"weights": secret, "list": [{"uri": f"{secret}?token=hunter2"}, 1]}
    monkeypatch.setattr(files, "full_uri", lambda uri: uri)  # there is no SFTP here
    output = "sftp://me:hunter2@host/out"
    with track(OPTIONS, "train", output, params, default_folder=str(folder)) as run:
        run.json("source.json", params)
        run.tags({"source": [secret, 2]})
    with pytest.raises(ValueError), track(OPTIONS, "train", output, params, default_folder=str(folder)):
        raise ValueError(f"cannot read {secret}")
    holding = [path for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert holding == []
    assert b'[{"uri": "sftp://***@host/weights.pth?token=***"}, 1]' in (folder / "mlflow.db").read_bytes()


def test_an_output_on_an_object_store_needs_a_tracking_uri(folder, monkeypatch, capsys):
    with track(OPTIONS, "train", "memory://model", {}) as run:
        assert run.id is None
    said = capsys.readouterr().out
    assert "not recorded in MLflow: memory://" in said
    assert "--tracking.mlflow_uri" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    with track(OPTIONS, "train", "memory://bucket/model", {}) as run:
        assert run.uri == f"sqlite:///{folder}/mlflow.db"
    other = TrackingOptions(mlflow_uri="no-such-scheme://x")  # the option goes before the variable
    with pytest.raises(TrackingError, match="no-such-scheme"), track(other, "train", "memory://bucket/model", {}):
        pass


def test_options_are_checked():
    with pytest.raises(OptionError, match=r"experiment is empty"):
        TrackingOptions(experiment=" ")


def test_a_deleted_experiment_is_told(folder, client):
    options = TrackingOptions(experiment="old")
    with track(options, "train", f"{folder}/old", {}) as run:
        pass
    client.delete_experiment(client.get_run(run.id).info.experiment_id)
    with (
        pytest.raises(OptionError, match="'old' was deleted; restore it"),
        track(options, "train", f"{folder}/old", {}),
    ):
        pass


class Unavailable(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        self.send_error(503)

    def log_message(self, *arguments):
        pass


def test_a_server_out_of_order_is_told_soon(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_queue, "PATIENCE", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = TrackingOptions(mlflow_uri=f"http://me:hunter2@127.0.0.1:{server.server_port}")
    with track(options, "train", str(tmp_path / "model"), {}) as run:
        assert Unavailable.requests == 2  # MLflow's own default would be 8, over four minutes
        assert run.uri == f"http://***@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    said = capfd.readouterr().err
    where = f"MLflow at http://***@127.0.0.1:{server.server_port}"
    assert said.startswith(f"{where} cannot be used for now (too many 503 error responses); the job goes on")
    assert "hunter2" not in said
    with track(options, "train", str(tmp_path / "model"), {}):
        pass  # closed by now
    assert "Connection refused); the job goes on" in capfd.readouterr().err


@pytest.fixture(scope="module")
def registered(folder):
    """A model folder registered as "demo", and its version."""
    path = folder / "mödel a"
    model = save_model(str(path))
    with track(OPTIONS, "train", str(path), {"seed": 0}) as run:
        number = run.register_model(str(path), "demo")
    return path, model, number, run.id


def logged_folder(client, name):
    found = client.get_model_version_by_alias(name, CANDIDATE)
    return Path(unquote(urlsplit(client.get_model_version_download_uri(name, found.version)).path))


def test_the_registered_model_names_its_run_and_digest(registered, client):
    path, model, number, run_id = registered
    found = client.get_model_version_by_alias("demo", CANDIDATE)
    assert (str(found.version), found.run_id) == (number, run_id)
    assert found.tags["unianom.digest"] == model.digest == files.sha256_file(path / "model.json")
    (logged,) = client.get_run(run_id).outputs.model_outputs
    logged_model = client.get_logged_model(logged.model_id)
    assert (logged_model.source_run_id, logged_model.status) == (run_id, "READY")
    assert found.source == f"models:/{logged.model_id}"


def test_the_logged_model_holds_code_and_no_pickle(registered, client):
    root = logged_folder(client, "demo")
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    package = Path(unianom.__file__).parent
    assert {f"code/unianom/{path.relative_to(package)}" for path in package.rglob("*.py")} <= names
    assert "mlflow_model.py" in names
    assert [name for name in names if Path(name).suffix in (".pkl", ".pickle", ".pyc", ".pt", ".pth")] == []
    requirements = (root / "requirements.txt").read_text().split()
    assert {f"mlflow=={version('mlflow')}", f"timm=={version('timm')}"} <= set(requirements)


def test_the_same_model_is_registered_once(registered, folder, client):
    path, _, number, _ = registered
    other = folder / "mödel b"
    save_model(str(other), seed=1)
    with track(OPTIONS, "train", str(other), {}) as run:
        later = run.register_model(str(other), "demo")
    assert int(later) == int(number) + 1
    assert str(client.get_model_version_by_alias("demo", CANDIDATE).version) == later
    with track(OPTIONS, "train", str(path), {"seed": 0}) as run:
        assert run.register_model(str(path), "demo") == number
    assert len(client.search_model_versions("name = 'demo'")) == 2
    # the job that was run again is not the latest word on which model is the candidate
    assert str(client.get_model_version_by_alias("demo", CANDIDATE).version) == later
    client.delete_registered_model_alias("demo", CANDIDATE)
    with track(OPTIONS, "train", str(path), {"seed": 0}) as run:
        run.register_model(str(path), "demo")
    assert str(client.get_model_version_by_alias("demo", CANDIDATE).version) == number


def test_of_two_jobs_at_once_the_later_version_gets_the_alias(folder, client, monkeypatch):
    """The other one registers between this one's look at the alias and its own move of it."""
    models = [folder / "race a", folder / "race b"]
    for seed, path in enumerate(models):
        save_model(str(path), seed=seed)
    move, numbers = MlflowClient.set_registered_model_alias, []

    def overtaken(self, name, alias, version):
        if not numbers:
            numbers.append(version)
            with track(OPTIONS, "train", str(models[1]), {}) as other:
                numbers.append(other.register_model(str(models[1]), name))
        move(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overtaken)
    with track(OPTIONS, "train", str(models[0]), {}) as run:
        assert run.register_model(str(models[0]), "race") == "1"
    assert numbers == ["1", "2"]
    assert str(client.get_model_version_by_alias("race", CANDIDATE).version) == "2"


def test_a_remote_model_is_registered(registered, folder, client):
    path, model, _, _ = registered
    for file in path.rglob("*"):
        if file.is_file():
            files.write_bytes(f"memory://models/remote/{file.relative_to(path)}", file.read_bytes())
    with track(OPTIONS, "train", "memory://models/remote", {}, default_folder=str(folder)) as run:
        assert run.register_model("memory://models/remote", "remote") == "1"
    (kept,) = logged_folder(client, "remote").glob("artifacts/**/model.json")
    assert files.sha256_file(kept) == model.digest


def test_an_unfinished_model_is_not_registered(folder, tmp_path):
    with pytest.raises(ModelError, match="no finished model"), track(OPTIONS, "train", f"{folder}/none", {}) as run:
        run.register_model(str(tmp_path), "demo")


LOAD_AND_PREDICT = """
import ast, base64, json, os, sys
from pathlib import Path
import mlflow, pandas as pd
from mlflow.pyfunc import scoring_server
from starlette.testclient import TestClient

images = [base64.b64decode(text) for text in json.load(sys.stdin)]
model = mlflow.pyfunc.load_model("models:/demo/1")
frame = pd.DataFrame({"image": images}, index=[7, 8])
out = {"plain": model.predict(frame).to_dict("split")}
texts = pd.DataFrame({"image": [base64.b64encode(image).decode() for image in images]})
out["base64"] = model.predict(texts)["score"].tolist()
maps = model.predict(frame, params={"maps": True})
out["maps"] = [[base64.b64encode(r.anomaly_map).decode(), r.map_offset, r.map_scale] for r in maps.itertuples()]
mixed = pd.DataFrame({"image": [images[0][:40], images[0], "***", images[1], b""]}, index=list("abcde"))
mixed = model.predict(mixed, params={"maps": True})
out["mixed"] = json.loads(mixed.drop(columns="anomaly_map").to_json(orient="index"))
out["mixed maps"] = mixed["anomaly_map"].isna().tolist()
out["missing"] = model.unwrap_python_model().predict(None, pd.DataFrame({"image": [None]})).to_dict("records")
server = TestClient(scoring_server.init(model))
request = {"dataframe_split": {"columns": ["image"], "data": texts.values.tolist()}, "params": {"maps": True}}
answer = server.post("/invocations", json=request)
out["served"] = [answer.status_code, answer.json()]
answer = server.post("/invocations", json={"dataframe_records": [{"image": "AAAA"}, {"image": texts["image"][0]}]})
out["bad row"] = [answer.status_code, answer.json()]
code = [Path(m.__file__) for n, m in sys.modules.items() if n.split(".")[0] == "unianom"]
out["code"] = [str(path) for path in code]
nodes = [node for path in code for node in ast.walk(ast.parse(path.read_text()))]
names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
out["imports"] = sorted({name.split(".")[0] for name in names} - set(sys.stdlib_module_names))
out["pipelines"] = "pipelines" in sys.modules
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def fresh(registered, folder, tmp_path_factory):
    """What the logged model answers in a process that starts with nothing of this repository."""
    _, model, _, _ = registered
    generator = np.random.default_rng(0)
    images = [encode_png(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT],
        input=json.dumps([base64.b64encode(image).decode() for image in images]),
        env=variables | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return model, model.predict(images), json.loads(done.stdout.splitlines()[-1])


def test_a_fresh_process_scores_with_the_logged_code(fresh, folder):
    _, expected, out = fresh
    assert out["plain"]["index"] == [7, 8]
    assert out["plain"]["columns"] == ["score", "decision", "status", "error"]
    assert [row[0] for row in out["plain"]["data"]] == pytest.approx([r.score for r in expected], rel=1e-5)
    assert [row[1] for row in out["plain"]["data"]] == [r.decision for r in expected]
    assert out["base64"] == pytest.approx([r.score for r in expected], rel=1e-5)
    assert all(path.startswith(f"{folder}/mlartifacts/models/") and "/code/unianom/" in path for path in out["code"])
    assert len(out["code"]) > 5
    assert not out["pipelines"]


def test_anomaly_maps_come_on_request(fresh):
    _, expected, out = fresh
    for (png, offset, scale), result in zip(out["maps"], expected, strict=True):
        unpacked = decode_map(base64.b64decode(png), offset, scale)
        np.testing.assert_allclose(unpacked, result.anomaly_map, atol=scale + 1e-5)
        assert unpacked.shape == (32, 32)


def test_a_bad_image_is_a_row_with_its_status(fresh):
    _, expected, out = fresh
    mixed = out["mixed"]
    assert {row: told["status"] for row, told in mixed.items()} == dict(
        a="corrupt", b="ok", c="corrupt", d="ok", e="corrupt"
    )
    for row, result in (("b", expected[0]), ("d", expected[1])):
        assert mixed[row]["score"] == pytest.approx(result.score, rel=1e-5)
        assert mixed[row]["decision"] == result.decision
        assert mixed[row]["error"] is None
    for row in "ace":
        assert (mixed[row]["score"], mixed[row]["decision"], mixed[row]["map_scale"]) == (None, None, None)
    assert mixed["c"]["error"].startswith("the text in column 'image' is not base64")
    assert out["mixed maps"] == [True, False, True, False, True]
    (nothing,) = out["missing"]
    assert (nothing["status"], nothing["error"].split(";")[0]) == ("missing", "column 'image' holds NoneType")


def test_the_model_server_takes_base64_and_gives_maps(fresh):
    _, expected, out = fresh
    status, answer = out["served"]
    assert status == 200
    for row, result in zip(answer["predictions"], expected, strict=True):
        assert row["score"] == pytest.approx(result.score, rel=1e-5)
        assert row["decision"] == result.decision
        unpacked = decode_map(base64.b64decode(row["anomaly_map"]), row["map_offset"], row["map_scale"])
        np.testing.assert_allclose(unpacked, result.anomaly_map, atol=row["map_scale"] + 1e-5)
    status, answer = out["bad row"]
    bad, good = answer["predictions"]
    assert (status, bad["status"], bad["score"], good["status"]) == (200, "corrupt", None, "ok")
    assert good["score"] == pytest.approx(expected[0].score, rel=1e-5)


def test_the_pinned_packages_cover_what_the_logged_code_imports(fresh):
    distributions = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml", "annotated_types": "annotated-types"}
    # the first two are read where a network gets its first weights, and a model folder holds its own; PyTorch runs it
    elsewhere = {"huggingface_hub", "onnx", "openvino"}
    needed = {distributions.get(name, name) for name in fresh[2]["imports"]} - {"unianom"} - elsewhere
    pinned = {pin.split("==")[0].replace("faiss-gpu", "faiss-cpu") for pin in pinned_requirements()}
    assert needed <= pinned
    assert all("+" not in pin for pin in pinned_requirements())


# ---- names that come from data --------------------------------------------------------------------------------------


NAMES = [
    "a b",
    "a_b",
    "a:b",
    "a?b",
    "..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    "",
    ".",
    "a/./b",
    "x" * 400,
    "x" * 401,
    "a%b",
    "a\nb",
]


def test_every_name_is_legal_and_no_two_become_one():
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    legal = [legal_name(name) for name in NAMES]
    assert len(set(legal)) == len(NAMES)
    for name in legal:
        for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
            validate(name)
    for name in ("mean/image_auroc", "calibrated/metal nut/pixel_ap", "_x", "method.input.size", "螺丝/x", "a-b.c"):
        assert legal_name(name) == name


def test_a_category_is_not_taken_for_what_is_measured_over_all():
    names = ["mean", "union", "calibrated", "mean/x", "screw", "mvtec/screw"]
    scopes = [scope(name) for name in names]
    assert scopes[4:] == names[4:]
    assert not set(scopes[:4]) & set(names)
    assert len(set(scopes)) == len(names)


def test_artifacts_stay_inside_their_run(tmp_path, monkeypatch):
    seen = {}

    class Client:
        def log_artifacts(self, _, folder):
            seen.update({str(p.relative_to(folder)): p.read_text() for p in Path(folder).rglob("*") if p.is_file()})

    monkeypatch.setattr(mlflow_run, "open_run", lambda *_: (Client(), "1", "2"))
    run = MlflowRun("sqlite:///x", RunIdentity("e", "train", "o", ""))
    run.open()
    run.artifacts({"../up.txt": b"1", f"{tmp_path}/away.txt": b"2", "a/_b [c].txt": b"3", "y" * 300: b"4"})
    assert sorted(seen.values()) == ["1", "2", "3", "4"]
    assert seen["a/_b [c].txt"] == "3"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["My%20Data", "what ?x", "a#b&c=d;e", "100%", "%2e%2e", "ü [a]"])
def test_the_uri_of_a_store_leads_to_its_file(name):
    """As SQLAlchemy reads it; and MLflow, which makes the folder it sees in the URI, makes none that is not there."""
    from sqlalchemy import make_url

    uri = sqlite_uri(Path("/data", name, "mlflow.db"))
    assert (make_url(uri).database, dict(make_url(uri).query)) == (f"/data/{name}/mlflow.db", {})
    assert str(Path(uri.removeprefix("sqlite:///")).parent) in (".", f"/data/{name}")
    artifacts = artifact_folder(uri)
    assert url2pathname(urlparse(artifacts).path) == f"/data/{name}/mlartifacts"


def test_ordinary_stores_keep_their_uri():
    assert sqlite_uri(Path("/data/a b/mlflow.db")) == "sqlite:////data/a b/mlflow.db"


def test_a_store_lies_beside_the_output_whatever_its_name(tmp_path):
    folder = tmp_path / "My%20Data, what ?x #1"
    with track(TrackingOptions(), "evaluate", str(folder / "eval"), {}) as run:
        run.metrics({"a:b/../x": 1.0})
        run.artifacts({"a.txt": b"kept"})
        client = MlflowClient(sqlite_uri(folder / "mlflow.db"))
        assert [*client.get_run(run.id).data.metrics.values()] == [1.0]
        assert Path(client.download_artifacts(run.id, "a.txt")).read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert sorted(p.name for p in folder.iterdir()) == ["mlartifacts", "mlflow.db"]


@pytest.mark.parametrize("name", ["a/b", "a:b", "..", ""])
def test_a_name_that_no_registry_takes_is_refused_before_any_work(name):
    with pytest.raises(OptionError, match="register_as="):
        train_options()["patchcore"](shards="s", output="o", register_as=name)

"""Jobs that record themselves with MLflow's own server, on PostgreSQL and a store that speaks S3.

One server serves all tests, and two fixtures do the work: starting anything takes seconds.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

import unianom
from pipelines.runtime import mlflow_queue
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.run_record import CANDIDATE
from pipelines.runtime.tracking import track
from pipelines.training.options import ThresholdOptions, train_options
from pipelines.training.report import TrainingReport
from pipelines.training.train import train
from tests import mlflow_server, postgresql, s3_server
from tests.methods.conftest import INPUT, RECONSTRUCTION
from tests.pipelines.conftest import HERE, Small
from unianom import files
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.training import TrainingConfig
from unianom.configs.uniad import UniADConfig
from unianom.options import to_plain

ROOT = Path(__file__).parents[3]
PATCHCORE = PatchCoreConfig(
    backbone=BackboneConfig("resnet10t", weights="random"),
    input=INPUT,
    bank=BankConfig(coreset_ratio=0.2),
    dimension=32,
)
UNIAD = UniADConfig(**RECONSTRUCTION, neighbours=3, training=TrainingConfig(iterations=12, batch_size=4))

pytestmark = [  # of MLflow's own, with SQLAlchemy 2.1 and pandas 3
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),
]


@dataclass(frozen=True)
class Stores:
    """What runs beside the tests.

    Attributes:
        server: MLflow's.
        database: URI of its PostgreSQL.
        s3: where its artifacts are.
    """

    server: mlflow_server.Server
    database: str
    s3: s3_server.Server

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server.uri)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a job."""
        return {
            **s3_server.ENVIRONMENT,
            "AWS_ENDPOINT_URL": self.s3.endpoint,
            "MLFLOW_TRACKING_URI": self.server.uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def keys(self, prefix: str) -> set[str]:
        """Return the keys of objects below a prefix, without it."""
        answer = self.s3.client().list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {found["Key"].removeprefix(prefix) for found in answer.get("Contents", [])}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    reason = postgresql.missing()
    if reason is None and importlib.util.find_spec("psycopg2") is None:
        reason = "psycopg2 is not installed (pip install psycopg2-binary)"
    if reason is not None:
        pytest.skip(reason)
    with postgresql.serving() as database, s3_server.serving() as s3, pytest.MonkeyPatch.context() as patch:
        s3.empty()
        found = {**s3_server.ENVIRONMENT, "AWS_ENDPOINT_URL": s3.endpoint}
        folder = tmp_path_factory.mktemp("mlflow")
        with mlflow_server.serving(database, "s3://bucket/sent", found, folder) as server:
            stores = Stores(server, database, s3)
            for name, value in stores.environment.items():
                patch.setenv(name, value)
            yield stores


def patchcore_options(small: Small, output: Path, **changes: Any) -> Any:
    return train_options()["patchcore"](
        shards=str(small.shards),
        output=str(output),
        **{
            "method": PATCHCORE,
            "runtime": HERE,
            "threshold": ThresholdOptions(target_fpr=0.6, source="held_out", validation_fraction=0.5),
            "register_as": "parts",
            **changes,
        },
    )


def run_of(client: MlflowClient, output: Path, experiment: str = "unianom") -> Any:
    """Return the one run of a job."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], f"tags.`unianom.output` = '{output}'")
    return run


def digest(model: Path) -> str:
    return files.sha256_file(model / "model.json")


# ------------------------------------------------------------------------------------------------- two jobs at once
@pytest.fixture(scope="module")
def two(stores: Stores, small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The models of two jobs that registered by the same name at the same time, one of them in this process."""
    folder = tmp_path_factory.mktemp("two jobs")
    here, there = patchcore_options(small, folder / "here"), patchcore_options(small, folder / "there", seed=1)
    recipe = folder / "there.yaml"
    recipe.write_text(yaml.safe_dump({name: value for name, value in to_plain(there).items() if value is not None}))
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "patchcore", "--config", str(recipe)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None and stores.client.get_experiment_by_name("unianom") is None:
        time.sleep(0.1)  # it is still importing PyTorch
    train(here)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "registered in MLflow: parts version" in said
    return folder / "here", folder / "there"


def test_both_jobs_are_recorded_whole(stores: Stores, two: tuple[Path, Path]) -> None:
    for seed, output in enumerate(two):
        run = run_of(stores.client, output)
        assert run.info.status == "FINISHED"
        assert run.data.params["method.dimension"] == "32"
        assert run.data.params["seed"] == str(seed)
        model = unianom.load(str(output))
        assert model.threshold is not None
        assert run.data.metrics["threshold"] == pytest.approx(model.threshold.value)
        assert run.data.metrics["images"] == 12
        stored = stores.keys(f"sent/{run.info.experiment_id}/{run.info.run_id}/artifacts/")
        assert stored == {"config.json", "model.json"}
        assert (
            Path(stores.client.download_artifacts(run.info.run_id, "model.json")).read_bytes()
            == (output / "model.json").read_bytes()
        )


def test_both_models_are_registered_and_the_later_one_is_the_candidate(stores: Stores, two: tuple[Path, Path]) -> None:
    found = stores.client.search_model_versions("name = 'parts'")
    by_version = {int(version.version): version.tags["unianom.digest"] for version in found}
    assert sorted(by_version) == [1, 2]
    assert set(by_version.values()) == {digest(output) for output in two}
    assert int(stores.client.get_model_version_by_alias("parts", CANDIDATE).version) == 2
    assert {version.run_id for version in found} == {run_of(stores.client, output).info.run_id for output in two}


def test_the_same_job_adds_nothing(stores: Stores, small: Small, two: tuple[Path, Path]) -> None:
    before = run_of(stores.client, two[0])
    train(patchcore_options(small, two[0]))
    assert run_of(stores.client, two[0]).data.params == before.data.params
    assert len(stores.client.search_model_versions("name = 'parts'")) == 2


# --------------------------------------------------------------------------------------- a server started once more
@dataclass(frozen=True)
class Training:
    """A training that was interrupted, continued, and lost its server for a while.

    Attributes:
        output: its model.
        first: its run after it was interrupted.
        losses: by step, as the job had them.
        said: what it wrote to stderr.
    """

    output: Path
    first: Any
    losses: dict[int, float]
    said: str


@pytest.fixture(scope="module")
def training(
    stores: Stores, two: tuple[Path, Path], small: Small, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    """Interrupted at step 6; then without the server from step 7 to 10, where one starts whose clients use S3."""
    output = tmp_path_factory.mktemp("network") / "model"
    options = train_options()["uniad"](
        shards=str(small.shards),
        output=str(output),
        method=UNIAD,
        runtime=replace(HERE, workers=1),
        threshold=ThresholdOptions(target_fpr=0.5, validation_fraction=0.3),
        checkpoint_every=4,
        validate_every=0,
    )
    put, losses, told = TrainingReport.put, {}, []

    def interrupted(self: TrainingReport, event: dict[str, Any]) -> None:
        put(self, event)
        if event["step"] == 6:
            raise KeyboardInterrupt

    def restarted(self: TrainingReport, event: dict[str, Any]) -> None:
        if "losses" in event:
            losses[event["step"]] = event["losses"]["loss"]
            if event["step"] == 7:
                stores.server.stop()
            elif event["step"] == 10:
                stores.server.start("--default-artifact-root", "s3://bucket/direct")
        put(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingReport, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options)
        first = run_of(stores.client, output)
        patch.setattr(TrainingReport, "put", restarted)
        patch.setattr(mlflow_queue.SendQueue, "_tell", lambda self, words: told.append(words))
        train(options)
    return Training(output, first, losses, "\n".join(told))


def test_a_job_that_lost_its_server_for_a_while_is_recorded_whole(stores: Stores, training: Training) -> None:
    run = run_of(stores.client, training.output)
    assert run.info.status == "FINISHED"
    assert "unianom.missing" not in run.data.tags
    history = stores.client.get_metric_history(run.info.run_id, "loss")
    assert {metric.step for metric in history} == set(range(1, 13))
    assert sorted(training.losses) == [5, 6, 7, 8, 9, 10, 11, 12]
    for metric in history:
        assert metric.value == pytest.approx(training.losses.get(metric.step, metric.value))
    assert "cannot be used for now" in training.said
    assert training.said.endswith("answers again, and what waited was sent")


def test_a_resumed_job_continues_its_run(stores: Stores, training: Training) -> None:
    assert training.first.info.status == "KILLED"
    assert training.first.data.tags["unianom.error"].startswith("KeyboardInterrupt")
    assert run_of(stores.client, training.output).info.run_id == training.first.info.run_id


# -------------------------------------------------------------------------------------------------- from the registry
LOAD = """
import base64, json, sys
import mlflow.pyfunc, pandas as pd
images = pd.DataFrame({"image": [base64.b64decode(text) for text in json.load(sys.stdin)]})
scores = [mlflow.pyfunc.load_model(uri).predict(images)["score"].tolist() for uri in sys.argv[1:]]
print(json.dumps({"scores": scores, "pipelines": "pipelines" in sys.modules}))
"""


def test_models_load_by_name_wherever_their_files_lie(
    stores: Stores, two: tuple[Path, Path], training: Training, small: Small, tmp_path: Path
) -> None:
    """Files sent to the server, which has them in S3, and files that the job itself put into S3."""
    direct = patchcore_options(
        small, two[1], register_as="direct", tracking=TrackingOptions(experiment="direct"), seed=1
    )
    train(direct)
    run = run_of(stores.client, two[1], "direct")
    assert run.info.artifact_uri.startswith("s3://bucket/direct/")
    assert stores.keys(f"direct/{run.info.experiment_id}/{run.info.run_id}/artifacts/") == {"config.json", "model.json"}
    images = [path.read_bytes() for path in sorted(small.corpus.glob("*/test/*/*.png"))[:3]]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, f"models:/parts@{CANDIDATE}", f"models:/direct@{CANDIDATE}"],
        input=json.dumps([base64.b64encode(image).decode() for image in images]),
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    candidate = stores.client.get_model_version_by_alias("parts", CANDIDATE)
    (sent,) = [output for output in two if digest(output) == candidate.tags["unianom.digest"]]
    for output, scores in zip((sent, two[1]), answer["scores"], strict=True):
        expected = [result.score for result in unianom.load(str(output)).predict(images)]
        assert scores == pytest.approx(expected, rel=1e-5)
        assert len(set(scores)) == 3
    assert not answer["pipelines"]


# ------------------------------------------------------------------------------------------------ wrong or not there
def test_a_server_that_is_not_there_costs_a_sentence(
    stores: Stores, small: Small, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_queue, "PATIENCE", 0.0)
    stopped = f"http://127.0.0.1:{postgresql.free_port()}"
    options = patchcore_options(small, two[0], register_as=None, tracking=TrackingOptions(mlflow_uri=stopped))
    (result,) = train(options)
    assert result.folder == str(two[0])
    first, last = [line for line in capfd.readouterr().err.splitlines() if "MLflow" in line]
    assert first.startswith(f"MLflow at {stopped} cannot be used for now (")
    assert last.startswith(f"not all of this job is recorded in MLflow at {stopped} ([Errno 111] Connection refused): ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("/postgres", "/nowhere"), 'database "nowhere" does not exist'),
        (("mlflow@", "stranger:hunter2@"), 'role "stranger" does not exist'),
    ],
)
def test_a_wrong_database_costs_a_sentence(
    stores: Stores,
    change: tuple[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(mlflow_queue, "PATIENCE", 0.0)
    uri = stores.database.replace(*change)
    with track(TrackingOptions(mlflow_uri=uri), "train", str(tmp_path / "model"), {}) as run:
        run.metrics({"loss": 0.5})
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 2
    assert reason in said
    assert "hunter2" not in said

"""A local Ray for the whole test session and a stand-in for it, and the small data every pipeline test starts from."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

import pipelines
from pipelines.data import ingest as ingesting
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime import actors
from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from pipelines.runtime.task_worker import set_threads
from pipelines.training import local_training
from pipelines.training.options import ThresholdOptions, train_options
from pipelines.training.train import train
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.data.drawing import draw_corpus
from unianom.data.image import InputPolicy

MODULES = tuple(
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(pipelines.__path__, "pipelines.")
    if not found.name.endswith(".mlflow_model")  # which runs inside MLflow alone
)
"""Where tasks may be spread from."""

UNTRACKED = TrackingOptions(enabled=False)
ONE = RuntimeOptions(workers=1)
"""Most of a short job is starting its actors, so tests take one unless they are about their number."""
HERE = RuntimeOptions(local=True, workers=2)
"""Two threads of this process. What they write is what tests on Ray compare with."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Four logical CPUs, so that small pools beside each other fit."""
    with pytest.MonkeyPatch.context() as patch:
        # a checkpoint waits until Ray Train asks for it, which it does every two seconds
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        actors.connect(RuntimeOptions(local_cpus=4))
        yield
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as an actor has, so that what is done in this process is the same to the last bit."""
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(autouse=True)
def on_ray(request: pytest.FixtureRequest) -> None:
    """All tests marked so have that Ray, and start none of their own."""
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("ray_cluster")


def kill_job(process: subprocess.Popen[Any]) -> None:
    """kill -9 of a job and of all that belongs to its Ray, whose processes would otherwise go on for a while."""
    import psutil  # Ray brings its own, and shows it when imported

    for running in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            running.kill()
    process.wait()


def run_inline(
    worker: type,
    arguments: dict[str, Any],
    tasks: Sequence[dict[str, Any]],
    options: RuntimeOptions | None,
    images: int = 0,
) -> Iterator[dict[str, Any]]:
    """`run_tasks` in this process: what goes to workers and comes back is copied as on its way through Ray.

    One worker takes the tasks in their order; of several, each has its own, and the last one ends first.
    """
    count = min((options and options.workers) or 1, len(tasks))
    dealt = [tasks[number::count] for number in range(count)]
    for own in reversed(dealt):
        made = worker(**cloudpickle.loads(cloudpickle.dumps(arguments)))
        for task in own:
            # lists of a task become arrays on their way through Ray Data
            arrived = {key: np.array(value) if isinstance(value, list) else value for key, value in task.items()}
            yield json.loads(json.dumps(made.run(arrived)))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks and all training run in this process."""
    _replace_ray(monkeypatch)


@contextmanager
def without_ray() -> Iterator[None]:
    """As `inline`, for fixtures that serve several tests."""
    with pytest.MonkeyPatch.context() as patch:
        _replace_ray(patch)
        yield


def _replace_ray(patch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        for name, stand_in in (("run_tasks", run_inline), ("connect", lambda *_, **__: None)):
            if hasattr(module, name):
                patch.setattr(module, name, stand_in)
    patch.setattr(local_training, "runs_here", lambda *_: True)


@dataclass(frozen=True)
class Small:
    """A drawn corpus of two categories and its shards."""

    corpus: Path
    shards: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")
    draw_corpus(root / "corpus", ("weave", "cog"), train=12, good=4, per_defect=2, size=64)
    ingesting.ingest(ingesting.IngestOptions("mvtec", str(root / "corpus"), str(root / "shards"), runtime=HERE))
    return Small(root / "corpus", root / "shards")


@pytest.fixture(scope="session")
def tiny_model(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What UniFormaly makes of these shards; nobody may write there."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    train(tiny_training(small.shards, folder, runtime=HERE))
    return folder


@pytest.fixture(scope="session")
def tiny_scores(small: Small, tiny_model: Path) -> Path:
    """Its scores, in batches of three."""
    folder = tiny_model.parent / "scores"
    score(ScoreOptions(str(tiny_model), str(small.shards), output=str(folder), batch_size=3, runtime=HERE))
    return folder


def tiny_method(**changes: Any) -> UniFormalyConfig:
    """UniFormaly on two blocks of a small transformer with random weights."""
    defaults: dict[str, Any] = {
        "backbone": BackboneConfig("vit_tiny_patch16_224", weights="random"),
        "input": InputPolicy(resize="stretch", size=64, crop=None),
        "blocks": (0, 1),
        "attention_block": 2,
        "bank": BankConfig(coreset_ratio=0.5),
    }
    return UniFormalyConfig(**{**defaults, **changes})


def tiny_training(shards: Path, output: Path, **changes: Any) -> Any:
    """Options of a training that takes seconds."""
    defaults: dict[str, Any] = {
        "method": tiny_method(),
        "tracking": UNTRACKED,
        "runtime": ONE,
        "threshold": ThresholdOptions(target_fpr=0.5, source="held_out", validation_fraction=0.3),
    }
    return train_options()["uniformaly"](shards=str(shards), output=str(output), **{**defaults, **changes})

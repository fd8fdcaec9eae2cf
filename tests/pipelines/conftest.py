"""A local Ray for the whole test session, and the small data every pipeline test starts from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import (
    banks,
    cada_trials,
    calibration,
    clustering,
    decisions,
    diagnosis,
    embeddings,
    encodings,
    features,
    normals,
    runtime,
    scoring,
    training,
)
from pipelines.fitting import train_options
from pipelines.ingest import IngestOptions, ingest
from pipelines.normals import ThresholdOptions
from pipelines.runtime import RuntimeOptions
from pipelines.tracking import TrackingOptions
from unianom.backbones import BackboneConfig
from unianom.data.drawing import draw_corpus
from unianom.data.image import InputPolicy
from unianom.methods.layers.bank import BankConfig
from unianom.methods.uniformaly import UniFormalyConfig

MODULES = (
    *(banks, cada_trials, calibration, clustering, decisions, diagnosis, embeddings, encodings),
    *(features, normals, runtime, scoring, training),
)
"""Where units of work are spread from."""

UNTRACKED = TrackingOptions(enabled=False)
ONE = RuntimeOptions(workers=1)
"""Most of a short job is starting its actors, so tests take one unless they are about their number."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Four logical CPUs, so that pools of one, two and four actors all fit."""
    import ray

    from pipelines.runtime import connect

    connect(RuntimeOptions(local_cpus=4))
    yield
    ray.shutdown()


def run_inline(
    worker: type, arguments: dict[str, Any], units: Sequence[dict[str, Any]], _: Any
) -> Iterator[dict[str, Any]]:
    """`run_units` in this process; lists of a unit become arrays, as they do on their way through Ray Data."""
    if units:
        made = worker(**arguments)
        for unit in units:
            arrived = {key: np.array(value) if isinstance(value, list) else value for key, value in unit.items()}
            yield json.loads(json.dumps(made.run(arrived)))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """All units run in this process, without Ray."""
    for module in MODULES:
        for name, stand_in in (("run_units", run_inline), ("connect", lambda *_, **__: None)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


@dataclass(frozen=True)
class Small:
    """A drawn corpus of two categories and its shards."""

    corpus: Path
    shards: Path


@pytest.fixture(scope="session")
def small(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")
    draw_corpus(root / "corpus", ("weave", "cog"), train=12, good=4, per_defect=2, size=64)
    ingest(IngestOptions("mvtec", str(root / "corpus"), str(root / "shards"), runtime=ONE))
    return Small(root / "corpus", root / "shards")


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
        "threshold": ThresholdOptions(target_fpr=0.5, validation_fraction=0.3),
    }
    return train_options()["uniformaly"](shards=str(shards), output=str(output), **{**defaults, **changes})

"""A local Ray for the whole test session, and the small data every pipeline test starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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

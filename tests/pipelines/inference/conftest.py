"""Drawn images in shards, and a model that passes, reviews and fails some of them."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from tests.pipelines.conftest import tiny_method
from tests.pipelines.evaluated import Scored, _write_shards
from tests.pipelines.sharded import picture
from unianom import files
from unianom.data.shards import MANIFEST, ShardSet
from unianom.memory.index import MemoryBank
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model
from unianom.thresholds import Bands, DecisionRule, Threshold

ONE = RuntimeOptions(local=True, workers=1)


def limit(value: float) -> Threshold:
    return Threshold(value, 0.05, 0.95, 100, 95, 0.05)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twenty-three images of two categories, in three parts."""
    samples = [
        Scored(f"{n:02d}.png", "disc" if n % 9 < 6 else "stripe", 0, "good", picture([n]), 0.0) for n in range(23)
    ]
    made = _write_shards(tmp_path_factory.mktemp("scored") / "shards", samples, 3)
    files.write_json(files.join(made.uri, MANIFEST), {**made.manifest, "rejected": {}})
    return ShardSet.open(made.uri)


@pytest.fixture(scope="module")
def method() -> UniFormaly:
    made = UniFormaly(tiny_method())
    rows = np.random.default_rng(0).normal(size=(40, made.encoder.dimension)).astype(np.float32)
    made.bank = MemoryBank.build(rows)
    return made


@pytest.fixture(scope="module")
def model(method: UniFormaly, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that passes some images, has some reviewed, and lets some fail."""
    folder = tmp_path_factory.mktemp("model")
    Model(method, ["disc", "stripe"]).save(folder / "plain")
    scores = score(
        ScoreOptions(str(folder / "plain"), shards.uri, output=str(folder / "scores"), maps="none", runtime=ONE)
    )
    values = np.sort(scores.scores.table(columns=["score"])["score"].to_numpy())
    bands = Bands(limit(float(values[-4])), limit(float(values[10])), 1.0)
    Model(method, ["disc", "stripe"], decision_rule=DecisionRule("raw", bands, {})).save(folder / "model")
    return str(folder / "model")

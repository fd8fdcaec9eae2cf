"""The engine of a job: chosen once, by the number of images and by a comparison with PyTorch, and part of the plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unianom
from pipelines.data import engine as engines
from pipelines.data.engine import REPAYS, choose_engine, say_precision
from pipelines.data.feature_cache import FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime import outputs
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_clock import StageClock
from tests.pipelines.conftest import HERE, Small
from unianom import encoder_engine, files
from unianom.data.image import ImageLimits
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.errors import EngineError, OptionError
from unianom.execution import CPU, Execution
from unianom.methods import Method

pytest.importorskip("openvino")

OPENVINO = dataclasses.replace(HERE, engine="openvino")


@pytest.fixture
def source(small: Small) -> SampleSource:
    return SampleSource(ShardSet.open(str(small.shards)), Selection(("test",)), ImageLimits())


def never() -> Method:
    raise AssertionError("no method is needed to choose")


def test_small_jobs_gpus_and_machines_without_openvino_keep_pytorch(source, monkeypatch):
    large = REPAYS + 1
    assert choose_engine(RuntimeOptions(), source, REPAYS, never).engine == "pytorch"
    assert choose_engine(RuntimeOptions(engine="pytorch"), source, large, never).engine == "pytorch"
    assert choose_engine(RuntimeOptions(gpus_per_worker=1), source, large, never).execution == Execution("cuda")
    monkeypatch.setattr(engines, "openvino_is_installed", lambda: False)
    assert choose_engine(RuntimeOptions(), source, large, never).engine == "pytorch"


def test_large_jobs_take_openvino_compared_on_images_of_their_own(source, tiny_model, monkeypatch):
    method, seen = load_model(str(tiny_model), CPU).method, []
    check = encoder_engine._check

    def recorded(*arguments: Any) -> None:
        seen.append(arguments[2])
        check(*arguments)

    monkeypatch.setattr(encoder_engine, "_check", recorded)
    assert choose_engine(RuntimeOptions(), source, REPAYS + 1, lambda: method).engine == "openvino"
    first = next(source.open(engines.COMPARED, 1)(source.ranges()[0], method.input, StageClock()))
    pixels = np.stack([sample.pixels for sample in first])
    assert seen[0].shape == (len(pixels), 3, *pixels.shape[1:3])


def test_what_differs_from_pytorch_is_said_and_left_to_it(source, tiny_model, monkeypatch, capsys):
    monkeypatch.setitem(encoder_engine.LARGEST_DIFFERENCE, "openvino", 1e-12)
    encoder_engine._latest.encoders = {}

    def method() -> Method:
        return load_model(str(tiny_model), CPU).method

    assert choose_engine(RuntimeOptions(), source, REPAYS + 1, method).engine == "pytorch"
    said = capsys.readouterr().out
    assert said.startswith("PyTorch runs the encoder: engine=openvino: on ")
    assert "more than 1e-12" in said
    with pytest.raises(EngineError, match="more than 1e-12; take pytorch"):
        choose_engine(RuntimeOptions(engine="openvino"), source, 1, method)


def test_engines_are_for_cpus():
    with pytest.raises(OptionError, match="engine=openvino runs on CPUs; leave out gpus_per_worker"):
        RuntimeOptions(gpus_per_worker=1, engine="openvino")
    assert RuntimeOptions().execution == CPU


def test_the_engine_is_part_of_a_plan_and_pytorch_is_that_of_old_ones(source, tmp_path):
    keys = {
        engine: FeatureCache.below(str(tmp_path), "features", {"": source}, {}, runtime, 3)
        for engine in ("auto", "pytorch", "openvino", "openvino_bf16")
        for runtime in [dataclasses.replace(HERE, engine=engine)]
    }
    assert "engine" not in keys["pytorch"].plan
    assert keys["openvino"].plan["engine"] == "openvino"
    assert keys["auto"].uri == keys["pytorch"].uri
    assert len({cache.uri for cache in keys.values()}) == 3


def test_another_precision_than_that_of_the_fit_is_said(capsys):
    fp32, bf16 = {"provenance": {"device": "cpu"}}, {"provenance": {"engine": "openvino_bf16"}}
    say_precision([fp32], Execution("cpu", "openvino"))
    say_precision([bf16], Execution("cpu", "openvino_bf16"))
    assert capsys.readouterr().out == ""
    say_precision([fp32, bf16], Execution("cpu", "openvino_bf16"))
    assert "runs in bfloat16, but was run in float32 when" in capsys.readouterr().out
    say_precision([bf16], CPU)
    assert "runs in float32, but was run in bfloat16 when" in capsys.readouterr().out


def scores(model: Path, shards: Path, output: Path, **changes: Any) -> ScoreSet:
    score(ScoreOptions(str(model), str(shards), output=str(output), batch_size=3, **changes))
    return ScoreSet.open(str(output))


def test_scores_are_those_of_pytorch_and_the_same_from_any_number_of_workers(small, tiny_model, tiny_scores, tmp_path):
    one = scores(tiny_model, small.shards, tmp_path / "one", runtime=dataclasses.replace(OPENVINO, workers=1))
    two = scores(tiny_model, small.shards, tmp_path / "two", runtime=OPENVINO)
    assert [entry["sha256"] for entry in one.manifest["files"]] == [entry["sha256"] for entry in two.manifest["files"]]
    assert one.manifest["engine"] == "openvino"
    assert "engine" not in ScoreSet.open(str(tiny_scores)).manifest
    assert files.read_json(files.join(str(tmp_path / "one"), outputs.PLAN))["plan"]["engine"] == "openvino"
    found, wanted = (
        s.table(columns=["sample_id", "score"]).sort_by("sample_id") for s in (one, ScoreSet.open(str(tiny_scores)))
    )
    np.testing.assert_allclose(found["score"].to_numpy(), wanted["score"].to_numpy(), rtol=1e-4)
    assert unianom.load(tiny_model).provenance["device"] == "cpu"

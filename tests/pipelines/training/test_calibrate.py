"""Calibrating a model folder: what is learned from and kept, what a killed run leaves, what scoring makes of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unianom
from pipelines.data.splits import held_out_normals
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.cli import parse
from pipelines.training.calibrate import calibrate
from pipelines.training.calibration_head import HeadActor
from pipelines.training.calibration_images import CATEGORY, FEATURES, STATISTICS, EmbeddingCache
from pipelines.training.options import CalibrateOptions, ThresholdOptions
from pipelines.training.train import train
from tests.pipelines.conftest import HERE, ONE, UNTRACKED, Small, tiny_training
from unianom.calibration import MapStatistics, fit_calibrator
from unianom.configs.calibration import CalibrationConfig, HeadConfig
from unianom.data.image import ImageLimits, decode_prepared
from unianom.data.schema import NORMAL
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, ModelError

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes" / "calibration"

QUICK = CalibrationConfig(iterations=6, batch_size=4, head=HeadConfig(hidden=8))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


def options(small: Small, model: Path, **changes: Any) -> CalibrateOptions:
    defaults: dict[str, Any] = {"calibration": QUICK, "runtime": ONE, "tracking": UNTRACKED, "precision": "full"}
    return CalibrateOptions(str(model), str(small.shards), **{**defaults, **changes})


def normal_images(shards: ShardSet, model: unianom.Model, chosen: frozenset[str]) -> tuple[torch.Tensor, list[str]]:
    """Network input and categories of chosen images, in the order of the parts."""
    rows = [
        row
        for part in shards.parts
        for batch in shards.read(part, Selection(("train",), labels=(NORMAL,)), ["sample_id", "category", "image"])
        for row in batch.to_pylist()
        if row["sample_id"] in chosen
    ]
    pixels = [decode_prepared(row["image"], model.method.input, ImageLimits()) for row in rows]
    return normalise(pixels, model.method.input), [row["category"] for row in rows]


def listed(shards: ShardSet) -> list[dict[str, Any]]:
    """Normal images of the training split."""
    return shards.table(Selection(("train",), labels=(NORMAL,)), ["sample_id", "category", "split"]).to_pylist()


def test_calibrating_scores_and_what_is_kept(inline: None, small: Small, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    output = tmp_path / "cada"
    (result,) = calibrate(options(small, model, output=str(output), folder=str(kept)))
    assert result.fresh
    assert result.categories == ["cog", "weave"]
    assert unianom.load(model).calibrator is None

    # the calibrator is the one that the core package makes of the same images
    shards, plain = ShardSet.open(small.shards), unianom.load(model)
    normals = shards.table(Selection(("train",), labels=(NORMAL,)), ["sample_id"])["sample_id"].to_pylist()
    held_out = held_out_normals(plain.provenance, listed(shards), "the model")
    assert len(held_out) == plain.provenance["held_out_normals"] > 0
    images, categories = normal_images(shards, plain, frozenset(normals) - held_out)
    assert result.metrics["images"] == len(images) == len(normals) - len(held_out)
    prediction = plain.method.predict(images)
    numbers = np.array([plain.categories.index(name) for name in categories])
    expected = fit_calibrator(
        QUICK, plain.categories, prediction.embedding.numpy(), MapStatistics.of(prediction.raw_map), numbers
    )
    made = unianom.load(output).calibrator
    assert made is not None
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-3, atol=1e-4)

    # scoring gives what the model says of each file, and raw scores as before
    folder = tmp_path / "scores"
    score(ScoreOptions(str(output), str(small.shards), output=str(folder), batch_size=3, maps="all", runtime=ONE))
    rows = ScoreSet.open(folder).table().to_pylist()
    predicted = unianom.load(output).predict([row["uri"] for row in rows])
    for row, one, raw in zip(rows, predicted, plain.predict([row["uri"] for row in rows]), strict=True):
        assert row["score"] == pytest.approx(one.score, rel=1e-4) == pytest.approx(raw.score, rel=1e-4)
        assert row["calibrated_score"] == pytest.approx(one.calibrated_score, rel=1e-3, abs=1e-4)
        calibrated = (raw.anomaly_map - row["calibration_offset"]) / row["calibration_scale"]
        assert calibrated == pytest.approx(one.calibrated_map, rel=1e-3, abs=1e-3)

    # again: nothing happens; another variant runs no network; another calibrator is not replaced unasked
    before = (output / "model.json").read_bytes()
    assert not calibrate(options(small, model, output=str(output), folder=str(kept)))[0].fresh
    assert (output / "model.json").read_bytes() == before
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("*.npy")}
    labels = dataclasses.replace(QUICK, variant="labels")
    (other,) = calibrate(options(small, model, output=str(tmp_path / "labels"), folder=str(kept), calibration=labels))
    assert other.fresh
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.npy")} == written
    assert not list(kept.rglob("*.pt")), "checkpoints of finished heads are removed"
    with pytest.raises(DataError, match="choose another output"):
        calibrate(options(small, model, output=str(output), folder=str(kept), calibration=labels))


def test_in_the_models_own_folder(inline: None, small: Small, model: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    labels = dataclasses.replace(QUICK, variant="labels")
    (result,) = calibrate(options(small, own, calibration=labels))
    assert result.folder == str(own)
    assert unianom.load(own).calibrator.config == labels  # type: ignore[union-attr]
    assert not calibrate(options(small, own, calibration=labels))[0].fresh
    none = dataclasses.replace(QUICK, variant="none")
    with pytest.raises(DataError, match=r"has another calibrator \(labels\); .*--overwrite true"):
        calibrate(options(small, own, calibration=none))
    assert calibrate(options(small, own, calibration=none, overwrite=True))[0].fresh
    assert unianom.load(own).calibrator.config == none  # type: ignore[union-attr]


def test_held_out_images_alone(inline: None, small: Small, model: Path, tmp_path: Path) -> None:
    held = dataclasses.replace(QUICK, variant="labels")
    (result,) = calibrate(
        options(small, model, output=str(tmp_path / "held"), images="held_out", calibration=held, folder=str(tmp_path))
    )
    assert result.metrics["images"] == unianom.load(model).provenance["held_out_normals"]


def test_training_and_calibrating_in_one_command(inline: None, small: Small, tmp_path: Path) -> None:
    held_out = ThresholdOptions(validation_fraction=0.3)
    given = tiny_training(small.shards, tmp_path / "model", calibrate="labels", per_category=True, threshold=held_out)
    assert [result.fresh for result in train(given)] == [True, True]
    for name in ("cog", "weave"):
        calibrator = unianom.load(tmp_path / "model" / name).calibrator
        assert calibrator is not None
        assert (calibrator.categories, calibrator.config.variant) == ([name], "labels")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("model.json")}
    train(given)
    assert {path: path.read_bytes() for path in before} == before


def test_nothing_held_out(inline: None, small: Small, tmp_path: Path) -> None:
    given = tiny_training(small.shards, tmp_path / "model", threshold=ThresholdOptions(validation_fraction=0))
    train(given)
    with pytest.raises(DataError, match="held no normal image out; give --images train"):
        calibrate(options(small, tmp_path / "model", images="held_out"))


def test_which_images_were_held_out_must_be_told(small: Small, model: Path) -> None:
    rows, provenance = listed(ShardSet.open(small.shards)), unianom.load(model).provenance
    before = {key: value for key, value in provenance.items() if key != "held_out"}
    with pytest.raises(DataError, match=r"the model does not record which share .*--held_out_fraction"):
        held_out_normals(before, rows, "the model")
    with pytest.raises(DataError, match=r"drawing 0.1 of \d+ again gives .*mend --held_out_fraction"):
        held_out_normals(before, rows, "the model", 0.1)
    drawn = held_out_normals(provenance, rows, "the model")
    assert held_out_normals(before, rows, "the model", 0.3) == drawn
    assert len(drawn) == provenance["held_out_normals"]
    val = [{**row, "split": "val"} for row in rows if row["sample_id"] in drawn]
    of_val = {**provenance, "held_out": {"split": "val", "fraction": None, "seed": 0}}
    assert held_out_normals(of_val, [*rows, *val], "the model") == drawn
    with pytest.raises(DataError, match="but there are 1; give the shards it was trained on"):
        held_out_normals(of_val, [*rows, *val[:1]], "the model")
    assert held_out_normals({**before, "held_out_normals": 0}, rows, "the model") == frozenset()


def test_a_killed_head_ends_the_same(inline: None, small: Small, model: Path, tmp_path: Path) -> None:
    """Without Ray: arrays part by part, then the head in one go, and in pieces by an actor made anew each time."""
    shards = ShardSet.open(small.shards)
    chosen = frozenset(shards.table(Selection(("train",), labels=(NORMAL,)), ["sample_id"])["sample_id"].to_pylist())
    given = options(small, model, images="all", folder=str(tmp_path / "kept"), batch_size=4)
    kept = EmbeddingCache.of(str(model), shards, given)
    assert kept.chosen == chosen
    kept.fill(given)
    features = kept.cache.open()
    assert sum(features.rows(part) for part in features.parts) == len(chosen)
    for part in features.parts:
        if features.rows(part):
            arrays = [features.array(part, name) for name in (FEATURES, STATISTICS, CATEGORY)]
            assert {len(array) for array in arrays} == {features.rows(part)}

    def actor(name: str) -> HeadActor:
        checkpoint = str(tmp_path / name)
        return HeadActor(kept, QUICK, checkpoint, "cpu", 1)

    whole = actor("whole.pt")
    whole.run(6)
    for end in (2, 4, 6):
        assert actor("pieces.pt").run(end)[0] == end
    expected, metrics = whole.result()
    state, again = actor("pieces.pt").result()
    assert metrics == again
    assert metrics["images"] == len(chosen)
    assert all(np.array_equal(state[name], value) for name, value in expected.items())


def test_a_folder_without_model(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model in"):
        calibrate(options(small, tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "alpha", "iterations"),
    [("revdist", 0.1, 5000), ("recontrast", 0.1, 5000), ("uniad", 10.0, 20000), ("contaminated", None, 5000)],
)
def test_recipes(name: str, alpha: float | None, iterations: int) -> None:
    given = parse(CalibrateOptions, ["--config", str(RECIPES / f"{name}.yaml"), "--model", "m", "--shards", "s"])
    config = given.calibration
    assert (config.variant, config.alpha, config.iterations) == ("cada", alpha, iterations)
    assert config.statistics == ("mean_std" if name == "contaminated" else "mean_max")
    assert (config.standardise, config.schedule) == ((True, "cosine") if alpha is None else (False, "constant"))
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == ["contaminated", "recontrast", "revdist", "uniad"]


@pytest.mark.ray
def test_actors_make_the_same(ray_cluster: None, small: Small, model: Path, tmp_path: Path) -> None:
    calibrate(options(small, model, output=str(tmp_path / "ray")))
    kept = str(tmp_path / "kept-here")
    calibrate(options(small, model, output=str(tmp_path / "here"), folder=kept, runtime=HERE))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("ray", "here")
    )
    assert "model.json" in first
    assert first == second


def test_a_model_is_the_same_wherever_its_shards_lie(inline: None, small: Small, tmp_path: Path) -> None:
    """Its digest names the scores it makes, so it must not hang on where a copy of the shards lies."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(small.shards, copy)
    described = []
    for name, shards in (("here", small.shards), ("there", copy)):
        train(tiny_training(shards, tmp_path / name))
        described.append((tmp_path / name / "model.json").read_bytes())
    assert described[0] == described[1]

"""The jobs one after another: what each leaves for the next, in this process, then on Ray with the same bytes, whole
and disturbed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import unianom
from pipelines.data import ingest as ingesting
from pipelines.data.ingest import ingest
from pipelines.evaluation import evaluate as evaluating
from pipelines.evaluation.evaluate import evaluate
from pipelines.inference import score as scoring
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.options import ThresholdOptions
from pipelines.training.train import train
from tests.pipelines.conftest import HERE, ONE, UNTRACKED, Small, kill_job, tiny_method, tiny_training
from unianom.configs.bank import BankConfig
from unianom.data.image import decode_map
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.metrics.image import image_metrics

REPOSITORY = Path(__file__).parents[2]

IngestOptions = partial(ingesting.IngestOptions, runtime=ONE)
ScoreOptions = partial(scoring.ScoreOptions, runtime=ONE)
EvaluateOptions = partial(evaluating.EvaluateOptions, runtime=ONE)

TWO = RuntimeOptions(workers=2)


@pytest.fixture(autouse=True)
def serial(request: pytest.FixtureRequest) -> None:
    """No Ray, but in the tests that are about it."""
    if "ray_cluster" not in request.fixturenames:
        request.getfixturevalue("inline")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_ingest_stores_every_file_untouched(small: Small) -> None:
    shards = ShardSet.open(small.shards)
    rows = shards.table(columns=["uri", "image", "split", "label", "mask"]).to_pylist()
    images = [p for p in small.corpus.rglob("*.png") if "ground_truth" not in p.parts]
    assert sorted(row["uri"] for row in rows) == sorted(str(p) for p in images)
    assert all(Path(row["uri"]).read_bytes() == row["image"] for row in rows)
    assert all((row["mask"] is not None) == (row["label"] == 1) for row in rows)
    assert len(shards.parts) == 16


def test_ingest_again_does_nothing_and_refuses_another_plan(small: Small) -> None:
    before = content(small.shards)
    again = IngestOptions("mvtec", str(small.corpus), str(small.shards))
    assert not ingest(again).fresh
    assert content(small.shards) == before
    with pytest.raises(DataError, match="resize"):
        ingest(IngestOptions("mvtec", str(small.corpus), str(small.shards), resize=32))


def test_a_bank_in_shards_scores_the_same(small: Small, tiny_model: Path, tiny_scores: Path, tmp_path: Path) -> None:
    method = tiny_method(bank=BankConfig(coreset_ratio=0.5, shards=3))
    train(tiny_training(small.shards, tmp_path / "model", method=method))
    assert len(list((tmp_path / "model" / "bank").glob("*.faiss"))) == 3
    score(ScoreOptions(str(tmp_path / "model"), str(small.shards), output=str(tmp_path / "scores"), batch_size=3))
    columns = ["sample_id", "score", "anomaly_map"]
    ours, theirs = (ScoreSet.open(folder).table(columns=columns) for folder in (tmp_path / "scores", tiny_scores))
    assert ours.equals(theirs)


def test_training_again_does_nothing(small: Small, tiny_model: Path) -> None:
    before = content(tiny_model)
    results = train(tiny_training(small.shards, tiny_model))
    assert not results[0].fresh
    assert content(tiny_model) == before


def test_scores_equal_predictions_from_the_files(small: Small, tiny_model: Path, tiny_scores: Path) -> None:
    rows = ScoreSet.open(tiny_scores).table().to_pylist()
    assert sorted(row["sample_id"] for row in rows) == sorted(
        ShardSet.open(small.shards).table(Selection(("test",)), ["sample_id"])["sample_id"].to_pylist()
    )
    predicted = unianom.load(tiny_model).predict([row["uri"] for row in rows])
    for row, result in zip(rows, predicted, strict=True):
        assert row["score"] == pytest.approx(result.score, rel=1e-5)
        assert row["decision"] == result.decision
        stored = decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
        np.testing.assert_allclose(stored, result.anomaly_map, atol=row["map_scale"], rtol=1e-4)


def test_scoring_again_does_nothing(small: Small, tiny_model: Path, tiny_scores: Path) -> None:
    before = content(tiny_scores)
    assert not score(ScoreOptions(str(tiny_model), str(small.shards), output=str(tiny_scores), batch_size=3)).fresh
    assert content(tiny_scores) == before


def test_evaluation_agrees_with_metrics_of_the_scores(
    small: Small, tiny_model: Path, tiny_scores: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "evaluation")
    found = evaluate(EvaluateOptions(str(tiny_scores), str(small.shards), output, soft_dice=True, tracking=UNTRACKED))
    table = ScoreSet.open(tiny_scores).table(columns=["category", "score", "label"]).to_pylist()
    for row in found["metrics"]["categories"]:
        mine = [r for r in table if r["category"] == row["category"]]
        expected = image_metrics([r["score"] for r in mine], [r["label"] for r in mine])
        assert row["image_auroc"] == expected["image_auroc"]
        assert row["n_maps"] == len(mine)
        assert 0 <= row["aupro"] <= 1
        assert 0 < row["soft_iou"] < row["soft_dice"] < 1
    union = image_metrics([r["score"] for r in table], [r["label"] for r in table])
    assert found["metrics"]["union"]["image_auroc"] == union["image_auroc"]
    rates = found["threshold"]["union"]
    threshold = unianom.load(tiny_model).threshold
    assert threshold is not None
    failed = sum(r["score"] > threshold.value for r in table if r["label"] == 0)
    assert rates["false_positive_rate"] == failed / sum(r["label"] == 0 for r in table)
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text()) == found


def test_evaluation_refuses_other_shards(small: Small, tiny_scores: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    ingest(IngestOptions("mvtec", str(small.corpus), str(other), {"categories": ["weave"]}))
    with pytest.raises(DataError, match="other shards"):
        evaluate(EvaluateOptions(str(tiny_scores), str(other), str(tmp_path / "evaluation"), tracking=UNTRACKED))


def test_one_model_per_category(small: Small, tmp_path: Path) -> None:
    threshold = ThresholdOptions(target_fpr=0.6, validation_fraction=0.3)
    train(tiny_training(small.shards, tmp_path / "models", per_category=True, threshold=threshold))
    score(ScoreOptions(str(tmp_path / "models"), str(small.shards), output=str(tmp_path / "scores"), maps="none"))
    rows = ScoreSet.open(tmp_path / "scores").table(columns=["uri", "category", "score"]).to_pylist()
    for category in ("weave", "cog"):
        mine = [row for row in rows if row["category"] == category]
        results = unianom.load(tmp_path / "models" / category).predict([row["uri"] for row in mine])
        np.testing.assert_allclose([row["score"] for row in mine], [r.score for r in results], rtol=1e-5)


def test_few_shot_takes_so_many_images_per_category(small: Small, tmp_path: Path) -> None:
    results = train(tiny_training(small.shards, tmp_path / "model", few_shot=2))
    assert results[0].metrics["images"] == 4


def test_a_rate_the_normals_cannot_support_is_refused_before_any_work(small: Small, tmp_path: Path) -> None:
    options = tiny_training(small.shards, tmp_path / "model", threshold=ThresholdOptions(target_fpr=0.01))
    with pytest.raises(OptionError, match="cannot support"):
        train(options)
    assert not (tmp_path / "model").exists()


def test_unlabelled_images_and_broken_files(small: Small, tiny_model: Path, tmp_path: Path) -> None:
    """Everything readable is scored, everything else is listed with its reason, and too much of it fails the job."""
    folder = tmp_path / "in" / "line1"
    folder.mkdir(parents=True)
    good = sorted((small.corpus / "weave" / "test" / "good").glob("*.png"))
    for number, path in enumerate(good):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    (folder / "short.png").write_bytes(good[0].read_bytes()[:200])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    options: dict[str, Any] = {"layout_options": {"unlabelled": True}}
    with pytest.raises(DataError, match="3 of 7 samples were rejected"):
        ingest(IngestOptions("folder", str(tmp_path / "in"), str(tmp_path / "shards"), **options))
    assert ShardSet.open(tmp_path / "shards").rejected().num_rows == 3
    allowed = ScoreOptions(
        str(tiny_model), str(tmp_path / "shards"), output=str(tmp_path / "scores"), max_reject_fraction=0.5
    )
    result = score(allowed)
    rows = result.scores.table().to_pylist()
    assert sorted((row["sample_id"].rsplit("/", 1)[1], row["status"]) for row in rows) == [
        *((f"{number}.png", "ok") for number in range(4)),
        ("empty.png", "corrupt"),
        ("folder.png", "unsupported"),
        ("short.png", "corrupt"),
    ]
    assert all((row["score"] is None) == (row["status"] != "ok") for row in rows)
    assert all(row["error"] for row in rows if row["status"] != "ok")
    assert all(row["anomaly_map"] is None for row in rows)
    assert pq.read_table(tmp_path / "scores", columns=["sample_id"]).num_rows == 7
    with pytest.raises(DataError, match="have no score"):
        score(ScoreOptions(str(tiny_model), str(tmp_path / "shards"), output=str(tmp_path / "scores")))


# ---- on Ray ---------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_ingest_continues_to_the_same_bytes(ray_cluster: None, small: Small, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    shutil.copytree(small.shards, output)
    (output / "_manifest.json").unlink()
    for number in (0, 3, 7, 11, 15):
        (output / f"_part-{number:05d}.json").unlink()
        if number != 7:
            (output / f"part-{number:05d}.parquet").unlink()
    (output / "part-00007.parquet.0badf00d.tmp").write_bytes(b"half a part")
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(output)
    assert ingest(IngestOptions("mvtec", str(small.corpus), str(output), runtime=TWO)).fresh
    assert content(output) == content(small.shards)


@pytest.mark.ray
def test_the_bank_does_not_depend_on_the_number_of_workers(
    ray_cluster: None, small: Small, tiny_model: Path, tmp_path: Path
) -> None:
    pooled = tmp_path / "pooled"
    train(tiny_training(small.shards, pooled, runtime=TWO))
    assert content(tiny_model / "bank") == content(pooled / "bank")
    assert (tiny_model / "model.json").read_bytes() == (pooled / "model.json").read_bytes()


@pytest.mark.ray
def test_a_killed_scoring_job_continues_to_the_same_bytes(
    ray_cluster: None, small: Small, tiny_model: Path, tiny_scores: Path, tmp_path: Path
) -> None:
    """kill -9 of a job on threads, then the same options on Ray; also what follows is the same."""
    output = tmp_path / "scores"
    command = [sys.executable, "jobs/score.py", "--model", str(tiny_model), "--shards", str(small.shards)]
    command += ["--output", str(output), "--batch_size", "3", "--runtime.local", "true", "--runtime.workers", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(output.glob("_part-*.json"))) < 3:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_job(process)
    assert not (output / "_manifest.json").exists()
    score(ScoreOptions(str(tiny_model), str(small.shards), output=str(output), batch_size=3, runtime=TWO))
    assert content(output) == content(tiny_scores)

    given = EvaluateOptions(str(output), str(small.shards), str(tmp_path / "here"), tracking=UNTRACKED, runtime=HERE)
    here = evaluate(given)
    assert evaluate(dataclasses.replace(given, output=str(tmp_path / "evaluation"), runtime=TWO)) == here

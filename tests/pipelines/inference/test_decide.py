"""Decisions from stored scores: which normals the thresholds come from, what is written, and the rule in the model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unianom
from pipelines.inference.decide import DecideResult, decide
from pipelines.inference.decision_parts import DecisionSet
from pipelines.inference.options import DecideOptions
from pipelines.reporting.decision_report import print_decisions
from pipelines.runtime.options import RuntimeOptions
from tests.pipelines.conftest import ONE, UNTRACKED, tiny_method
from tests.pipelines.evaluated import Scored, _write_scores, _write_shards, model_entry
from unianom import files
from unianom.data.image import InputPolicy
from unianom.data.shards import ScoreSet
from unianom.data.splits import hold_out
from unianom.errors import DataError, ModelError, OptionError
from unianom.methods import METHODS
from unianom.model import Model, store_rule
from unianom.thresholds import DecisionRule, fit_bands, fit_rule, fit_threshold

POLICY = InputPolicy(resize="stretch", size=16, crop=None)
TRAIN = {"disc": 60, "stripe": 50}
HELD_OUT = {"fraction": 0.5, "seed": 7, "split": "train"}
RATES: dict[str, Any] = {"target_fpr": 0.15, "review_fpr": 0.3}


@pytest.fixture(autouse=True)
def serial(inline: None) -> None:
    """No test here has Ray."""


def corpus(train: str = "train") -> list[Scored]:
    """Normal training images and a test split of both labels of two categories, stripes scoring ten higher."""
    rng = np.random.default_rng(0)
    samples = []
    for category, count in TRAIN.items():
        kinds = [(train, 0, count), ("test", 0, 20), ("test", 1, 20)]
        for split, label, number in kinds:
            for n in range(number):
                score = float(np.float32(rng.normal() + 3 * label + 10 * (category == "stripe")))
                samples.append(
                    Scored(
                        name=f"{category}/{split}/{label}/{n:03d}.png",
                        category=category,
                        label=label,
                        defect="spot" if label else "good",
                        image=rng.integers(0, 256, (20, 24, 3), np.uint8),
                        score=score,
                        anomaly_map=np.full((16, 16), score, np.float32),
                        split=split,
                    )
                )
    return samples


def held_out_ids(samples: list[Scored]) -> set[str]:
    train = [s for s in samples if s.split == "train"]
    return hold_out([s.sample_id for s in train], [s.category for s in train], 0.5, 7)


class Written:
    """A shard set, the scores of some of its samples, and the model folder that made them, without its weights."""

    def __init__(self, folder: Path, samples: list[Scored], parts: int = 2, **provenance: Any) -> None:
        shards = _write_shards(folder / "shards", samples, parts)
        entry = model_entry(POLICY, 2.0)
        known = {"shards": {"uri": shards.uri, "digest": shards.digest}, "held_out": HELD_OUT, "held_out_normals": 55}
        entry["provenance"] = {**entry["provenance"], **known, **provenance}
        entry["provenance"]["seeds"] = {"split": 7}
        self.model, self.shards = folder / "model", folder / "shards"
        files.write_json(self.model / "model.json", {"format_version": 1, **entry})
        self.entry = {**entry, "digest": files.sha256_file(self.model / "model.json")}
        self.samples = [replace(sample, model=self.entry["digest"]) for sample in samples]
        self.set = shards
        self.folder, self.parts = folder, parts

    def scores(self, name: str, keep: Callable[[Scored], bool] = lambda sample: True) -> str:
        kept = [sample for sample in self.samples if keep(sample)]
        return _write_scores(self.folder / name, kept, [self.entry], self.set, self.parts).uri

    def decide(self, scores: str, output: str = "out", **options: Any) -> DecideResult:
        asked = {"tracking": UNTRACKED, "runtime": ONE, **RATES, **options}
        return decide(DecideOptions(scores, str(self.folder / output), **asked))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("decisions"), corpus())


@pytest.fixture(scope="module")
def scores(written: Written) -> str:
    return written.scores("scores")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def values(samples: list[Scored], **wanted: Any) -> list[float]:
    return [float(s.score or 0) for s in samples if all(getattr(s, k) == v for k, v in wanted.items())]


def test_thresholds_are_those_of_the_held_out_normals(written: Written, scores: str) -> None:
    drawn = held_out_ids(written.samples)
    unseen = [s for s in written.samples if s.sample_id in drawn]
    assert len(unseen) == 55
    common = written.decide(scores, "common").rule
    assert common.common == fit_bands(values(unseen), 0.15, 0.3)
    each = written.decide(scores, "each", per_category=True).rule
    assert each.categories == {name: fit_bands(values(unseen, category=name), 0.15, 0.3) for name in TRAIN}


def test_neither_test_images_nor_what_was_learned_from_matters(tmp_path: Path, written: Written, scores: str) -> None:
    drawn = held_out_ids(written.samples)
    changed = [s if s.sample_id in drawn else replace(s, score=1e6) for s in corpus()]
    other = Written(tmp_path, changed)
    assert other.decide(other.scores("scores")).rule == written.decide(scores, "plain").rule


def test_normals_may_be_scores_of_their_own_and_val_comes_first(tmp_path: Path) -> None:
    made = Written(tmp_path, corpus("val"), held_out={**HELD_OUT, "split": "val", "fraction": None})
    test = made.scores("test", lambda s: s.split == "test")
    val = made.scores("val", lambda s: s.split == "val")
    result = made.decide(test, normals=val)
    assert result.rule.common == fit_bands(values(made.samples, split="val"), 0.15, 0.3)
    with pytest.raises(DataError, match="thresholds are never fitted to test images"):
        made.decide(test, "alone")


def test_every_score_gets_its_decision(written: Written, scores: str) -> None:
    result = written.decide(scores, "rows", per_category=True)
    rows = {row["sample_id"]: row for row in result.decisions.table().to_pylist()}
    assert set(rows) == {sample.sample_id for sample in written.samples}
    for sample in written.samples:
        row, bands = rows[sample.sample_id], result.rule.categories[sample.category]
        expected = (
            "fail" if sample.score > bands.fail.value else "review" if sample.score > bands.review.value else "pass"
        )
        assert row["decision"] == expected
        assert row["margin"] == pytest.approx((sample.score - bands.fail.value) / bands.spread, abs=1e-5)
        assert (row["split"], row["label"], row["category"]) == (sample.split, sample.label, sample.category)


def test_summary_agrees_with_counting(written: Written, scores: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = written.decide(scores, "counted")
    fail, review = result.rule.bands(None).fail.value, result.rule.bands(None).review.value
    for row in result.summary["categories"]:
        own = {} if row["category"] == "all" else {"category": row["category"]}
        normal = np.array(values(written.samples, split="test", label=0, **own))
        anomalous = np.array(values(written.samples, split="test", label=1, **own))
        both = np.concatenate([normal, anomalous])
        assert row["false_positive_rate"] == np.mean(normal > fail)
        assert row["detection_rate"] == np.mean(anomalous > fail)
        assert row["review_rate"] == np.mean((both > review) & (both <= fail))
        assert row["pass"] + row["review"] + row["fail"] == row["images"] == len(both)
    print_decisions(result.summary, result.decisions.uri, result.fresh, result.written)
    assert "at most 15 % of normal images fail" in capsys.readouterr().out


def test_the_queue_is_in_order_and_its_pictures_are_drawn(written: Written, scores: str) -> None:
    result = written.decide(scores, "queue", shards=str(written.shards), per_category=True, queue=7, pictures=5)
    folder = Path(result.decisions.uri)
    lines = list(csv.DictReader(io.StringIO((folder / "queue.csv").read_text())))
    rows = [row for row in result.decisions.table().to_pylist() if row["split"] == "test"]
    uncertain = sorted(rows, key=lambda row: (abs(row["margin"]), row["sample_id"]))[:7]
    anomalous = sorted(rows, key=lambda row: (-row["margin"], row["sample_id"]))[:7]
    assert [line["sample_id"] for line in lines] == [row["sample_id"] for row in [*uncertain, *anomalous]]
    for name in ("uncertain", "anomalous"):
        with Image.open(folder / f"queue_{name}.png") as sheet:
            pixels = np.asarray(sheet)
        assert pixels.shape[2] == 3
        assert pixels.std() > 10
    section = json.loads((folder / "section.json").read_text())
    assert [figure["file"] for figure in section["figures"]] == ["queue_uncertain.png", "queue_anomalous.png"]
    assert len(section["tables"][0]["rows"][0]) == len(section["tables"][0]["columns"])


def test_a_killed_job_continues_to_the_same_bytes_and_a_third_run_changes_nothing(
    written: Written, scores: str
) -> None:
    options = {"shards": str(written.shards), "pictures": 3}
    assert written.decide(scores, "again", **options).fresh
    folder = written.folder / "again"
    whole = content(folder)
    part = next(name for name in whole if name.startswith("part-00001"))
    for name in ("_manifest.json", "summary.json", "queue.csv", part, "_" + part.replace("parquet", "json")):
        (folder / name).unlink()
    (folder / f"{part}.0badf00d.tmp").write_bytes(b"half")
    assert written.decide(scores, "again", **options).fresh
    assert content(folder) == whole
    assert not written.decide(scores, "again", **options).fresh
    assert content(folder) == whole
    with pytest.raises(DataError, match=r"differing in: .*rule"):
        written.decide(scores, "again", **{**options, "target_fpr": 0.2})
    assert DecisionSet.open(folder).digest == files.sha256_file(folder / "_manifest.json")


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"held_out_normals": 54}, "held out 54 normal images, but drawing 0.5 of 110 again gives 55"),
        ({"held_out_normals": 0}, "all of train was learned from"),
        ({"held_out": None}, "give it as --held_out_fraction"),
        ({"shards": {"uri": "/else", "digest": "0"}}, "was not trained on the shards"),
        ({"held_out": {**HELD_OUT, "split": "val"}}, "--splits val"),
    ],
)
def test_what_was_held_out_must_be_known(tmp_path: Path, provenance: dict[str, Any], message: str) -> None:
    made = Written(tmp_path, corpus(), **provenance)
    with pytest.raises(DataError, match=message):
        made.decide(made.scores("scores"))


def test_models_of_before_take_the_fraction_as_an_option(tmp_path: Path, written: Written, scores: str) -> None:
    made = Written(tmp_path, corpus(), held_out=None)
    result = made.decide(made.scores("scores"), held_out_fraction=0.5)
    assert result.rule == written.decide(scores, "recorded").rule


def test_the_listing_of_the_shards_serves_where_one_category_was_scored(tmp_path: Path) -> None:
    made = Written(tmp_path, corpus())
    discs = made.scores("discs", lambda s: s.category == "disc")
    with pytest.raises(DataError, match=r"drawing 0.5 of 60 again gives 30"):
        made.decide(discs)
    drawn = held_out_ids(made.samples)
    own = [s for s in made.samples if s.sample_id in drawn and s.category == "disc"]
    assert made.decide(discs, shards=str(made.shards), pictures=0).rule.common == fit_bands(values(own), 0.15, 0.3)


def test_too_few_normals_are_refused_or_pooled(written: Written, scores: str) -> None:
    with pytest.raises(OptionError, match=r"which takes 29: stripe has 25 \(which support 0.113 at best\)"):
        written.decide(scores, "few", per_category=True, target_fpr=0.1)
    rule = written.decide(scores, "few", per_category=True, target_fpr=0.1, too_few="pooled").rule
    assert list(rule.categories) == ["disc"]
    assert rule.common is not None
    assert rule.common.fail.n_normals == 55


def test_wrong_options_and_inputs_are_named(tmp_path: Path, written: Written, scores: str) -> None:
    with pytest.raises(OptionError, match=r"review_fpr=0.01 is below"):
        DecideOptions("s", "o", review_fpr=0.01)
    with pytest.raises(OptionError, match="add --per_category true"):
        DecideOptions("s", "o", too_few="pooled")
    with pytest.raises(DataError, match="the scores are not calibrated"):
        written.decide(scores, "calibrated", scores_kind="calibrated")
    other = Written(tmp_path, corpus(), few_shot=3)
    with pytest.raises(DataError, match="was not scored by the model of"):
        written.decide(scores, "other", normals=other.scores("scores"))
    with pytest.raises(DataError, match="scored on other shards"):
        written.decide(scores, "other", shards=str(Written(tmp_path / "b", corpus()[:-1]).shards))


def test_a_calibrator_that_saw_the_held_out_images_is_refused(tmp_path: Path) -> None:
    made = Written(tmp_path, corpus(), calibration={"images": "all"})
    with pytest.raises(DataError, match="calibrate with --images train"):
        made.decide(made.scores("scores"), scores_kind="calibrated")


def test_the_rule_is_stored_once_in_the_model_that_made_the_scores(tmp_path: Path) -> None:
    made = Written(tmp_path, corpus())
    scores = made.scores("scores")
    before = json.loads((made.model / "model.json").read_text())
    first = made.decide(scores, write_back=str(made.model))
    assert first.written == [str(made.model)]
    stored = (made.model / "model.json").read_bytes()
    description = json.loads(stored)
    assert DecisionRule.from_dict(description["decision_rule"]) == first.rule
    assert {k: description[k] for k in ("config", "threshold", "method")} == {
        k: before[k] for k in ("config", "threshold", "method")
    }
    assert made.decide(scores, write_back=str(made.model)).written == []
    assert (made.model / "model.json").read_bytes() == stored
    other = made.decide(scores, "wide", write_back=str(made.model), target_fpr=0.2)
    assert other.written == [str(made.model)]
    files.write_json(made.model / "model.json", {**description, "categories": ["disc"]})
    with pytest.raises(ModelError, match="is not the model that made"):
        made.decide(scores, "wide", write_back=str(made.model), target_fpr=0.2)


def test_a_loaded_model_decides_by_its_rule(tmp_path: Path) -> None:
    normals = {"cog": np.arange(100.0), "weave": np.arange(100.0, 200)}
    threshold = fit_threshold(np.arange(100.0), 0.05)
    Model(METHODS["uniformaly"](tiny_method()), ["cog", "weave"], threshold).save(str(tmp_path / "model"))
    plain = unianom.load(str(tmp_path / "model"))
    assert plain.decide(1e9, None, None) == "fail"
    store_rule(str(tmp_path / "model"), fit_rule(normals, "raw", 0.05, 0.2, per_category=True), {"from": "here"})
    ruled = unianom.load(str(tmp_path / "model"))
    assert ruled.digest != plain.digest
    assert [ruled.decide(value, None, "weave") for value in (150.0, 190.0, 199.0)] == ["pass", "review", "fail"]
    assert ruled.decide(150.0, None, "cog") == "fail"
    assert ruled.decide(150.0, None, None) is None
    assert ruled.decide(150.0, None, "unheard of") is None
    ruled.save(str(tmp_path / "copy"))
    assert unianom.load(str(tmp_path / "copy")).digest == ruled.digest


def test_two_workers_decide_as_the_rule_says(written: Written, scores: str) -> None:
    written.decide(scores, "by_actors", runtime=RuntimeOptions(workers=2))
    folder = written.folder / "by_actors"
    rows = {row["sample_id"]: row["decision"] for row in DecisionSet.open(folder).table().to_pylist()}
    rule = DecisionRule.from_dict(json.loads((folder / "thresholds.json").read_text()))
    scored = ScoreSet.open(scores).table(columns=["sample_id", "category", "score"]).to_pylist()
    assert rows == {row["sample_id"]: rule.decide(row["score"], None, row["category"]) for row in scored}

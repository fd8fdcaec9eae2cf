"""A served model: the bits of batch scoring, what is told of thresholds, and images that no score is had of."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.serving.predictor import Predictor, PreparedImage, ScoredImage, predict_each
from tests.pipelines.conftest import Small
from tests.pipelines.serving.conftest import predictor_of
from unianom.calibration import Calibrator
from unianom.configs.calibration import CalibrationConfig
from unianom.data.image import ImageLimits, encode_map
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.errors import ImageError
from unianom.methods.base import Prediction
from unianom.model import load
from unianom.thresholds import Bands, DecisionRule, Threshold

TEST = Selection(("test",))


def limit(value: float) -> Threshold:
    return Threshold(value, 0.05, 0.95, 100, 95, 0.05)


def prepared(predictor: Predictor, data: bytes, category: str | None = None, **kind: Any) -> PreparedImage:
    return PreparedImage(predictor.decode(data), category, **kind)


def scored(predictor: Predictor, *images: PreparedImage) -> list[ScoredImage]:
    found = predictor.predict(images)
    assert all(isinstance(one, ScoredImage) for one in found)
    return found  # type: ignore[return-value]


def test_in_the_same_batches_a_served_model_has_the_bits_of_scoring(
    small: Small, tiny_scores: Path, predictor: Predictor
) -> None:
    shards = ShardSet.open(str(small.shards))
    expected = {row["sample_id"]: row for row in ScoreSet.open(str(tiny_scores)).table().to_pylist()}
    seen = 0
    for within in shards.ranges(TEST):
        rows = [
            row
            for batch in shards.read_range(within, TEST, ["sample_id", "category", "image"])
            for row in batch.to_pylist()
        ]
        for start in range(0, len(rows), 3):  # as tiny_scores
            batch = rows[start : start + 3]
            found = scored(predictor, *(prepared(predictor, r["image"], r["category"], map="raw") for r in batch))
            for row, own in zip(batch, found, strict=True):
                score = expected[row["sample_id"]]
                assert (own.score, own.decision) == (score["score"], score["decision"])
                assert own.anomaly_map is not None
                assert encode_map(own.anomaly_map)[0] == score["anomaly_map"]
                assert predictor.digest == score["model"]
                seen += 1
    assert seen == len(expected) > 10


def test_other_batches_move_a_score_by_rounding_alone(predictor: Predictor, pictures: list[bytes]) -> None:
    images = [prepared(predictor, data) for data in pictures[:5]]
    together = scored(predictor, *images)
    for image, own in zip(images, together, strict=True):
        (alone,) = scored(predictor, image)
        assert alone.score == pytest.approx(own.score, rel=1e-5)
        assert alone.anomaly_map is None


def decided_again(own: ScoredImage) -> str:
    """Decide from what an answer tells alone."""
    assert own.threshold is not None
    score = own.score if own.threshold.scale == "raw" else own.calibrated_score
    assert score is not None
    return "fail" if score > own.threshold.fail_above else "review" if score > own.threshold.review_above else "pass"


def test_who_is_told_threshold_and_scale_decides_the_same(
    tiny_model: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    """By the model's thresholds, those of categories, and a rule of raw or calibrated scores."""
    plain = predictor_of(tiny_model)
    scores = sorted(own.score for own in scored(plain, *(prepared(plain, data) for data in pictures[:8])))
    model = load(tiny_model)
    bands = Bands(limit(scores[5]), limit(scores[2]), 1.0)
    models = {
        "common": replace(model, category_thresholds={}, threshold=limit(scores[4])),
        "own": replace(model, category_thresholds={"cog": limit(scores[1])}, threshold=limit(scores[6])),
        "rule": replace(model, decision_rule=DecisionRule("raw", bands, {"cog": bands})),
        "some": replace(model, decision_rule=DecisionRule("raw", None, {"cog": bands})),
    }
    seen = set()
    for name, changed in models.items():
        changed.save(tmp_path / name)
        predictor = predictor_of(tmp_path / name)
        for category in (None, "cog", "never seen"):
            images = [prepared(predictor, data, category) for data in pictures[:8]]
            for own, score in zip(scored(predictor, *images), scores and images, strict=True):
                assert own.decision == changed.decide(own.score, None, score.category)
                if own.threshold is None:
                    assert own.decision is None
                    assert name == "some"
                    assert category != "cog"
                    continue
                assert own.decision == decided_again(own)
                assert own.threshold.category == ("cog" if category == "cog" and name != "common" else None)
                seen.add(own.decision)
    assert seen == {"pass", "review", "fail"}


def calibrated(model: Path, folder: Path, rule: bool = True) -> Predictor:
    """A predictor with a calibrator that goes by category, and a rule of calibrated scores."""
    made = load(model)
    side = made.method.input.side
    shape = made.method.predict(torch.zeros(1, 3, side, side)).embedding.shape
    made.calibrator = Calibrator(CalibrationConfig(variant="labels"), ["cog", "weave"], shape[1], shape[2:])  # type: ignore[arg-type]
    made.calibrator.class_statistics.copy_(torch.tensor([[0.0, 1.0], [0.5, 2.0]]))
    if rule:
        made.decision_rule = DecisionRule("calibrated", Bands(limit(0.1), limit(0.0), 1.0), {})
    made.save(folder)
    return predictor_of(folder)


def test_calibrated_scores_are_told_and_judged(tiny_model: Path, pictures: list[bytes], tmp_path: Path) -> None:
    predictor = calibrated(tiny_model, tmp_path / "model")
    cog, weave = scored(predictor, *(prepared(predictor, pictures[0], name) for name in ("cog", "weave")))
    for own in (cog, weave):
        assert own.threshold is not None
        assert (own.threshold.scale, own.threshold.category) == ("calibrated", None)
        assert own.decision == decided_again(own)
    assert cog.score == weave.score
    assert cog.calibrated_score != weave.calibrated_score
    (expected,) = load(tmp_path / "model").predict([pictures[0]], categories=["weave"])
    assert weave.calibrated_score == pytest.approx(expected.calibrated_score, rel=1e-5)


def test_a_category_that_calibration_needs_and_does_not_know(tiny_model: Path, tmp_path: Path) -> None:
    predictor = calibrated(tiny_model, tmp_path / "model")
    predictor.check_category("cog")
    for category in (None, "gear"):
        with pytest.raises(ImageError, match="give one of cog, weave") as caught:
            predictor.check_category(category)
        assert caught.value.status == "unsupported"


def test_an_image_without_a_finite_score_is_told_and_no_other(
    predictor: Predictor, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [prepared(predictor, data, map="raw") for data in pictures[:3]]
    expected = scored(predictor, *images)
    method = predictor.model.method
    scoring = type(method).score_images

    def spoilt(self: Any, batch: torch.Tensor) -> Any:
        found = scoring(self, batch)
        score = found.score.clone()
        score[1] = float("nan")
        return replace(found, score=score)

    monkeypatch.setattr(type(method), "score_images", spoilt)
    first, broken, last = predictor.predict(images)
    assert isinstance(broken, ImageError)
    assert broken.status == "unsupported"
    for own, other in ((first, expected[0]), (last, expected[2])):
        assert isinstance(own, ScoredImage)
        assert own.score == other.score
        np.testing.assert_array_equal(own.anomaly_map, other.anomaly_map)  # type: ignore[arg-type]


def test_an_image_that_the_network_cannot_stand_takes_no_other_with_it(
    predictor: Predictor, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [prepared(predictor, data) for data in pictures[:3]]
    poison = images[1].pixels.astype(np.float32).mean()
    predict = Predictor.predict

    def fails(self: Predictor, given: list[PreparedImage]) -> Any:
        if any(image.pixels.astype(np.float32).mean() == poison for image in given):
            raise RuntimeError("out of memory")
        return predict(self, given)

    monkeypatch.setattr(Predictor, "predict", fails)
    first, broken, last = predict_each([(predictor, image) for image in images])
    assert isinstance(broken, RuntimeError)
    assert isinstance(first, ScoredImage)
    assert isinstance(last, ScoredImage)


def test_a_batch_that_failed_is_let_go_before_its_images_are_tried_alone() -> None:
    """What it holds of the device's memory may be what they lack."""

    class Memory:
        pass

    held: list[weakref.ref[Memory]] = []

    class Full:
        def predict(self, images: list[Any]) -> list[Any]:
            assert all(memory() is None for memory in held)
            taken = Memory()
            held.append(weakref.ref(taken))
            raise RuntimeError(f"out of memory for {len(images)}")

    full: Any = Full()
    gc.disable()
    try:
        found = predict_each([(full, image) for image in ("a", "b")])  # type: ignore[misc]
    finally:
        gc.enable()
    assert [str(one) for one in found] == ["out of memory for 1"] * 2
    assert len(held) == 3


def test_while_a_model_is_replaced_each_image_is_scored_by_its_own(
    predictor: Predictor, tiny_model: Path, pictures: list[bytes]
) -> None:
    other = predictor_of(tiny_model)
    batches: list[tuple[Predictor, int]] = []
    for one in (predictor, other):
        plain = one.predict

        def counted(given: Any, one: Predictor = one, plain: Any = plain) -> Any:
            batches.append((one, len(given)))
            return plain(given)

        one.predict = counted  # type: ignore[method-assign]
    try:
        items = [(own, prepared(own, data)) for own, data in zip((predictor, other) * 2, pictures, strict=False)]
        found = predict_each(items)
    finally:
        for one in (predictor, other):
            del one.__dict__["predict"]
    assert batches == [(predictor, 2), (other, 2)]
    assert [own.score for own in found] == pytest.approx(  # type: ignore[union-attr]
        [scored(predictor, item)[0].score for _, item in items], rel=1e-5
    )


def test_limits_hold_for_each_image(tiny_model: Path, pictures: list[bytes]) -> None:
    small = predictor_of(tiny_model, limits=ImageLimits(max_pixels=64 * 64 - 1))
    with pytest.raises(ImageError, match="the limit is 4095") as caught:
        small.decode(pictures[0])
    assert caught.value.status == "too_large"


def test_a_model_that_cannot_predict_is_not_put_to_use(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = type(load(tiny_model).method)

    def broken(*_: Any) -> Prediction:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(method, "score_images", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        predictor_of(tiny_model)


def test_the_description_tells_what_decides(model: Path) -> None:
    predictor = predictor_of(model)
    told = predictor.description()
    assert (told["method"], told["digest"], told["input_side"]) == ("uniformaly", predictor.digest, 64)
    assert set(told["category_thresholds"]) == {"cog", "weave"}
    own = predictor.threshold("cog")
    assert own is not None
    assert told["category_thresholds"]["cog"]["fail_above"] == own.fail_above

"""Calibration against hand-computed values and plain second implementations."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.conftest import TINY, random_images, tiny_method
from tests.test_model import pictures
from unianom import files
from unianom.calibration import ArrayRows, Calibrator, HeadTrainer, MapStatistics, fit_calibrator, make_head
from unianom.configs.calibration import CalibrationConfig, HeadConfig
from unianom.errors import DataError, ModelError, OptionError
from unianom.methods import Prediction
from unianom.methods.revdist import RevDist
from unianom.model import Model, load

NAMES = ["bolt", "nut"]


def maps(count: int = 12, side: int = 8, seed: int = 0) -> torch.Tensor:
    """Maps of two categories in turn; those of the second are ten times as large."""
    drawn = torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([1.0, 10.0]).repeat(count // 2)[:, None, None]


def embeddings(count: int = 12, channels: int = 4, seed: int = 1) -> np.ndarray:
    """Embeddings that tell the two categories apart by their first channel."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(count, channels, 3, 3)).astype(np.float32)
    drawn[1::2, 0] += 5
    return drawn


def category(count: int = 12) -> np.ndarray:
    return np.arange(count) % 2


def found(anomaly_map: torch.Tensor, features: np.ndarray) -> Prediction:
    return Prediction(anomaly_map, anomaly_map.amax((1, 2)), anomaly_map, torch.from_numpy(features))


def fitted(count: int = 12, **options) -> Calibrator:
    options = {"iterations": 300, "batch_size": 4, "learning_rate": 0.02, **options}
    given = CalibrationConfig(**options)
    return fit_calibrator(given, NAMES, embeddings(count), MapStatistics.of(maps(count)), category(count))


# ----------------------------------------------------------------------------------------------------------- statistics
def test_statistics_of_one_map_by_hand():
    statistics = MapStatistics.of(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
    assert statistics.targets("mean_max").tolist() == [[3.0, 6.0]]
    # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    assert statistics.targets("mean_std") == pytest.approx(np.array([[3.0, 3.0 + 3 * 3.5**0.5]]))


def test_class_statistics_are_of_all_pixels_but_the_top_is_a_mean_of_maxima():
    drawn = maps()[::2]
    statistics = MapStatistics.of(drawn)
    pixels = drawn.double().flatten().numpy()
    assert statistics.of_class("mean_max") == pytest.approx(
        [pixels.mean(), np.mean([float(one.max()) for one in drawn])], rel=1e-6
    )
    assert statistics.of_class("mean_std") == pytest.approx([pixels.mean(), pixels.mean() + 3 * pixels.std()], rel=1e-6)
    assert statistics.of_class("mean_max")[1] < pixels.max()


# ----------------------------------------------------------------------------------------------------------------- head
def test_head_sizes_of_the_paper():
    # RevDist: 2048 channels on 8 × 8 cells (METHODS 3.3): 37.7 M in the convolution, 0.53 M in the linear layers
    head = make_head(2048, (8, 8), 2, HeadConfig())
    counts = [sum(p.numel() for p in layer.parameters()) for layer in head if any(True for _ in layer.parameters())]
    assert counts == [2048 * 2048 * 9 + 2048, 2048 * 256 + 256, 256 * 2 + 2]
    one = make_head(2048, (8, 8), 2, HeadConfig(kernel=1))[0]
    assert sum(p.numel() for p in one.parameters()) == 2048 * 2048 + 2048
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, "Conv2d ReLU AdaptiveAvgPool2d Flatten Dropout Linear ReLU Dropout Linear"),
        ({"convolutions": 0, "linears": 1}, "AdaptiveAvgPool2d Flatten Dropout Linear"),
        ({"convolutions": 2, "pool": "flatten"}, "Conv2d ReLU Conv2d ReLU Flatten Dropout Linear ReLU Dropout Linear"),
        (
            {"convolutions": 0, "linears": 3},
            "AdaptiveAvgPool2d Flatten Dropout Linear ReLU Dropout Linear ReLU Dropout Linear",
        ),
    ],
)
def test_head_structures_of_table_3(changes, kinds):
    head = make_head(6, (3, 2), 5, HeadConfig(**changes))
    assert [type(layer).__name__ for layer in head] == kinds.split()
    assert head(torch.rand(2, 6, 3, 2)).shape == (2, 5)


def test_standardised_embedding_has_mean_zero_and_one_deviation_for_all_channels():
    features = embeddings() * 7 + 3
    calibrator = fit_calibrator(CalibrationConfig(iterations=1), NAMES, features, MapStatistics.of(maps()), category())
    assert calibrator.feature_mean.numpy() == pytest.approx(features.mean((0, 2, 3)), rel=1e-4)
    variance = features.astype(np.float64).var((0, 2, 3))
    assert float(calibrator.feature_deviation) == pytest.approx(np.sqrt(variance.mean()), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("standardise", [False, True])
def test_loss_is_smooth_l1_in_the_unit_of_the_maps(standardise):
    calibrator = fitted(standardise=standardise, alpha=0.7, iterations=1).eval()
    features, targets = torch.from_numpy(embeddings()), torch.tensor([[0.2, 0.9], [5.0, 9.0]]).repeat(6, 1)
    predicted = calibrator.statistics_of(features).detach().numpy()
    total = 0.0
    for part in range(2):
        losses = []
        for made, aim in zip(predicted[:, part], targets[:, part].tolist(), strict=True):
            distance = abs(made - aim)
            losses.append(distance**2 / (2 * 0.7) if distance < 0.7 else distance - 0.7 / 2)
        total += float(np.mean(losses)) / float(calibrator.target_deviation[part])
    loss = calibrator.loss(features, targets, torch.from_numpy(category())).detach()
    assert float(loss) == pytest.approx(total, rel=1e-4)
    if not standardise:
        assert calibrator.target_deviation.tolist() == [1, 1]


def test_loss_of_the_classifier_is_cross_entropy():
    calibrator = fitted(variant="classifier", iterations=1).eval()
    features = torch.from_numpy(embeddings())
    logits = calibrator.outputs(features).detach().double().numpy()
    own = [logit[c] - np.log(np.exp(logit).sum()) for logit, c in zip(logits, category(), strict=True)]
    loss = calibrator.loss(features, torch.zeros(12, 2), torch.from_numpy(category())).detach()
    assert float(loss) == pytest.approx(-np.mean(own), rel=1e-4)


def test_alpha_is_the_deviation_of_the_tops_within_categories_unless_given():
    tops = MapStatistics.of(maps()).targets("mean_max")[:, 1]
    within = np.concatenate([tops[::2] - tops[::2].mean(), tops[1::2] - tops[1::2].mean()])
    assert float(fitted(iterations=1).alpha) == pytest.approx(np.sqrt((within**2).mean()), rel=1e-6)
    assert tops.std() > 5 * float(fitted(iterations=1).alpha)  # the categories differ far more than their images
    assert float(fitted(iterations=1, alpha=0.25).alpha) == 0.25


# ------------------------------------------------------------------------------------------------------------- variants
def by_hand(anomaly_map: np.ndarray, level: float, top: float, share: float) -> tuple[np.ndarray, float]:
    calibrated = (anomaly_map - level) / (top - level)
    largest = np.sort(calibrated.ravel())[::-1][: max(1, int(share * calibrated.size))]
    return calibrated, float(largest.mean())


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("variant", ["labels", "classifier"])
def test_categories_statistics_calibrate_by_label_and_by_classifier(variant, share):
    calibrator = fitted(variant=variant, score_share=share)
    statistics = MapStatistics.of(maps())
    tested = maps(seed=5)
    result = calibrator.calibrate(found(tested, embeddings(seed=9)), [NAMES[c] for c in category()])
    for number, own in enumerate(category()):
        mine = MapStatistics(*(values[category() == own] for values in statistics))
        calibrated, score = by_hand(tested[number].numpy(), *mine.of_class("mean_max"), share)
        assert float(result.score[number]) == pytest.approx(score, rel=1e-4)
        assert result.maps(tested)[number].numpy() == pytest.approx(calibrated, rel=1e-4, abs=1e-6)


def test_regressor_brings_two_categories_to_one_scale_without_labels():
    calibrator = fitted(64, iterations=600, head=HeadConfig(dropout=0.0))
    tested = maps(64, seed=3)
    features = embeddings(64, seed=4)
    raw = tested.amax((1, 2)).numpy()
    calibrated = calibrator.calibrate(found(tested, features)).score.numpy()
    assert raw[1::2].min() > 5 * raw[::2].max()
    assert abs(np.median(calibrated[1::2]) - np.median(calibrated[::2])) < 0.1
    assert np.median(calibrated) == pytest.approx(1, abs=0.1)  # by definition the top of a usual normal image is 1


def test_without_calibration_only_the_reduction_is_left():
    calibrator = fitted(variant="none", score_share=0.1)
    tested = maps(seed=5)
    result = calibrator.calibrate(found(tested, embeddings()))
    assert torch.equal(result.maps(tested), tested)
    expected = [by_hand(one.numpy(), 0.0, 1.0, 0.1)[1] for one in tested]
    assert result.score.numpy() == pytest.approx(np.array(expected), rel=1e-5)


def test_calibration_keeps_the_order_of_an_images_pixels():
    tested = maps(seed=5)
    result = fitted().calibrate(found(tested, embeddings()))
    assert torch.equal(result.maps(tested).flatten(1).argsort(1), tested.flatten(1).argsort(1))
    assert (result.scale > 0).all()


def test_smoothing_after_calibration_is_the_same_but_for_borders_padded_with_zeros():
    config = TINY["revdist"].config
    method = RevDist(dataclasses.replace(config, map=dataclasses.replace(config.map, blur="box"))).eval()
    prediction = method.predict(random_images(2))
    level, scale = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 2.0])
    before = (prediction.anomaly_map - level[:, None, None]) / scale[:, None, None]
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / 32.0)
    kernel = torch.from_numpy(np.outer(kernel, kernel) / np.outer(kernel, kernel).sum()).float()
    raw_map = (prediction.raw_map - level[:, None, None]) / scale[:, None, None]
    after = nn.functional.conv2d(raw_map[:, None], kernel[None, None], padding=2)[:, 0]
    inside = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(before[inside], after[inside], rtol=1e-4, atol=1e-5)


def test_scale_is_never_below_that_of_any_training_image():
    calibrator = fitted(iterations=1)
    with torch.no_grad():
        for layer in calibrator.head:
            for parameter in layer.parameters():
                parameter.zero_()
        calibrator.head[-1].bias.copy_(torch.tensor([5.0, -5.0]))  # û above γ̂
    targets = MapStatistics.of(maps()).targets("mean_max")
    result = calibrator.calibrate(found(maps(), embeddings()))
    assert result.scale.numpy() == pytest.approx((targets[:, 1] - targets[:, 0]).min(), rel=1e-4)
    assert result.offset.numpy() == pytest.approx(float(calibrator.target_mean[0] + 5 * calibrator.target_deviation[0]))


# ------------------------------------------------------------------------------------------------------------- training
def test_training_interrupted_anywhere_ends_the_same():
    whole = fitted(iterations=7, batch_size=5)
    config = whole.config
    statistics, features = MapStatistics.of(maps()), embeddings()
    state = None
    for end in (2, 3, 7):
        calibrator = Calibrator(config, NAMES, 4, (3, 3))
        values = features.astype(np.float64)
        calibrator.set_statistics(statistics, category(), values.mean((0, 2, 3)), (values**2).mean((0, 2, 3)))
        trainer = HeadTrainer(calibrator, ArrayRows(features), statistics.targets("mean_max"), category())
        if state is not None:
            trainer.restore(state)
        torch.rand(3)  # the global random state plays no part
        trainer.run(end)
        state = trainer.state()
    for name, value in calibrator.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_every_image_is_seen_once_an_epoch():
    calibrator = fitted(iterations=1, batch_size=5)
    trainer = HeadTrainer(calibrator, ArrayRows(embeddings()), np.zeros((12, 2)), category())
    drawn = np.concatenate([trainer._batch(step) for step in range(12)])
    for epoch in range(5):
        assert sorted(drawn[12 * epoch : 12 * (epoch + 1)]) == list(range(12))
    assert list(drawn[:12]) != list(drawn[12:24])


def test_a_loss_that_is_not_finite_is_told():
    with pytest.raises(DataError, match=r"not finite at step .*lower --calibration.learning_rate"):
        fitted(learning_rate=1e20, standardise=False)


# --------------------------------------------------------------------------------------------------------------- errors
def test_labels_need_categories_that_are_known():
    calibrator = fitted(variant="labels")
    with pytest.raises(DataError, match="goes by the category of each image"):
        calibrator.calibrate(found(maps(), embeddings()))
    with pytest.raises(DataError, match=r"knows bolt, nut, not screw; calibrate with --calibration.variant cada"):
        calibrator.calibrate(found(maps(), embeddings()), ["screw"] * 12)


def test_a_category_without_images_and_constant_maps_are_refused():
    with pytest.raises(DataError, match="no normal training image of category nut"):
        fit_calibrator(CalibrationConfig(), NAMES, embeddings(), MapStatistics.of(maps()), np.zeros(12, int))
    with pytest.raises(DataError, match="maps of the normal training images are constant"):
        fit_calibrator(CalibrationConfig(), NAMES, embeddings(), MapStatistics.of(torch.ones(12, 4, 4)), category())


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"score_share": 1.5},
        {"iterations": 0},
        {"learning_rate": float("inf")},
        {"momentum": 1.0},
        {"clip_norm": 0.0},
        {"schedule": "linear"},
        {"variant": "both"},
        {"statistics": "median"},
    ],
)
def test_wrong_options(changes):
    with pytest.raises(OptionError, match=next(iter(changes))):
        CalibrationConfig(**changes)


@pytest.mark.parametrize("changes", [{"kernel": 2}, {"dropout": 1.0}, {"linears": 0}, {"convolutions": -1}])
def test_wrong_heads(changes):
    with pytest.raises(OptionError, match=next(iter(changes))):
        HeadConfig(**changes)


# --------------------------------------------------------------------------------------------------------- model folder
def calibrated_model(**options) -> Model:
    method = tiny_method("patchcore")
    prediction = method.predict(random_images(6))
    options = {"iterations": 3, "batch_size": 2, **options}
    calibrator = fit_calibrator(
        CalibrationConfig(**options),
        NAMES,
        prediction.embedding.numpy(),
        MapStatistics.of(prediction.raw_map),
        np.arange(6) % 2,
    )
    return Model(method, NAMES, calibrator=calibrator)


@pytest.mark.parametrize("variant", ["cada", "classifier", "labels", "none"])
def test_a_saved_calibrator_calibrates_the_same(variant, tmp_path):
    model = calibrated_model(variant=variant)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    images, names = pictures(3), ["nut", "bolt", "nut"]
    for one, other in zip(model.predict(images, categories=names), loaded.predict(images, 2, categories=names)):
        assert one.calibrated_score == pytest.approx(other.calibrated_score, rel=1e-5)
        assert one.calibrated_map == pytest.approx(other.calibrated_map, rel=1e-4, abs=1e-5)
        assert one.score == pytest.approx(other.score, rel=1e-5)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert description["calibrator"]["config"]["variant"] == variant


def test_a_prediction_does_not_depend_on_other_images():
    model, images = calibrated_model(), pictures(4)
    together = model.predict(images)
    for number, image in enumerate(images):
        (alone,) = model.predict([image])
        assert alone.calibrated_score == pytest.approx(together[number].calibrated_score, rel=1e-4)


def test_a_calibrator_is_added_replaced_and_taken_away(tmp_path):
    folder = tmp_path / "model"
    model = calibrated_model()
    plain = dataclasses.replace(model, calibrator=None)
    plain.save(folder)
    weights = (folder / "weights.safetensors").read_bytes()
    assert load(folder).predict(pictures(1))[0].calibrated_score is None
    for variant in ("cada", "labels"):
        Model.add_calibrator(folder, calibrated_model(variant=variant).calibrator, {"plan": variant})
        loaded = load(folder)
        assert loaded.calibrator.config.variant == variant
        assert loaded.provenance["calibration"] == {"plan": variant}
        assert loaded.digest == files.sha256_file(folder / "model.json")
    assert (folder / "weights.safetensors").read_bytes() == weights
    plain.save(folder)
    assert load(folder).calibrator is None
    assert not (folder / "calibrator.safetensors").exists()


def test_damaged_calibrators_are_named(tmp_path):
    folder = tmp_path / "model"
    calibrated_model().save(folder)
    path = folder / "calibrator.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"calibrator.safetensors is damaged"):
        load(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"calibrator.safetensors is missing; .* or calibrate again"):
        load(folder)
    path.write_bytes(content)
    description = json.loads((folder / "model.json").read_text())
    description["calibrator"]["config"]["variant"] = "labels"  # which has no head
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=r"does not fit the config in model.json; .*; calibrate again"):
        load(folder)
    del description["calibrator"]["grid"]
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=r"calibrator in model.json .* is not valid"):
        load(folder)

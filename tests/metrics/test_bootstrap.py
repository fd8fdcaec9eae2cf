"""Resampling: counts are what plain resampling gives, and intervals cover what they promise."""

import numpy as np
import pytest
import sklearn.metrics

from unianom.metrics import bootstrap
from unianom.metrics.bootstrap import (
    draw_resamples,
    histogram_aupro,
    histogram_auroc_ap,
    image_resamples,
    interval,
)
from unianom.metrics.pixel import pixel_metrics


def test_draws_keep_the_size_of_every_stratum():
    strata = np.array([0, 1, 0, 2, 1, 0, 0])
    drawn = draw_resamples(strata, 200, np.random.default_rng(0))
    assert drawn.shape == (200, 7)
    for stratum, size in ((0, 4), (1, 2), (2, 1)):
        assert (drawn[:, strata == stratum].sum(axis=1) == size).all()
    assert drawn[:, 3].tolist() == [1] * 200
    assert drawn[:, :3].max() > 1
    again = draw_resamples(strata, 200, np.random.default_rng(0))
    assert (drawn == again).all()


@pytest.mark.parametrize("at_once", [1 << 22, 64])
def test_image_metrics_of_a_resample_are_those_of_the_repeated_images(monkeypatch, at_once):
    monkeypatch.setattr(bootstrap, "_AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 12, 40).astype(float), (np.arange(40) % 3 == 0).astype(int)
    drawn = draw_resamples(labels, 25, rng)
    found = image_resamples(scores, labels, drawn)
    for number, counts in enumerate(drawn):
        truth, values = np.repeat(labels, counts), np.repeat(scores, counts)
        assert found["image_auroc"][number] == pytest.approx(sklearn.metrics.roc_auc_score(truth, values))
        assert found["image_ap"][number] == pytest.approx(sklearn.metrics.average_precision_score(truth, values))


def test_histograms_give_the_pixel_metrics_of_tied_scores():
    rng = np.random.default_rng(2)
    masks = np.zeros((3, 12, 12), bool)
    masks[0, 2:5, 3:9] = masks[0, 8:11, 1:3] = masks[1, 4:9, 4:6] = True
    maps = (rng.integers(0, 9, masks.shape) + 3 * masks).astype(np.float32)
    exact = pixel_metrics(maps, masks)
    levels = np.arange(12)
    normal = np.array([[np.sum(maps[~masks] == level) for level in levels]])
    anomalous = np.array([[np.sum(maps[masks] == level) for level in levels]])
    regions = [maps[0, 2:5, 3:9], maps[0, 8:11, 1:3], maps[1, 4:9, 4:6]]
    weight = np.array([[sum(np.mean(region == level) for region in regions) for level in levels]])
    auroc, ap = histogram_auroc_ap(normal, anomalous)
    assert (auroc[0], ap[0]) == pytest.approx((exact.auroc, exact.ap), abs=1e-12)
    assert histogram_aupro(normal, weight, 0.3)[0] == pytest.approx(exact.aupro, abs=1e-12)
    assert histogram_aupro(normal, 5 * weight, 0.3)[0] == pytest.approx(exact.aupro, abs=1e-12)


def test_undefined_without_both_kinds():
    nothing, something = np.zeros((1, 3)), np.ones((1, 3))
    for normal, anomalous in ((nothing, something), (something, nothing)):
        assert np.isnan(histogram_auroc_ap(normal, anomalous)).all()
        assert np.isnan(histogram_aupro(normal, anomalous, 0.3)).all()
    assert interval(np.array([np.nan, np.nan]), 0.95) is None


def test_an_interval_holds_the_middle_of_the_defined_values():
    values = np.append(np.arange(1001) / 1000, np.nan)
    assert interval(values, 0.9) == pytest.approx([0.05, 0.95])


def test_intervals_cover_the_truth_about_as_often_as_promised():
    """Normal scores N(0, 1), anomalous ones N(1, 1): AUROC is Φ(1 / √2) = 0.7602."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 60)
    covered = 0
    for _ in range(200):
        scores = rng.normal(size=120) + labels
        low, high = interval(image_resamples(scores, labels, draw_resamples(labels, 200, rng))["image_auroc"], 0.9)
        covered += low <= 0.76025 <= high
    assert 164 <= covered <= 194  # of 200, at 90 %: outside this less than once in a hundred

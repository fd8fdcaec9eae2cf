import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from unianom.errors import DataError
from unianom.metrics import image_curves, image_metrics


def test_hand_computed():
    # Descending: A N A A N; pairs won 2 + 1 + 1 of 6; precisions at recalls 1/3, 2/3, 1: 1, 2/3, 3/4.
    metrics = image_metrics([9, 8, 7, 6, 5], [1, 0, 1, 1, 0])
    assert metrics["image_auroc"] == pytest.approx(4 / 6)
    assert metrics["image_ap"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert metrics["image_f1_max"] == pytest.approx(2 * 0.75 / 1.75, abs=1e-6)
    assert metrics["image_f1_threshold"] == 6
    assert metrics["image_accuracy_at_f1_max"] == pytest.approx(4 / 5)
    assert (metrics["n_images"], metrics["n_anomalous"]) == (5, 3)


def test_f1_has_the_small_constant_in_its_denominator():
    assert image_metrics([1, 0], [1, 0])["image_f1_max"] == 2 / (2 + 1e-7)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_agrees_with_scikit_learn_whatever_the_ties(rows):
    scores = np.array([score for score, _ in rows]) / 4
    labels = np.array([label for _, label in rows], dtype=int)
    metrics = image_metrics(scores, labels)
    if labels.min() == labels.max():
        assert math.isnan(metrics["image_auroc"])
        return
    assert metrics["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics["image_ap"] == pytest.approx(sklearn.metrics.average_precision_score(labels, scores), abs=1e-12)
    f1 = {t: sklearn.metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
    threshold = metrics["image_f1_threshold"]
    assert metrics["image_f1_max"] == pytest.approx(max(f1.values()), abs=1e-6)
    assert f1[threshold] == pytest.approx(max(f1.values()), abs=1e-6)
    expected = sklearn.metrics.accuracy_score(labels, scores >= threshold)
    assert metrics["image_accuracy_at_f1_max"] == pytest.approx(expected)


def test_many_real_valued_scores():
    rng = np.random.default_rng(0)
    labels = rng.random(2000) < 0.2
    scores = (rng.normal(size=2000) + labels).astype(np.float32)
    metrics = image_metrics(scores, labels)
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / (precision + recall + 1e-7)
    assert metrics["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics["image_ap"] == pytest.approx(sklearn.metrics.average_precision_score(labels, scores), abs=1e-12)
    assert metrics["image_f1_max"] == pytest.approx(f1.max(), abs=1e-12)
    assert metrics["image_f1_threshold"] == thresholds[f1.argmax()]


def test_a_worse_than_random_score_is_not_flipped():
    assert image_metrics([1, 2, 3, 4], [1, 1, 0, 0])["image_auroc"] == 0


def test_perfect_separation_is_exactly_one():
    metrics = image_metrics(np.linspace(0, 1, 77), np.arange(77) >= 70)
    assert (metrics["image_auroc"], metrics["image_ap"], metrics["image_accuracy_at_f1_max"]) == (1, 1, 1)


def test_constant_scores_say_nothing_and_do_not_fail():
    metrics = image_metrics([2.5] * 8, [1, 0, 0, 0, 1, 0, 0, 0])
    assert metrics["image_auroc"] == 0.5
    assert metrics["image_ap"] == 0.25


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_kind_of_image_leaves_all_but_the_counts_undefined(labels):
    metrics = image_metrics(np.arange(len(labels)), labels)
    counts = {"n_images": len(labels), "n_anomalous": sum(labels)}
    assert {name: value for name, value in metrics.items() if not math.isnan(value)} == counts
    assert list(metrics) == list(image_metrics([1, 2], [0, 1]))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, float("nan")], [0, 1], "score of image 1 is nan"),
        ([float("-inf"), 1.0], [0, 1], "score of image 0 is -inf"),
        ([1.0, 2.0], [0, 2], "label of image 1 is 2"),
        ([1.0, 2.0], [0, 1, 1], r"shape \(2,\) and labels \(3,\)"),
        ([[1.0, 2.0]], [[0, 1]], "one score and one label an image"),
    ],
)
def test_wrong_input_is_named(scores, labels, message):
    with pytest.raises(DataError, match=message):
        image_metrics(scores, labels)


def test_curves_enclose_the_areas():
    rng = np.random.default_rng(3)
    labels = rng.random(400) < 0.5
    scores = rng.normal(size=400) + labels
    curves = image_curves(scores, labels, max_points=5000)
    metrics = image_metrics(scores, labels)
    assert np.trapezoid(curves["roc"].y, curves["roc"].x) == pytest.approx(metrics["image_auroc"], abs=1e-12)
    steps = np.diff(curves["pr"].x) * curves["pr"].y[1:]
    assert steps.sum() == pytest.approx(metrics["image_ap"], abs=1e-12)
    assert len(image_curves(scores, labels, max_points=50)["roc"].x) <= 50

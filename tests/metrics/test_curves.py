import numpy as np
import pytest
import sklearn.metrics

from unianom.metrics.curves import Curve, auroc, operating_points, pr_curve, roc_curve, thin


def points_of(anomalous, normal):
    return operating_points(np.array(anomalous, float), np.sort(np.array(normal, float)))


def test_counts_at_each_distinct_anomalous_score():
    points = points_of([3, 1, 3, 2], [0, 2, 2, 5, 1])
    assert points.thresholds.tolist() == [3, 2, 1]
    assert points.position.tolist() == [0, 2, 0, 1]
    assert points.true_positives.tolist() == [2, 3, 4]
    assert points.false_positives.tolist() == [1, 3, 4]
    assert points.false_positives_above.tolist() == [1, 1, 3]


def test_more_normal_scores_add_up():
    anomalous, normal = [3, 1, 2], [0, 2, 2, 5, 1, 1]
    whole = points_of(anomalous, normal)
    parts = points_of(anomalous, normal[:2]).with_more_normal(np.sort(np.array(normal[2:], float)))
    for name in ("false_positives", "false_positives_above"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()
    assert parts.n_normal == 6


def test_roc_curve_has_diagonals_on_ties_only():
    curve = roc_curve(points_of([3, 1], [4, 1, 0, 0]))
    # Above 3 lies one normal (a run to 1/4), 3 itself is a vertical rise, 1 ties with a normal (a diagonal).
    assert curve.x.tolist() == [0, 0.25, 0.25, 0.25, 0.5, 1]
    assert curve.y.tolist() == [0, 0, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("levels", [3, 20, 10_000])
def test_roc_curve_is_that_of_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    labels = rng.random(300) < 0.3
    scores = rng.integers(0, levels, 300) + 3.0 * labels
    points = points_of(scores[labels], scores[~labels])
    curve = roc_curve(points, max_points=10_000)
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    at = np.linspace(0, 1, 997)[1:-1]  # away from vertical runs a curve has one value
    at = at[np.abs(at[:, None] - fpr).min(axis=1) > 1e-9]
    np.testing.assert_allclose(np.interp(at, curve.x, curve.y), np.interp(at, fpr, tpr), atol=1e-12)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(auroc(points), abs=1e-12)


def test_pr_curve_is_that_of_scikit_learn_at_the_anomalous_scores():
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    scores = rng.integers(0, 30, 200) + 5.0 * labels
    curve = pr_curve(points_of(scores[labels], scores[~labels]))
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, scores)
    at = np.isin(thresholds, scores[labels])
    np.testing.assert_allclose(curve.x[1:], recall[:-1][at][::-1])
    np.testing.assert_allclose(curve.y[1:], precision[:-1][at][::-1])


def test_pr_curve_starts_with_its_first_precision():
    curve = pr_curve(points_of([3, 1], [4, 2]))
    assert curve.x.tolist() == [0, 0.5, 1]
    assert curve.y.tolist() == [0.5, 0.5, 0.5]


def test_curves_without_one_kind_are_empty():
    for points in (points_of([], [1, 2]), points_of([1, 2], []), points_of([], [])):
        assert len(roc_curve(points).x) == len(pr_curve(points).y) == 0


def distance_to_polyline(x, y, curve):
    a = np.stack([curve.x[:-1], curve.y[:-1]], axis=1)
    b = np.stack([curve.x[1:], curve.y[1:]], axis=1)
    p = np.array([x, y])
    length = np.maximum(((b - a) ** 2).sum(axis=1), 1e-300)
    t = np.clip(((p - a) * (b - a)).sum(axis=1) / length, 0, 1)
    return np.sqrt(((a + t[:, None] * (b - a) - p) ** 2).sum(axis=1)).min()


@pytest.mark.parametrize("max_points", [2, 10, 50])
@pytest.mark.parametrize("shape", ["smooth", "corner"])
def test_thinning_keeps_the_ends_and_stays_within_its_bound(max_points, shape):
    rng = np.random.default_rng(1)
    if shape == "smooth":
        x = np.sort(rng.random(2000))
        y = np.sqrt(x)
    else:  # a steep rise of many points, then one long run: the corner must not be cut
        x = np.concatenate([np.linspace(0, 0.01, 1999), [1.0]])
        y = np.concatenate([np.linspace(0, 0.9, 1999), [1.0]])
    whole = Curve(x, y)
    thinned = thin(whole, max_points)
    assert len(thinned.x) <= max_points
    assert (thinned.x[0], thinned.y[0], thinned.x[-1], thinned.y[-1]) == (x[0], y[0], x[-1], y[-1])
    step = (np.abs(np.diff(x)) + np.abs(np.diff(y))).sum() / (max_points - 1)
    assert max(distance_to_polyline(a, b, thinned) for a, b in zip(x, y)) <= step + 1e-12


def test_short_curves_are_left_alone():
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.9, 1.0]))
    assert thin(curve, 3) is curve

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

from unianom.errors import DataError
from unianom.metrics.clustering import (
    adjusted_rand_index,
    clustering_metrics,
    contingency,
    match_clusters,
    normalised_mutual_information,
)


def drawn(seed, images=60, clusters=4, types=4, agree=0.6):
    """Types, and clusters that agree with them in part."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, types, images)
    found = np.where(rng.random(images) < agree, truth % clusters, rng.integers(0, clusters, images))
    return found, np.array(["good", "dent", "hole", "burr", "scratch", "stain"])[truth]


def best_by_trying(found, truth):
    """Most images in the right cluster, over all ways to name clusters by types."""
    clusters, types = sorted(set(found.tolist())), sorted(set(truth.tolist()))
    names = [*types, *[None] * max(0, len(clusters) - len(types))]
    return max(
        sum(
            dict(zip(clusters, order, strict=True))[c] == t for c, t in zip(found.tolist(), truth.tolist(), strict=True)
        )
        for order in permutations(names, len(clusters))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("clusters", "types"), [(4, 4), (5, 3), (2, 5), (1, 4), (4, 1)])
def test_agreement_is_that_of_scikit_learn(seed, clusters, types):
    found, truth = drawn(seed, clusters=clusters, types=types)
    metrics = clustering_metrics(found, truth)
    assert metrics["nmi"] == pytest.approx(normalized_mutual_info_score(truth, found), abs=1e-12)
    assert metrics["ari"] == pytest.approx(adjusted_rand_score(truth, found), abs=1e-12)
    assert (metrics["n_images"], metrics["n_types"]) == (60, len(set(truth)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("clusters", "types"), [(4, 4), (5, 3), (3, 5)])
def test_accuracy_is_the_best_over_all_namings(seed, clusters, types):
    found, truth = drawn(seed, clusters=clusters, types=types, agree=0.3)
    assert clustering_metrics(found, truth)["accuracy"] == best_by_trying(found, truth) / len(truth)


@pytest.mark.parametrize("seed", range(4))
def test_f1_is_that_of_scikit_learn_on_renamed_clusters(seed):
    found, truth = drawn(seed, clusters=4, types=5)
    table, rows, columns = contingency(found, truth)
    name = {rows[row]: columns[column] for row, column in match_clusters(table)}
    renamed = [name[cluster] for cluster in found]
    metrics = clustering_metrics(found, truth)
    assert metrics["accuracy"] == pytest.approx(f1_score(truth, renamed, average="micro"))
    assert metrics["f1_macro"] == pytest.approx(f1_score(truth, renamed, average="macro", zero_division=0))


def test_by_hand():
    # two clusters of three, with one image of each astray
    metrics = clustering_metrics([0, 0, 0, 1, 1, 1], ["a", "a", "b", "b", "b", "a"])
    assert metrics["accuracy"] == 4 / 6
    assert metrics["f1_macro"] == pytest.approx(2 / 3)
    # pairs in one cell 1 + 0 + 0 + 1 = 2, in one cluster 6, of one type 6, of all 15: (2 − 36/15) / (6 − 36/15)
    assert metrics["ari"] == pytest.approx((2 - 36 / 15) / (6 - 36 / 15))
    mutual = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert metrics["nmi"] == pytest.approx(mutual / np.log(2))


def test_names_and_order_do_not_matter_and_agreement_is_one():
    found, truth = drawn(0)
    order = np.random.default_rng(1).permutation(len(found))
    renamed = np.array([7, 3, 9, 1])[found]
    first, second = clustering_metrics(found, truth), clustering_metrics(renamed[order], truth[order])
    assert first == pytest.approx(second)
    perfect = clustering_metrics(np.unique(truth, return_inverse=True)[1], truth)
    assert {key: perfect[key] for key in ("nmi", "ari", "accuracy", "f1_macro")} == pytest.approx(
        {"nmi": 1, "ari": 1, "accuracy": 1, "f1_macro": 1}
    )


def test_partitions_without_information():
    one = np.array([[5]])
    assert normalised_mutual_information(one) == adjusted_rand_index(one) == 1
    split = np.array([[2], [3]])  # one type in two clusters
    assert normalised_mutual_information(split) == adjusted_rand_index(split) == 0


def test_errors():
    with pytest.raises(DataError, match="one cluster and one type"):
        clustering_metrics([0, 1], ["a"])
    with pytest.raises(DataError, match="one cluster and one type"):
        clustering_metrics([], [])

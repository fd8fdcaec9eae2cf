import math
from itertools import combinations, permutations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from unianom.errors import DataError
from unianom.metrics.clustering import clustering_metrics, contingency, match_clusters


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


def entropy(counts):
    return -math.fsum(count / sum(counts) * math.log(count / sum(counts)) for count in counts if count)


def normalised_mutual_information(found, truth):
    """Mutual information of two partitions over the mean of their entropies; 1 if both are constant."""
    table, _, _ = contingency(found, truth)
    entropies = entropy(table.sum(1)) + entropy(table.sum(0))
    return 2 * (entropies - entropy(table.ravel())) / entropies if entropies else 1.0


def adjusted_rand_index(found, truth):
    """(agreeing pairs − those by chance) / (mean of pairs together − those by chance), pair by pair."""
    pairs = list(combinations(range(len(found)), 2))
    together = [(found[a] == found[b], truth[a] == truth[b]) for a, b in pairs]
    both, one, other = (sum(flags) for flags in ([a and b for a, b in together], *map(list, zip(*together))))
    chance, mean = one * other / len(pairs), (one + other) / 2
    return (both - chance) / (mean - chance) if mean != chance else 1.0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("clusters", "types"), [(4, 4), (5, 3), (2, 5), (1, 4), (4, 1)])
def test_agreement_is_that_of_the_formulas(seed, clusters, types):
    found, truth = drawn(seed, clusters=clusters, types=types)
    metrics = clustering_metrics(found, truth)
    assert metrics["nmi"] == pytest.approx(normalised_mutual_information(found, truth), abs=1e-12)
    assert metrics["ari"] == pytest.approx(adjusted_rand_index(found, truth), abs=1e-12)
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
    one = clustering_metrics([0] * 5, ["a"] * 5)
    assert one["nmi"] == one["ari"] == 1
    split = clustering_metrics([0, 0, 1, 1, 1], ["a"] * 5)  # one type in two clusters
    assert split["nmi"] == split["ari"] == 0


def test_errors():
    with pytest.raises(DataError, match="one cluster and one type"):
        clustering_metrics([0, 1], ["a"])
    with pytest.raises(DataError, match="one cluster and one type"):
        clustering_metrics([], [])

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from unianom.errors import DataError, OptionError
from unianom.memory import coreset
from unianom.memory.coreset import farthest_points, greedy_coreset, random_projection


def _greedy_plain(features, initial, count):
    """The rule word by word: measure every row at every pick."""
    features = features.astype(np.float64)
    distance = np.asarray(initial, dtype=np.float64).copy()
    picks = []
    for _ in range(count):
        distance[picks] = -1
        picks.append(int(distance.argmax()))  # the lowest row number among equals
        distance = np.minimum(distance, np.sqrt(((features - features[picks[-1]]) ** 2).sum(axis=1)))
    return picks


def _features(kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        features = rng.standard_normal((150, 12))
    elif kind == "clusters":
        features = rng.standard_normal((6, 8))[rng.integers(6, size=150)] + 0.01 * rng.standard_normal((150, 8))
    elif kind == "grid":  # distances tie exactly, everywhere
        features = rng.integers(0, 3, (120, 3))
    elif kind == "duplicates":
        features = rng.standard_normal((20, 5))[rng.integers(20, size=130)]
    elif kind == "offset":  # squares a million times the distances: float32 products say nothing here
        features = 1000 + rng.standard_normal((120, 6)) * [1, 1, 1, 1, 1, 500]
    elif kind == "line":
        features = rng.standard_normal((100, 1))
    elif kind == "tiny":
        features = 1e-25 * rng.standard_normal((60, 4))
    else:
        features = np.full((40, 4), 0.3)
    return features.astype(np.float32)


KINDS = ["gaussian", "clusters", "grid", "duplicates", "offset", "line", "tiny", "constant"]


@pytest.fixture(params=["as published", "small"])
def block_sizes(request, monkeypatch):
    """Small blocks make a hundred rows take many rounds, as a million rows do with the published ones."""
    if request.param == "small":
        monkeypatch.setattr(coreset, "FRONT_ROWS", 12)
        monkeypatch.setattr(coreset, "BLOCK_ROWS", 7)
        monkeypatch.setattr(coreset, "BLOCK_PICKS", 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("block_sizes")
def test_picks_are_those_of_the_plain_rule(kind):
    for seed in range(5):
        features = _features(kind, seed)
        initial = cdist(features, features[[seed]].astype(np.float64))[:, 0]
        count = len(features) if seed == 0 else 45 if len(features) > 45 else 20
        result = farthest_points(features, initial, count)
        assert result.indices.tolist() == _greedy_plain(features, initial, count)
        radius = cdist(features, features[result.indices]).min(axis=1).max()
        assert result.radius == pytest.approx(radius, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("block_sizes")
def test_greedy_coreset_starts_from_mean_distances(kind):
    features = _features(kind, 11)
    starts = np.random.default_rng(3).choice(len(features), size=10, replace=False)
    mean = np.mean([np.sqrt(((features - features[s].astype(np.float64)) ** 2).sum(axis=1)) for s in starts], axis=0)
    assert greedy_coreset(features, 30, seed=3).indices.tolist() == _greedy_plain(features, mean, 30)


@pytest.mark.usefixtures("block_sizes")
def test_low_initial_distances_do_not_hide_the_radius():
    features = np.array([[0], [1], [2], [10]], dtype=np.float32)
    # Row 3 claims to be covered already, so row 0 is taken; the radius is measured to the rows really taken.
    result = farthest_points(features, np.array([5.0, 1.0, 2.0, 0.1]), 1)
    assert result.indices.tolist() == [0]
    assert result.radius == 10


def test_by_hand():
    line = np.array([[0], [1], [4], [9], [10]], dtype=np.float32)
    # Distances to row 0 first: the farthest is 10; then 4 (4 from 0, 6 from 10); then 1 and 9 tie, both 1 away.
    result = farthest_points(line, line[:, 0], 3)
    assert result.indices.tolist() == [4, 2, 1]
    assert result.radius == 1
    assert farthest_points(line, line[:, 0], 5).indices.tolist() == [4, 2, 1, 3, 0]


def test_start_rows_are_not_part_of_the_coreset():
    line = np.array([[0], [1], [2]], dtype=np.float32)
    for seed in range(10):
        start = np.random.default_rng(seed).choice(3, size=1, replace=False)[0]
        expected = {0: 2, 1: 0, 2: 0}[start]
        assert greedy_coreset(line, 1, seed, start_points=1).indices.tolist() == [expected]


def test_more_start_points_than_rows():
    line = np.array([[0], [1], [5]], dtype=np.float32)
    assert greedy_coreset(line, 1, seed=0, start_points=10).indices.tolist() == [2]


def test_whole_set():
    features = _features("duplicates", 0)
    result = greedy_coreset(features, len(features), seed=1)
    assert sorted(result.indices) == list(range(len(features)))
    assert result.radius == 0


def test_block_sizes_and_memory_order_do_not_matter(monkeypatch):
    features = np.random.default_rng(5).standard_normal((900, 16)).astype(np.float32)
    expected = greedy_coreset(features, 200, seed=0)
    assert np.array_equal(greedy_coreset(np.asfortranarray(features), 200, seed=0).indices, expected.indices)
    for front, rows, picks in [(50, 512, 256), (200, 33, 17), (10_000, 1, 1)]:
        monkeypatch.setattr(coreset, "FRONT_ROWS", front)
        monkeypatch.setattr(coreset, "BLOCK_ROWS", rows)
        monkeypatch.setattr(coreset, "BLOCK_PICKS", picks)
        result = greedy_coreset(features, 200, seed=0)
        assert np.array_equal(result.indices, expected.indices)
        assert result.radius == expected.radius


def test_distance_of_a_pair_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    for dim in (1, 3, 17, 128, 300):
        a, b = rng.standard_normal((2, 50, dim)).astype(np.float32)
        together = coreset.row_distances(a, b)
        alone = [coreset.row_distances(a[row : row + 1], b[row])[0] for row in range(50)]
        assert np.array_equal(together, alone)
        assert np.array_equal(together[7:30:3], coreset.row_distances(a[7:30:3], b[7:30:3]))


def test_most_distances_are_never_measured(monkeypatch):
    measured = 0
    measure = coreset._Traversal._measure

    def counting(self, rows, first, last):
        nonlocal measured
        measured += len(rows) * (last - first)
        measure(self, rows, first, last)

    monkeypatch.setattr(coreset._Traversal, "_measure", counting)
    monkeypatch.setattr(coreset, "FRONT_ROWS", 128)
    monkeypatch.setattr(coreset, "BLOCK_PICKS", 16)
    rng = np.random.default_rng(0)
    features = (
        rng.standard_normal((40, 4))[rng.integers(40, size=3000)] + 0.1 * rng.standard_normal((3000, 4))
    ).astype(np.float32)
    greedy_coreset(features, 400, seed=0)
    assert 0 < measured < 0.5 * 3000 * 400


def test_progress_grows_to_the_end():
    calls = []
    greedy_coreset(_features("gaussian", 0), 60, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (60, 60)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_seed_decides():
    features = _features("gaussian", 0)
    first, again, other = (greedy_coreset(features, 20, seed=seed, start_points=1).indices for seed in (0, 0, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_wrong_input_is_refused():
    features = _features("gaussian", 0)
    for count in (0, 151):
        with pytest.raises(OptionError, match="cannot be chosen"):
            greedy_coreset(features, count, seed=0)
    with pytest.raises(OptionError, match="start_points"):
        greedy_coreset(features, 5, seed=0, start_points=0)
    with pytest.raises(DataError, match="shape"):
        greedy_coreset(features[0], 1, seed=0)
    for value in (np.nan, np.inf, 1e20):
        damaged = features.copy()
        damaged[3, 4] = value
        with pytest.raises(DataError, match="NaN"):
            greedy_coreset(damaged, 5, seed=0)
    for initial in (np.ones(3), np.full(150, np.nan), np.full(150, -1.0)):
        with pytest.raises(DataError, match="initial"):
            farthest_points(features, initial, 5)


def test_random_projection_is_that_of_a_linear_layer():
    matrix = random_projection(300, 128, seed=0)
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 128, bias=False).weight.detach().numpy()
    assert matrix.shape == (300, 128)
    assert matrix.dtype == np.float32
    assert np.abs(matrix).max() == pytest.approx(np.abs(layer).max(), rel=1e-3)
    assert matrix.std() == pytest.approx(layer.std(), rel=0.01)
    assert np.array_equal(matrix, random_projection(300, 128, seed=0))
    assert not np.array_equal(matrix, random_projection(300, 128, seed=1))
    with pytest.raises(OptionError):
        random_projection(0, seed=0)

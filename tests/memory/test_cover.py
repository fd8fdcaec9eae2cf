import numpy as np
import pytest

from unianom.memory.coreset import greedy_coreset
from unianom.memory.cover import cover_without_images


def rows_of_images(images=7, each=40, dimension=6, seed=0):
    """Rows of images that overlap, but of one that lies apart."""
    rng = np.random.default_rng(seed)
    places = rng.normal(0, 0.5, (images, 1, dimension))
    places[3] += 8
    rows = (places + rng.normal(0, 1, (images, each, dimension))).reshape(-1, dimension).astype(np.float32)
    return rows, np.repeat(np.arange(images, dtype=np.int32), each)


def distances(some, others):
    return np.sqrt(((some[:, None].astype(np.float64) - others[None]) ** 2).sum(2))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_all_rows_of_other_images_are_covered_again(share):
    rows, images = rows_of_images()
    found = greedy_coreset(rows, int(share * len(rows)), 0)
    chosen = np.sort(found.indices)
    added = cover_without_images(rows, chosen, images, 7, found.radius)
    for image, more in enumerate(added):
        others, kept = np.flatnonzero(images != image), chosen[images[chosen] != image]
        most = len(chosen) - len(kept)
        # farthest-first over all of the others, measured in full
        expected, nearest = [], distances(rows[others], rows[kept]).min(1)
        while len(expected) < most and nearest.max() > found.radius + 1e-6:
            expected.append(others[nearest.argmax()])
            nearest = np.minimum(nearest, distances(rows[others], rows[expected[-1:]])[:, 0])
        assert more.tolist() == expected
        assert len(more) == most or nearest.max() <= found.radius + 1e-6
    assert sum(map(len, added)) > 0
    assert len(added[3]) == 0  # nothing of others is near it


def test_where_nothing_can_be_added():
    rows, images = rows_of_images()
    whole = cover_without_images(rows, np.arange(len(rows)), images, 7, 0.0)
    alone = cover_without_images(rows, np.arange(5), images, 7, 1.0)  # all of the first image
    assert [len(more) for more in whole + alone] == [0] * 14

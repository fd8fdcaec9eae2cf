"""Scores of a bank's images without their own vectors, against banks that are really built without them."""

import math
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch

from tests.methods.conftest import TINY
from unianom.errors import ModelError, OptionError
from unianom.memory.faiss_indexes import ivf_flat_index
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.memory.shard import Shard
from unianom.methods import METHODS
from unianom.methods.memory import MaskedPatches
from unianom.thresholds import fit_supported

IMAGES, D = 5, 24


def patches_of_images(cells: int) -> np.ndarray:
    """Patches of images that differ more between than within them, so that an image's own vectors are the nearest."""
    rng = np.random.default_rng(2)
    return (rng.normal(0, 2, (IMAGES, 1, D)) + rng.normal(0, 1, (IMAGES, cells, D))).astype(np.float32)


def method_of(name: str, **changes):
    return METHODS[name](replace(TINY[name].config, **changes))


def reduced(bank: MemoryBank, image: int, added: np.ndarray) -> MemoryBank:
    """A bank of the vectors of the other images and those added; of the same lists, where it has lists."""
    kept = bank.origins.rows != image
    vectors = np.concatenate([bank.vectors()[kept], added])
    if bank.kind == "flat":
        return MemoryBank.build(vectors)
    inverted = bank.shards[0].index
    lists = np.empty(bank.rows, np.int64)
    for number in range(inverted.nlist):
        size = inverted.invlists.list_size(number)
        ids = np.array([inverted.invlists.get_single_id(number, place) for place in range(size)], np.int64)
        lists[ids] = number
    centroids = faiss.downcast_index(inverted.quantizer).reconstruct_n(0, inverted.nlist)
    of_added = ((added[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
    index = ivf_flat_index(vectors, np.concatenate([lists[kept], of_added]), inverted.quantizer, inverted.nprobe)
    return MemoryBank([Shard(index, 0)], "ivf_flat")


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("patchcore", {"neighbours": 1, "reweight": True, "reweight_neighbours": 9}),
        ("patchcore", {"neighbours": 3, "reweight": True, "reweight_neighbours": 4}),
        ("patchcore", {"neighbours": 3, "reweight": False}),
        ("uniformaly", {"neighbours": 1, "k_ratio": 0.1}),
        ("uniformaly", {"neighbours": 3, "k_ratio": 0.4}),
    ],
)
def test_scores_are_those_of_a_bank_without_the_image(name, changes, kind, count):
    method = method_of(name, **changes)
    cells = method.grid[0] * method.grid[1]
    patches = patches_of_images(cells)
    rng = np.random.default_rng(4)
    keep = torch.from_numpy(rng.random((IMAGES, cells)) < (0.7 if name == "uniformaly" else 1.1))
    chosen = np.sort(rng.choice(IMAGES * cells, IMAGES * cells // 2, replace=False))
    origins = Origins(tuple("abcde"), (chosen // cells).astype(np.int32))
    how = {} if kind == "flat" else {"nlist": 4, "nprobe": 3}
    bank = MemoryBank.build(patches.reshape(-1, D)[chosen], 1, kind, origins=origins, **how)
    method.bank = bank
    added = patches[:, 3].mean(0) + rng.normal(0, 1, (count, D)).astype(np.float32)  # near to no image
    whole, left = [], []
    for image in range(IMAGES):
        embedding = MaskedPatches(torch.from_numpy(patches[image : image + 1]), keep[image : image + 1])
        score = method.score_without_image(embedding, image, added)
        assert method.bank is bank
        assert bank.rows == len(chosen)
        whole.append(float(method.postprocess(method.search_bank(embedding)).score))
        left.append(score)
        method.bank = reduced(bank, image, added)
        assert score == float(method.postprocess(method.search_bank(embedding)).score)
        method.bank = bank
    assert min(left) > max(whole)


def test_what_a_bank_cannot_do_is_said():
    method = method_of("patchcore", neighbours=3, reweight=False)
    patches = patches_of_images(method.grid[0] * method.grid[1])[:1]
    embedding = MaskedPatches(torch.from_numpy(patches), torch.ones(patches.shape[:2], dtype=torch.bool))
    with pytest.raises(ModelError, match="no memory bank yet"):
        method.score_without_image(embedding, 0)
    method.bank = bank = MemoryBank.build(
        patches[0, :8], origins=Origins(("a", "b"), np.array([0] * 6 + [1] * 2, np.int32))
    )
    with pytest.raises(OptionError, match="has only 2 vectors"):
        method.score_without_image(embedding, 0)
    assert method.bank is bank
    assert method.score_without_image(embedding, 1) > 0


@pytest.mark.parametrize("n", [14, 31])
def test_the_promise_of_leave_one_out_scores_holds(n):
    """Images of four patches, normal in eight dimensions; a score is the largest distance to the nearest vector.

    The true rate of false positives is that of 1,000 new images by the whole bank. The share of broken promises may
    exceed the 5 % that are allowed by what chance makes of 200 draws.
    """
    rng, draws, broken, rates = np.random.default_rng(0), 200, 0, []
    promised, rank = 0.2, {14: 14, 31: 29}[n]

    def scores(images, bank, own=False):
        distances = ((images**2).sum(-1).reshape(-1, 1) - 2 * images.reshape(-1, 8) @ bank.reshape(-1, 8).T) + (
            bank**2
        ).sum(-1).reshape(1, -1)
        nearest = distances.reshape(len(images), 4, len(bank), 4)
        if own:
            nearest[np.arange(n), :, np.arange(n)] = np.inf
        return nearest.min((2, 3)).max(1)

    for _ in range(draws):
        bank = rng.normal(size=(n, 4, 8))
        threshold = fit_supported(scores(bank, bank, own=True), source="leave_one_out")
        assert (threshold.rank, threshold.target_fpr) == (rank, promised)
        rates.append((scores(rng.normal(size=(1000, 4, 8)), bank) > threshold.value).mean())
        broken += rates[-1] > promised
    assert broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    assert np.mean(rates) <= 1 - rank / (n + 1) + 3 * np.std(rates) / math.sqrt(draws)

"""Image scores without maps: equal, to the bit, to those of predictions."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.methods.conftest import TINY, random_images
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.methods import METHODS, MaskedPatches, memory

CASES = [
    ("patchcore", {"neighbours": 1, "reweight": False}),
    ("patchcore", {"neighbours": 1, "reweight": True, "reweight_neighbours": 5}),
    ("patchcore", {"neighbours": 3, "reweight": True}),
    ("uniformaly", {"neighbours": 1, "k_ratio": 0.1}),
    ("uniformaly", {"neighbours": 2, "k_ratio": 0.3}),
    ("uniformaly", {"neighbours": 1, "k_ratio": 1.0}),
]


@pytest.fixture(autouse=True)
def _bounds_always_pay(monkeypatch):
    monkeypatch.setattr(memory, "LEAST_PRODUCTS", 0)


def _fitted(name, changes, shards=1, proposals=True):
    """A method with a bank of its own patches of 60 images, blurred by noise, and 6 images to score."""
    config = dataclasses.replace(TINY[name].config, **changes)
    method = METHODS[name](config).eval()
    with torch.inference_mode():
        embedding = method.embed(random_images(60, seed=1))
        patches = embedding.patches.flatten(0, 1).numpy()
    patches = np.tile(patches, (-(-2400 // len(patches)), 1))[:2400]
    noise = np.random.default_rng(0).standard_normal(patches.shape) * patches.std() / 4
    origins = Origins(tuple(f"{number}" for number in range(60)), np.arange(2400, dtype=np.int32) % 60)
    method.bank = MemoryBank.build((patches + noise).astype(np.float32), shards, origins=origins, proposals=proposals)
    return method, random_images(6, seed=2)


def _counted(method, monkeypatch):
    """Count the patches that are searched in full."""
    searched, search = [], method.bank.search

    def counting(queries, k=1):
        searched.append(len(queries))
        return search(queries, k)

    monkeypatch.setattr(method.bank, "search", counting)
    return searched


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("shards", [1, 3])
def test_scores_are_those_of_predictions(name, changes, shards):
    method, images = _fitted(name, changes, shards)
    expected = method.predict(images)
    for size in (1, 2, 6):
        for start in range(0, 6, size):
            part = slice(start, start + size)
            scored = method.score_images(images[part])
            alone = method.predict(images[part])
            assert torch.equal(scored.score, alone.score)
            assert torch.equal(scored.embedding, alone.embedding)
    whole = method.score_images(images)
    assert torch.equal(whole.score, expected.score)
    rows = torch.tensor([4, 1])
    for found, wanted in zip(whole.predict_rows(rows), expected, strict=True):
        assert torch.equal(found, wanted[rows])
    assert len(whole.predict_rows(torch.tensor([], dtype=torch.int64)).score) == 0


@pytest.mark.parametrize("proposals", [True, False])
def test_only_banks_with_proposals_are_searched_in_part(proposals, monkeypatch):
    method, images = _fitted("patchcore", {"neighbours": 1, "reweight": False}, proposals=proposals)
    searched = _counted(method, monkeypatch)
    cells = method.grid[0] * method.grid[1]
    scored = method.score_images(images)
    assert (sum(searched) < 6 * cells) is proposals
    searched.clear()
    scored.predict_rows(torch.tensor([3]))
    assert sum(searched) == (cells if proposals else 0)  # else its distances are there already


def test_a_large_share_is_searched_in_full(monkeypatch):
    method, images = _fitted("uniformaly", {"k_ratio": 0.9, "mask": "off"})
    searched = _counted(method, monkeypatch)
    method.score_images(images)
    assert searched == [6 * method.grid[0] * method.grid[1]]


def test_small_searches_are_done_in_full(monkeypatch):
    method, images = _fitted("patchcore", {"neighbours": 1, "reweight": False})
    products = method.embed(images).patches.numel() * method.bank.rows
    searched = _counted(method, monkeypatch)
    for least in (products, products + 1):
        monkeypatch.setattr(memory, "LEAST_PRODUCTS", least)
        searched.clear()
        method.score_images(images)
        assert (sum(searched) == 6 * method.grid[0] * method.grid[1]) is (least > products)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_scores_without_an_image_of_the_bank(name, changes):
    """With images of the bank itself, so that proposals would be its own vectors."""
    method, _ = _fitted(name, changes)
    bank, cells = method.bank, method.grid[0] * method.grid[1]
    added = bank.vectors()[:5] + np.float32(0.01)
    own = [bank.vectors()[bank.origins.rows == image] for image in (0, 7)]
    for image, vectors in zip((0, 7), own, strict=True):
        patches = torch.from_numpy(np.resize(vectors, (1, cells, bank.dimension)))
        embedding = MaskedPatches(patches, torch.ones(1, cells, dtype=torch.bool))
        for extra in (None, added):
            score = method.score_without_image(embedding, image, extra)
            method.bank = bank.without_image(image, extra)
            expected = method.postprocess(method.search_bank(embedding)).score
            method.bank = bank
            assert score == float(expected) > 0

"""Memory methods whose bank is searched on a device, the CPU standing for it, against the exact search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.methods.conftest import TINY, random_images, remade, tiny_method
from unianom.errors import OptionError
from unianom.execution import Execution
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.methods import MemoryMethod
from unianom.model import Model, load

MEMORY_METHODS = ["patchcore", "uniformaly"]
TOLERANCE = 1e-5
ON_DEVICE = Execution(search="device")


def with_neighbours(name: str, neighbours: int) -> MemoryMethod:
    method = tiny_method(name)
    return remade(method, replace(method.config, neighbours=neighbours))


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("name", MEMORY_METHODS)
def test_predictions_are_those_of_the_exact_search(name, neighbours):
    method, images = with_neighbours(name, neighbours), random_images(5)
    exact = method.predict(images)
    method.execution = ON_DEVICE
    assert method.bank_on_device() is not None
    found = method.predict(images)
    torch.testing.assert_close(found.score, exact.score, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found.anomaly_map, exact.anomaly_map, rtol=TOLERANCE, atol=1e-6)
    scored = method.score_images(images)
    assert torch.equal(scored.score, found.score)
    alone = torch.cat([method.predict(image[None]).score for image in images])
    torch.testing.assert_close(alone, found.score, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", MEMORY_METHODS)
def test_shards_of_a_bank_change_nothing_on_a_device(name):
    method, images = tiny_method(name), random_images(3)
    method.execution = ON_DEVICE
    expected = method.predict(images).score
    method.bank = MemoryBank.build(method.bank.vectors(), shards=3)
    assert torch.equal(method.predict(images).score, expected)


@pytest.mark.parametrize("name", MEMORY_METHODS)
def test_images_of_the_bank_score_zero(name):
    method, images = tiny_method(name), random_images(3)
    with torch.inference_mode():
        embedding = method.embed(images)
    method.bank = MemoryBank.build(embedding.patches[embedding.keep].numpy())
    method.execution = ON_DEVICE
    assert method.predict(images).score.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", MEMORY_METHODS)
def test_half_precision_of_the_encoder_is_that_of_the_products(name):
    method = tiny_method(name)
    config = replace(method.config, backbone=replace(method.config.backbone, precision="bf16"))
    half, images = remade(method, config), random_images(4)
    exact = half.predict(images).score
    half.execution = ON_DEVICE
    assert half.bank_on_device().products == "bf16"
    torch.testing.assert_close(half.predict(images).score, exact, rtol=TOLERANCE, atol=0)


def test_the_bank_on_the_device_follows_the_method():
    method = tiny_method("patchcore")
    method.execution = ON_DEVICE
    first = method.bank_on_device()
    assert method.bank_on_device() is first
    method.bank = MemoryBank.build(method.bank.vectors()[:20])
    assert method.bank_on_device().rows == 20
    method.execution = Execution(search="exact")
    assert method.bank_on_device() is None
    assert method.state_dict().keys() == tiny_method("patchcore").state_dict().keys()


def test_auto_is_exact_on_the_cpu_and_with_inverted_lists():
    method = tiny_method("patchcore")
    assert method.execution.search == "auto"
    assert method.bank_on_device() is None
    method.bank = MemoryBank.build(method.bank.vectors(), kind="ivf_flat")
    method.execution = ON_DEVICE
    with pytest.raises(OptionError, match=r"of kind 'ivf_flat'.*search=exact.*bank\.index=flat"):
        method.predict(random_images(1))


def test_leaving_an_image_out_searches_exactly():
    method = tiny_method("uniformaly")
    with torch.inference_mode():
        embedding = method.embed(random_images(1))
    origins = Origins(("a", "b", "c", "d"), np.arange(method.bank.rows) % 4)
    method.bank = MemoryBank.build(method.bank.vectors(), origins=origins)
    expected = method.score_without_image(embedding, 1)
    method.execution = ON_DEVICE
    assert method.score_without_image(embedding, 1) == expected


def test_a_model_is_loaded_with_its_search(tmp_path):
    Model(tiny_method("uniformaly")).save(tmp_path)
    assert load(tmp_path).method.bank_on_device() is None
    images = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in range(3)]
    exact = [result.score for result in load(tmp_path).predict(images)]
    model = load(tmp_path, search="device")
    assert model.method.bank_on_device() is not None
    np.testing.assert_allclose([result.score for result in model.predict(images)], exact, rtol=TOLERANCE)


@pytest.mark.parametrize("name", MEMORY_METHODS)
def test_every_reading_is_that_of_the_exact_search(name):
    method, images = tiny_method(name), random_images(3)
    with torch.inference_mode():
        embedding = method.embed(images)
        for changes in TINY[name].reading:
            config = replace(method.config, **changes)
            method.execution = Execution(search="exact")
            exact = method.postprocess(method.search_bank(embedding, 5), config).score
            method.execution = ON_DEVICE
            found = method.postprocess(method.search_bank(embedding, 5), config).score
            torch.testing.assert_close(found, exact, rtol=TOLERANCE, atol=0)

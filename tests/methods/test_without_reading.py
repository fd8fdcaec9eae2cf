"""Predictions that never read a value from the device, as on GPUs, on tensors of the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.methods.conftest import TINY, fit, random_images
from unianom import host
from unianom.errors import DataError, OptionError
from unianom.execution import Execution
from unianom.memory.masking import back_patch_mask, soft_mask
from unianom.methods import METHODS
from unianom.model import Model


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(host, "reads_at_once", lambda tensor: False)


def on_device(name: str, **changes):
    method = fit(METHODS[name](replace(TINY[name].config, **changes)))
    method.execution = Execution(search="device")
    return method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_image_that_is_not_finite_has_no_finite_score(name, monkeypatch):
    method, images = on_device(name), random_images(4)
    expected = method.predict(images)
    monkeypatch.setattr(host, "reads_at_once", lambda tensor: False)
    torch.testing.assert_close(method.predict(images), expected)
    for image, value in ((0, torch.nan), (1, torch.inf), (3, -torch.inf)):
        images[image, 2, 40, 7] = value
    score = method.score_images(images).score
    assert torch.isfinite(score).tolist() == [False, False, True, False]
    torch.testing.assert_close(score[2], expected.score[2])


def test_it_is_said_where_scores_are_fetched(unread, monkeypatch):
    model = Model(on_device("uniformaly"))
    monkeypatch.setattr("unianom.model.normalise", lambda batch, policy: torch.full((len(batch), 3, 64, 64), torch.nan))
    with pytest.raises(OptionError, match="uniformaly got images with NaN or infinite values"):
        model.predict([torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 0.0])
def test_attention_that_tells_nothing_is_told_by_the_mask(value, unread):
    attention = torch.rand(3, 8, 8)
    expected = soft_mask(attention)
    attention[1, 3:5] = value
    if value == 0:
        attention[1] = 0
    soft = soft_mask(attention)
    assert soft[1].isnan().all()
    assert torch.equal(soft[[0, 2]], expected[[0, 2]])
    assert back_patch_mask(attention)[1].all()


@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_attention_that_tells_nothing_leaves_no_score(mask, monkeypatch):
    method, images = on_device("uniformaly", mask=mask), random_images(3)
    expected = method.predict(images).score
    encode = type(method).encode

    def broken(self, images):
        encoded = encode(self, images)
        encoded.attention[1] = 0
        return encoded

    monkeypatch.setattr(type(method), "encode", broken)
    with pytest.raises(DataError, match="zero everywhere"):
        method.predict(images)
    monkeypatch.setattr(host, "reads_at_once", lambda tensor: False)
    score = method.predict(images).score
    assert torch.isfinite(score).tolist() == [True, False, True]
    assert torch.equal(score[[0, 2]], expected[[0, 2]])

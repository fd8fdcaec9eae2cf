"""What runs on GPUs, on fake CUDA tensors: it keeps to the device, and the host never waits for it."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import numpy as np
import pytest
import torch

from pipelines.data.patch_matrix import KeptPatches
from pipelines.inference.range_scorer import predict_batch
from pipelines.training.calibration_images import NormalEmbeddings
from pipelines.training.prepared import FrozenFeatures
from pipelines.training.threshold import ImageScores
from pipelines.tuning.calibration_trials import MapsAndEmbeddings
from pipelines.tuning.encodings import EncodedPatches
from tests.fake_device import DEVICE, HostWaits, fake_device, without_waits
from tests.methods.conftest import TINY, fit, random_images, tiny_method
from unianom.calibration import Calibrator
from unianom.configs.calibration import CalibrationConfig
from unianom.execution import Execution
from unianom.memory.device_search import DeviceBank
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.trained import TrainedMethod
from unianom.model import Model

BATCH = 3

FORMS = [(name, {}) for name in sorted(METHODS)] + [
    ("patchcore", {"reweight": False, "neighbours": 3}),
    ("uniformaly", {"mask": "soft"}),
    ("onenip", {"prompt": "none"}),
    ("uninet", {"task": "segmentation"}),
]


def ready(name: str, changes: dict) -> Method:
    """A fitted method that has predicted before, as after the first batch."""
    method = fit(METHODS[name](dataclasses.replace(TINY[name].config, **changes)))
    if name == "onenip":  # which reads once whether it was finished
        method.predict(random_images(1))
    return method


@pytest.mark.parametrize(("name", "changes"), FORMS, ids=str)
def test_methods_never_wait(name, changes, monkeypatch):
    method = ready(name, changes)
    with fake_device(monkeypatch) as move:
        move(method)
        images = move(random_images(BATCH))
        if isinstance(method, MemoryMethod):
            assert method.bank_on_device().device == DEVICE  # moved there once
            scored = without_waits(lambda: method.score_images(images))
            assert scored.score.device == DEVICE
            assert scored.score.shape == (BATCH,)
            prediction = without_waits(lambda: scored.predict_rows(move(torch.arange(BATCH))))
        else:
            prediction = without_waits(lambda: method.predict(images))
        assert all(part.device == DEVICE for part in prediction)
        assert prediction.score.shape == (BATCH,)
        if isinstance(method, TrainedMethod) and not changes:
            batch = TINY[name].training_batch(method.train())
            batch = batch.map(move)
            losses = without_waits(lambda: method.training_loss(batch))
            assert all(loss.device == DEVICE for loss in losses.values())


CACHED = [
    ("patchcore", KeptPatches("m", for_bank=True)),
    ("uniformaly", KeptPatches("m", for_bank=True)),
    ("uniformaly", KeptPatches("m", for_bank=False)),
    ("uniformaly", EncodedPatches("m")),
    ("uniad", FrozenFeatures("m", half=True)),
    ("uniad", NormalEmbeddings("m", ("a",), half=True)),
    ("patchcore", ImageScores("m")),
    ("uniad", MapsAndEmbeddings("m")),
]


@pytest.mark.parametrize(("name", "extractor"), CACHED, ids=str)
def test_the_networks_of_caches_never_wait(name, extractor, monkeypatch):
    method = ready(name, {})
    with fake_device(monkeypatch) as move:
        move(method)
        if isinstance(method, MemoryMethod):
            method.bank_on_device()
        function = extractor.open(lambda folder: method)
        assert function.device == DEVICE
        images = move(random_images(BATCH))
        found = without_waits(lambda: function.network(images))
        assert all(values.device == DEVICE and len(values) == BATCH for values in found.values())


VARIANTS = (None, "none", "labels", "classifier", "cada")


@pytest.mark.parametrize("maps", ["all", "none"])
def test_the_predict_stage_never_waits(maps, monkeypatch):
    method = ready("patchcore", {})
    embedding, categories = method.predict(random_images(1)).embedding, ["a", "b", "a"]
    shape = embedding.shape[1], tuple(embedding.shape[2:])
    calibrators = [v and Calibrator(CalibrationConfig(variant=v), ["a", "b"], *shape).eval() for v in VARIANTS]
    with fake_device(monkeypatch) as move:
        move(method)
        method.bank_on_device()
        images = move(random_images(BATCH))
        for calibrator in calibrators:
            model = Model(method, ["a", "b"], calibrator=calibrator and move(calibrator))
            scored, calibration, kept = without_waits(partial(predict_batch, model, images, categories, maps))
            assert scored.score.device == DEVICE
            assert (kept is None) == (maps == "none")
            assert (calibration is None) == (calibrator is None)
            assert calibration is None or all(part.device == DEVICE for part in calibration)


@pytest.mark.parametrize("variant", ["classifier", "cada"])
def test_losses_of_calibrators_never_wait(variant, monkeypatch):
    calibrator = Calibrator(CalibrationConfig(variant=variant), ["a", "b"], 6, (8, 8))
    transitions = calibrator.loss_transitions()
    with fake_device(monkeypatch) as move:
        move(calibrator)
        features, targets, category = move(torch.rand(4, 6, 8, 8)), move(torch.rand(4, 2)), move(torch.arange(4) % 2)
        loss = without_waits(lambda: calibrator.loss(features, targets, category, transitions))
        assert loss.device == DEVICE


@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 9])
def test_the_search_never_waits(products, k, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(70_001, 16)).astype(np.float32)
    with fake_device(monkeypatch) as move:
        bank = DeviceBank(vectors, DEVICE, products)
        queries = move(torch.rand(5000, 16))
        distances, rows = without_waits(lambda: bank.search(queries, k))
        assert distances.device == rows.device == DEVICE
        assert distances.shape == rows.shape == (5000, k)
        assert without_waits(lambda: bank.rows_at(rows)).shape == (5000, k, 16)


# --------------------------------------------------------------------------------------- the check finds what it must
READS = {
    "bool": lambda x: bool(x.sum() > 0),
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "chosen": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "made on the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "index": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("read", READS)
def test_every_read_is_found(read, monkeypatch):
    with fake_device(monkeypatch) as move:
        values = move(torch.rand(3))
        with pytest.raises(HostWaits):
            without_waits(lambda: READS[read](values))


def test_the_line_that_waits_is_named(monkeypatch):
    method, before = tiny_method("uniad"), Method.check_images
    monkeypatch.setattr(Method, "check_images", lambda self, images: (before(self, images), self.check_finite(images)))
    with fake_device(monkeypatch) as move:
        move(method)
        images = move(random_images(1))
        with pytest.raises(HostWaits, match=re.escape("unianom/methods/base.py:") + r"\d+, if not torch.isfinite"):
            without_waits(lambda: method.predict(images))


def test_a_tensor_on_the_wrong_device_fails(monkeypatch):
    with fake_device(monkeypatch) as move:
        values = move(torch.rand(3))
        with pytest.raises(RuntimeError, match="same device"):
            without_waits(lambda: values + torch.ones(3))


def test_an_exact_search_waits(monkeypatch):
    method = ready("patchcore", {})
    method.execution = Execution(search="exact")
    with fake_device(monkeypatch) as move:
        move(method)
        images = move(random_images(1))
        with pytest.raises(HostWaits, match=r"unianom/methods/memory\.py"):
            without_waits(lambda: method.predict(images))

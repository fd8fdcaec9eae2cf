"""Encoders computed by OpenVINO against PyTorch: equal features, whatever shares a batch; refused where not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unianom
from tests.methods.conftest import TINY, fit
from unianom import encoder_engine
from unianom.backbones import Backbone, CnnBackbone, VitBackbone
from unianom.configs.backbone import BackboneConfig
from unianom.encoder_engine import (
    LARGEST_DIFFERENCE,
    CompiledEncoder,
    compile_encoders,
    drawn_images,
    largest_difference,
)
from unianom.errors import EngineError, OptionError
from unianom.execution import CPU, Execution, precision_of
from unianom.methods import METHODS
from unianom.model import Model

pytest.importorskip("openvino")

SIDE = 64
SMALL_VIT = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}


def cnn(name: str = "resnet10t", **config: object) -> CnnBackbone:
    return CnnBackbone(BackboneConfig(name, weights="random", **config), (4, 8, 16))  # type: ignore[arg-type]


def vit(**taps: object) -> VitBackbone:
    config = BackboneConfig("vit_tiny_patch16_224", weights="random", options=SMALL_VIT)
    return VitBackbone(config, SIDE, (0, 2), **taps)  # type: ignore[arg-type]


BACKBONES = {
    "cnn": cnn,
    "cnn, channels last": lambda: cnn(channels_last=True),
    "cnn, same padding": lambda: cnn("tf_efficientnet_lite0"),
    "cnn, NHWC": lambda: CnnBackbone(
        BackboneConfig("swin_tiny_patch4_window7_224", weights="random", options={"img_size": SIDE}), (4, 8)
    ),
    "vit": vit,
    "vit, attention": lambda: vit(attention_block=-1),
    "vit, rollout": lambda: vit(attention_block=2, rollout=True),
}


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BACKBONES)
@torch.inference_mode()
def test_features_are_those_of_pytorch(kind):
    backbone = BACKBONES[kind]()
    wanted = backbone(images())
    backbone.compiled = CompiledEncoder(backbone, SIDE, "openvino", 1)
    found = backbone(images())
    assert type(found) is type(wanted)
    if isinstance(backbone, VitBackbone):
        assert (found.attention is None) == (wanted.attention is None)
        found, wanted = ([*f.tokens, *([] if f.attention is None else [f.attention])] for f in (found, wanted))
    assert [f.shape for f in found] == [w.shape for w in wanted]
    assert all(f.dtype == torch.float32 for f in found)
    assert largest_difference(found, wanted)[0] <= 1e-5


@pytest.mark.parametrize("kind", ["cnn, same padding", "vit, attention"])
def test_bits_depend_neither_on_the_batch_nor_on_threads(kind):
    backbone = BACKBONES[kind]()
    one, two = (CompiledEncoder(backbone, SIDE, "openvino", threads) for threads in (1, 2))
    batch = images(8)
    whole = one(batch)
    order = [5, 0, 7]
    for encoder in (one, two):
        for found in (encoder(batch[order]), encoder(batch[order])):
            assert all(torch.equal(f, w[order]) for f, w in zip(found, whole, strict=True))
    assert not torch.equal(whole[0][0], whole[0][1])


def test_results_stay_when_the_next_batch_is_computed():
    encoder = CompiledEncoder(cnn(), SIDE, "openvino", 1)
    found = encoder(images())
    before = [value.clone() for value in found]
    encoder(images(seed=1))
    assert all(torch.equal(f, b) for f, b in zip(found, before, strict=True))


@torch.inference_mode()
def test_weights_that_change_later_do_not_reach_what_was_compiled():
    for backbone in (cnn(), vit()):
        encoder = CompiledEncoder(backbone, SIDE, "openvino", 1)
        before = encoder(images())
        for weight in backbone.state_dict().values():
            weight.zero_()
        assert all(torch.equal(f, b) for f, b in zip(encoder(images()), before, strict=True))


def test_bfloat16_stays_within_its_own_bound():
    backbone = cnn()
    try:
        encoder = CompiledEncoder(backbone, SIDE, "openvino_bf16", 1)
    except EngineError as error:
        if "this CPU computes in" not in str(error):
            raise
        pytest.skip(str(error))
    difference, _ = largest_difference(encoder(images()), backbone.tensors(images()))
    assert 1e-5 < difference <= LARGEST_DIFFERENCE["openvino_bf16"]


def test_the_largest_difference_is_relative_to_the_largest_feature_of_its_tap():
    wanted = [torch.tensor([1.0, -4.0]), torch.tensor([10.0, 0.0])]
    found = [torch.tensor([1.0, -3.0]), torch.tensor([10.0, 1.0])]
    assert largest_difference(found, wanted) == (0.25, 0)
    assert largest_difference([found[0], torch.full((2,), torch.nan)], wanted) == (float("inf"), 1)


# ------------------------------------------------------------------------------------------------------------- methods
def patchcore():
    return fit(METHODS["patchcore"](TINY["patchcore"].config))


def test_a_graph_that_computes_otherwise_is_refused(monkeypatch):
    method, convert = patchcore(), encoder_engine._convert

    def tampered(openvino: object, backbone: Backbone, side: int) -> object:
        weight = next(p for p in backbone.parameters() if p.ndim == 4)
        kept = weight.clone()
        weight.mul_(1 + 1e-3)
        try:
            return convert(openvino, backbone, side)
        finally:
            weight.copy_(kept)

    monkeypatch.setattr(encoder_engine, "_convert", tampered)
    with pytest.raises(EngineError, match=r"on 2 images features of .* \(tap \d\) differ from PyTorch's by \d.* 1e-05"):
        compile_encoders(method, "openvino")
    assert method.encoder.compiled is None


@pytest.mark.parametrize("name", ["patchcore", "uniformaly", "recontrast"])
def test_only_frozen_encoders_are_taken_over(name, tmp_path):
    method = fit(METHODS[name](TINY[name].config))
    Model(method, ["a"]).save(tmp_path)
    plain, own = unianom.load(tmp_path).method, unianom.load(tmp_path, engine="openvino").method
    assert own.execution == Execution("cpu", "openvino")
    assert plain.execution == CPU
    for part in own.modules():
        if isinstance(part, Backbone):
            assert (part.compiled is None) == part.trainable
    batch = drawn_images(own.input)
    wanted, found = plain.predict(batch), own.predict(batch)
    torch.testing.assert_close(found.score, wanted.score, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.anomaly_map, wanted.anomaly_map, rtol=1e-3, atol=1e-3 * float(wanted.score.max()))
    assert own.state_dict().keys() == plain.state_dict().keys()


def test_methods_with_one_encoder_share_what_is_compiled():
    one, two = patchcore(), patchcore()
    compile_encoders(one, "openvino")
    compile_encoders(two, "openvino")
    assert one.encoder.compiled is two.encoder.compiled
    with torch.no_grad():
        next(two.encoder.parameters()).mul_(2)
    compile_encoders(two, "openvino")
    assert one.encoder.compiled is not two.encoder.compiled
    compile_encoders(two, "pytorch")
    assert two.encoder.compiled is None


def test_half_precision_and_trained_encoders_are_refused():
    config = TINY["patchcore"].config
    half = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, precision="bf16"))
    with pytest.raises(EngineError, match=r"backbone.precision=bf16 is computed by PyTorch"):
        compile_encoders(METHODS["patchcore"](half), "openvino")
    method = patchcore()
    method.encoder.trainable = True
    with pytest.raises(EngineError, match="patchcore has no frozen encoder"):
        compile_encoders(method, "openvino")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        EngineError, match=r"OpenVINO is not installed; run in unianom's checkout: pip install '\.\[cpu\]'"
    ):
        CompiledEncoder(cnn(), SIDE, "openvino", 1)


def test_engines_and_searches_are_checked():
    assert Execution().plan == {"device": "cpu"}
    assert Execution("cpu", "openvino").plan == {"device": "cpu", "engine": "openvino"}
    assert [precision_of(engine) for engine in LARGEST_DIFFERENCE] == ["float32", "bfloat16"]
    with pytest.raises(OptionError, match=r"engine=onnx: take one of pytorch, openvino"):
        Execution(engine="onnx")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"search=fast: take one of auto, exact, device"):
        Execution(search="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"engine=openvino runs on CPUs; take device=cpu instead of cuda"):
        Execution("cuda", "openvino")


QUIET = """
import socket, sys
def refuse(*_): raise AssertionError("something is sent")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from unianom.backbones import CnnBackbone
from unianom.configs.backbone import BackboneConfig
from unianom.encoder_engine import CompiledEncoder
CompiledEncoder(CnnBackbone(BackboneConfig("resnet10t", weights="random"), (4, 8)), 64, "openvino", 1)(
    torch.zeros(1, 3, 64, 64)
)
assert sys.modules["openvino_telemetry"] is None
"""


def test_nothing_is_sent_or_written(tmp_path):
    root = str(Path(__file__).parents[1])
    environment = {"HOME": str(tmp_path), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


SIGNALLED = """
import gc, os, signal
from unianom.backbones import CnnBackbone
from unianom.configs.backbone import BackboneConfig
from unianom.encoder_engine import CompiledEncoder
received = []
signal.signal(signal.SIGINT, lambda *_: received.append("Ctrl-C"))
backbone = CnnBackbone(BackboneConfig("resnet10t", weights="random"), (4,))
first, second = (CompiledEncoder(backbone, 64, "openvino", 1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGINT)
print(received)
"""


def test_a_signal_is_received_after_encoders_are_gone():
    """On CPUs with AMX OpenVINO sets a stack for signals; one that was freed ended the process."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SIGNALLED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['Ctrl-C']\n"), done.stderr

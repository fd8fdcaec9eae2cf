"""What the student–teacher methods share, against published sizes and plain second implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, gelu, relu

from tests.methods.conftest import random_images
from unianom.backbones import CnnBackbone
from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig, check_side
from unianom.errors import OptionError, WeightsError
from unianom.methods.layers.distillation import (
    TAPS,
    OneClassBottleneck,
    ResidualBlock,
    ResidualPlan,
    ReverseDecoder,
    TeacherPair,
    distance_map,
    flattened_distance,
    fuse_and_blur,
    residual_plan,
)
from unianom.methods.layers.postprocess import upsample_levels

WIDE = BackboneConfig("wide_resnet50_2.tv_in1k", weights="random")
SMALL = ResidualPlan(bottleneck=True, channels=(8, 12, 16, 20), widths=(4, 6, 10, 14), depths=(1, 2, 3, 2), groups=2)
BASIC = ResidualPlan(bottleneck=False, channels=(8, 12, 16, 20), widths=(8, 12, 16, 20), depths=(1, 2, 1, 2), groups=1)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shake(module: nn.Module) -> nn.Module:
    """Random weights and statistics of batch norm, too, so that no part of it is without effect; evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low in (
                (part.weight, 0.5),
                (part.bias, -0.5),
                (part.running_mean, -0.5),
                (part.running_var, 0.5),
            ):
                tensor.data = low + torch.rand(tensor.shape, generator=generator)
    return module.eval()


# --------------------------------------------------------------------------------------------- the published network
@pytest.fixture(scope="module")
def wide() -> ResidualPlan:
    return residual_plan(WIDE)


def test_plan_of_the_published_encoder(wide):
    assert wide == ResidualPlan(True, (256, 512, 1024, 2048), (128, 256, 512, 1024), (3, 4, 6, 3), 1)


def test_published_sizes(wide):
    """METHODS section 16; 67,277,824 with a convolution and a batch norm of 8,392,704 that are never used."""
    with torch.device("meta"):
        assert count(ReverseDecoder(wide)) == 24_917_504
        bottleneck = OneClassBottleneck(wide)
        encoder = timm.create_model(WIDE.name, features_only=True, out_indices=(1, 2, 3))
    assert count(bottleneck) == 58_885_120 == 67_277_824 - 8_392_704
    assert count(bottleneck.fusion) == 256 * 512 * 9 + 2 * 512 * 1024 * 9 + 2 * (512 + 1024 + 1024)
    assert count(encoder) == 24_862_528


def test_published_shapes(wide):
    with torch.device("meta"):
        levels = [torch.zeros(2, 256, 64, 64), torch.zeros(2, 512, 32, 32), torch.zeros(2, 1024, 16, 16)]
        bottleneck, decoder = OneClassBottleneck(wide), ReverseDecoder(wide)
        assert bottleneck.fusion(levels).shape == (2, 3072, 16, 16)
        embedding = bottleneck(levels)
        assert embedding.shape == (2, 2048, 8, 8)
        assert [level.shape for level in decoder(embedding)] == [level.shape for level in levels]
    # three, four and six blocks, from coarse to fine
    assert [len(stage) for stage in decoder.stages] == [3, 4, 6]


def test_published_start():
    """Kaiming-normal over what goes out of convolutions, batch norm at one and zero, PyTorch's own transposed ones."""
    torch.manual_seed(0)
    plan = residual_plan(BackboneConfig("resnet50", weights="random"))
    decoder = ReverseDecoder(plan)
    block = decoder.stages[1][0]
    for convolution in (block.layers[0], block.layers[6], decoder.stages[1][1].layers[3]):
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
        assert convolution.bias is None
    grown = block.layers[3]
    assert isinstance(grown, nn.ConvTranspose2d)
    assert grown.weight.abs().max() <= 1 / math.sqrt(grown.out_channels * 4)
    assert all((n.weight == 1).all() and not n.bias.any() for n in decoder.modules() if isinstance(n, nn.BatchNorm2d))


# -------------------------------------------------------------------------------------- a plain second implementation
def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm in evaluation mode, written out."""
    shape = (1, -1, 1, 1)
    deviation = (norm.running_var + norm.eps).sqrt().view(shape)
    return (x - norm.running_mean.view(shape)) / deviation * norm.weight.view(shape) + norm.bias.view(shape)


def plain_block(x: Tensor, block: ResidualBlock, plan: ResidualPlan, scale: str, act=relu) -> Tensor:
    def resize(y: Tensor, weight: Tensor, groups: int) -> Tensor:
        if scale == "double":
            return conv_transpose2d(y, weight, stride=2, groups=groups)
        return conv2d(y, weight, stride=2 if scale == "half" else 1, padding=1, groups=groups)

    parts = list(block.layers)
    convolutions = [part.weight for part in parts if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    if plan.bottleneck:
        y = act(normed(conv2d(x, convolutions[0]), norms[0]))
        y = act(normed(resize(y, convolutions[1], plan.groups), norms[1]))
        y = normed(conv2d(y, convolutions[2]), norms[2])
    else:
        y = act(normed(resize(x, convolutions[0], 1), norms[0]))
        y = normed(conv2d(y, convolutions[1], padding=1), norms[1])
    if isinstance(block.shortcut, nn.Sequential):
        weight, norm = block.shortcut[0].weight, block.shortcut[1]
        if scale == "double":
            x = normed(conv_transpose2d(x, weight, stride=2), norm)
        else:
            x = normed(conv2d(x, weight, stride=2 if scale == "half" else 1), norm)
    return act(y + x)


@pytest.mark.parametrize("plan", [SMALL, BASIC], ids=["bottleneck", "basic"])
@pytest.mark.parametrize(
    ("scale", "inputs", "shortcut", "side"),
    [("keep", 16, False, 6), ("keep", 12, True, 6), ("half", 16, True, 3), ("double", 12, True, 12)],
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_block_is_that_of_the_second_implementation(plan, scale, inputs, shortcut, side, activation):
    torch.manual_seed(0)
    block = shake(ResidualBlock(plan, inputs, 10, 16, scale, activation))
    assert isinstance(block.shortcut, nn.Sequential) == shortcut
    x = torch.randn(2, inputs, 6, 6)
    with torch.no_grad():
        found = block(x)
        assert found.shape == (2, 16, side, side)
        act = relu if activation is nn.ReLU else gelu
        torch.testing.assert_close(found, plain_block(x, block, plan, scale, act), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [SMALL, BASIC], ids=["bottleneck", "basic"])
def test_bottleneck_is_that_of_the_second_implementation(plan):
    torch.manual_seed(0)
    bottleneck = shake(OneClassBottleneck(plan))
    fine, middle, coarse = torch.randn(2, 8, 16, 16), torch.randn(2, 12, 8, 8), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        first, second = bottleneck.fusion.fine, bottleneck.fusion.middle
        halved = relu(normed(conv2d(fine, first[0].weight, stride=2, padding=1), first[1]))
        halved = relu(normed(conv2d(halved, first[3].weight, stride=2, padding=1), first[4]))
        other = relu(normed(conv2d(middle, second[0].weight, stride=2, padding=1), second[1]))
        x = torch.cat([halved, other, coarse], dim=1)
        assert x.shape == (2, 48, 4, 4)
        for block, scale in zip(bottleneck.stage, ("half", "keep"), strict=True):
            x = plain_block(x, block, plan, scale)
        assert x.shape == (2, 20, 2, 2)
        torch.testing.assert_close(bottleneck([fine, middle, coarse]), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [SMALL, BASIC], ids=["bottleneck", "basic"])
@pytest.mark.parametrize("skips", [False, True])
def test_decoder_is_that_of_the_second_implementation(plan, skips):
    torch.manual_seed(0)
    decoder = shake(ReverseDecoder(plan))
    x = torch.randn(2, 20, 2, 2)
    added = [torch.randn(2, 16, 4, 4), torch.randn(2, 12, 8, 8)] if skips else []
    with torch.no_grad():
        found = decoder(x, added)
        expected = []
        for number, (stage, depth) in enumerate(zip(decoder.stages, plan.depths)):
            if skips and number:
                x = x + added[number - 1]
            assert len(stage) == depth
            for place, block in enumerate(stage):
                x = plain_block(x, block, plan, "keep" if place else "double")
            expected.insert(0, x)
    assert [tuple(level.shape[1:]) for level in found] == [(8, 16, 16), (12, 8, 8), (16, 4, 4)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gelu_takes_the_place_of_every_relu():
    for module in (OneClassBottleneck(SMALL, "gelu"), ReverseDecoder(SMALL, "gelu")):
        assert not any(isinstance(part, nn.ReLU) for part in module.modules())
        assert any(isinstance(part, nn.GELU) for part in module.modules())


# ------------------------------------------------------------------------------------------------------ other encoders
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("resnet18", ResidualPlan(False, (64, 128, 256, 512), (64, 128, 256, 512), (2, 2, 2, 2), 1)),
        ("resnet50", ResidualPlan(True, (256, 512, 1024, 2048), (64, 128, 256, 512), (3, 4, 6, 3), 1)),
        ("resnext50_32x4d", ResidualPlan(True, (256, 512, 1024, 2048), (128, 256, 512, 1024), (3, 4, 6, 3), 32)),
    ],
)
def test_other_residual_networks_are_mirrored(name, plan):
    """What the encoder would have as its fourth stage, the bottleneck has with three times the input."""
    config = BackboneConfig(name, weights="random")
    assert residual_plan(config) == plan
    with torch.device("meta"):
        network = timm.create_model(name)
        bottleneck, decoder = OneClassBottleneck(plan), ReverseDecoder(plan)
        side = 64
        levels = network.forward_intermediates(
            torch.zeros(1, 3, side, side), indices=(1, 2, 3), intermediates_only=True
        )
        grown = decoder(bottleneck(levels))
    assert [level.shape for level in grown] == [level.shape for level in levels]
    reduced = (plan.widths[3] if plan.bottleneck else 9 * plan.channels[3]) + plan.channels[3]
    assert count(bottleneck.stage) == count(network.layer4) + 2 * plan.channels[2] * reduced
    for block in decoder.stages[2][1:]:
        kept = network.layer1[1]  # of the same size, for it keeps grid and channels
        assert count(block) == count(kept)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("tf_efficientnet_lite0", (24, 40, 112, 320)),
        ("convnext_atto", (40, 80, 160, 320)),
        ("resnetv2_50", (256, 512, 1024, 2048)),  # of pre-activation blocks, which are not those of a ResNet
    ],
)
def test_other_pyramids_are_grown_by_blocks_of_a_resnet18(name, channels):
    plan = residual_plan(BackboneConfig(name, weights="random"))
    assert plan == ResidualPlan(False, channels, channels, (2, 2, 2, 2), 1)
    with torch.device("meta"):
        levels = timm.create_model(name, features_only=True)(torch.zeros(1, 3, 64, 64))[-4:-1]
        grown = ReverseDecoder(plan)(OneClassBottleneck(plan)(levels))
    assert [level.shape for level in grown] == [level.shape for level in levels]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "several feature maps of reduction 16; this method needs a pyramid"),
        ("levit_128", "backbone.name=levit_128: .*feature maps of reduction 4, 8, 16, 32, .*; it has 16, 32, 64"),
    ],
)
def test_networks_without_such_a_pyramid_are_refused(name, message):
    with pytest.raises(OptionError, match=message):
        residual_plan(BackboneConfig(name, weights="random"))


@pytest.mark.parametrize("side", [16, 48, 72, 250])
def test_inputs_that_do_not_halve_five_times_are_refused(side):
    with pytest.raises(OptionError, match=f"input of {side} pixels.*multiple of 32"):
        check_side(side)


# --------------------------------------------------------------------------------------------------------- two encoders
CNN = BackboneConfig("resnet10t", weights="random", random_seed=3)


def statistics(encoder: CnnBackbone) -> list[Tensor]:
    return [module.running_mean.clone() for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("norm", ["train", "eval"])
def test_a_frozen_encoder_and_a_copy_that_learns(norm):
    pair = TeacherPair(CNN, norm)
    images = random_images(3)
    for one, other in zip(pair.source(images), pair.eval().target(images), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
        assert other.requires_grad
    assert not any(module.training for module in pair.modules())
    assert pair.source.state_dict().keys() == pair.target.state_dict().keys()
    assert not {p.data_ptr() for p in pair.source.parameters()} & {p.data_ptr() for p in pair.target.parameters()}

    pair.train()
    assert pair.training
    assert not any(module.training for module in pair.source.modules())
    modes = {m.training for m in pair.target.modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {norm == "train"}
    before = statistics(pair.source), statistics(pair.target)
    pair.source(images)
    pair.target(images)
    assert all(map(torch.equal, statistics(pair.source), before[0]))
    assert all(map(torch.equal, statistics(pair.target), before[1])) == (norm == "eval")


def test_weights_with_folded_batch_norm_cannot_train_it(tmp_path):
    """As of encoders that were exported without batch norm: mean zero, one variance for all channels."""
    state = timm.create_model(CNN.name).state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.zero_()
        elif key.endswith("running_var"):
            value.fill_(1 - 1e-5)
        elif value.is_floating_point() and value.ndim > 1:
            value.mul_(0.9)
    safetensors.torch.save_file(state, tmp_path / "folded.safetensors")
    folded = BackboneConfig(CNN.name, weights=str(tmp_path / "folded.safetensors"))
    with pytest.raises(WeightsError, match=r"folded.*encoder_norm eval"):
        TeacherPair(folded, "train")
    TeacherPair(folded, "eval")
    key = next(key for key in state if key.endswith("running_var"))
    state[key][0] = 2.0
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    TeacherPair(BackboneConfig(CNN.name, weights=str(tmp_path / "whole.safetensors")), "train")


def test_taps_are_the_first_three_stages():
    assert CnnBackbone(BackboneConfig("resnet18", weights="random"), TAPS).channels == [64, 128, 256]


# ------------------------------------------------------------------------------------------------------ losses and maps
def test_distances_by_hand():
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 2, 3, 4, 5))
    by_position, whole = np.zeros((2, 4, 5)), np.zeros(2)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                t, s = teacher[image, :, row, column], student[image, :, row, column]
                by_position[image, row, column] = 1 - (t @ s) / math.sqrt((t @ t) * (s @ s))
        t, s = teacher[image].ravel(), student[image].ravel()
        whole[image] = 1 - (t @ s) / math.sqrt((t @ t) * (s @ s))
    pair = torch.from_numpy(teacher).float(), torch.from_numpy(student).float()
    np.testing.assert_allclose(distance_map(*pair).numpy(), by_position, atol=1e-6)
    assert flattened_distance(*pair).item() == pytest.approx(whole.mean(), abs=1e-6)
    assert flattened_distance(pair[0], 3 * pair[0]).item() == pytest.approx(0, abs=1e-6)
    assert distance_map(pair[0], -pair[0]).mean().item() == pytest.approx(2)


def test_distances_are_float32_of_whatever_is_given():
    teacher, student = torch.randn(2, 2, 64, 8, 8).bfloat16()
    assert distance_map(teacher, student).dtype == flattened_distance(teacher, student).dtype == torch.float32
    expected = flattened_distance(teacher.float(), student.float())
    assert torch.equal(flattened_distance(teacher, student), expected)


@pytest.mark.parametrize("fuse", ["sum", "mean"])
def test_gaussian_of_the_map_is_scipys(fuse):
    levels = [torch.rand(2, size, size) for size in (16, 8, 4)]
    anomaly_map, _ = fuse_and_blur(levels, DistanceMapConfig(fuse=fuse), 64)
    large = upsample_levels(levels, 64).double().numpy()
    fused = large.sum(0) if fuse == "sum" else large.mean(0)
    expected = np.stack([gaussian_filter(each, sigma=4) for each in fused])
    np.testing.assert_allclose(anomaly_map.numpy(), expected, atol=2e-6)


def test_box_is_a_five_by_five_kernel_with_zeros_beyond_the_border():
    side = 11
    config = DistanceMapConfig(fuse="mean", blur="box")
    spots = torch.zeros(2, side, side)
    spots[0, 5, 5] = spots[1, 0, 0] = 1
    found, before = fuse_and_blur([spots], config, side)
    assert torch.equal(before, spots)
    assert found[0, 5, 5].item() == pytest.approx(0.0452, abs=5e-5)
    assert found[0, 5, 3].item() == pytest.approx(0.0399, abs=5e-5)
    assert found[0, 7, 7].item() == pytest.approx(0.0352, abs=5e-5)
    assert found[0].sum().item() == pytest.approx(1, rel=1e-5)
    assert not found[0, 5, 8:].any()
    torch.testing.assert_close(found[1, :3, :3], found[0, 5:8, 5:8])
    corner = fuse_and_blur([torch.ones(1, side, side)], config, side)[0][0, 0, 0]
    assert corner.item() == pytest.approx(found[0, 5:8, 5:8].sum().item(), rel=1e-5)


def test_without_blur_the_map_is_the_levels():
    levels = [torch.rand(1, 8, 8), torch.rand(1, 8, 8)]
    anomaly_map, raw_map = fuse_and_blur(levels, DistanceMapConfig(blur="none"), 8)
    torch.testing.assert_close(anomaly_map, levels[0] + levels[1])
    assert torch.equal(raw_map, anomaly_map)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(OptionError, match=r"score_share"):
        DistanceMapConfig(score_share=share)

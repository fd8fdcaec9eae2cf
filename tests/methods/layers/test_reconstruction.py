"""Features, attention blocks and masks against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.methods.conftest import random_images
from unianom.configs.backbone import BackboneConfig
from unianom.configs.transformer import TransformerConfig
from unianom.methods.layers.reconstruction import (
    AttentionBlock,
    FeatureNeck,
    FeedForward,
    LearnedPosition,
    QueryLayer,
    feature_jitter,
    initialise_transformer,
    neighbour_mask,
)

CNN = BackboneConfig("resnet10t", weights="random", random_seed=3)


# ------------------------------------------------------------------------------------------------- neighbour mask
def test_visible_keys_of_the_published_mask():
    visible = (neighbour_mask(14, 14, 7) == 0).sum(1).view(14, 14)
    assert visible[7, 7] == 14 * 14 - 7 * 7 == 147
    assert [visible[row, column] for row in (0, 13) for column in (0, 13)] == [14 * 14 - 4 * 4] * 4 == [180] * 4
    assert visible[0, 7] == 14 * 14 - 4 * 7


@pytest.mark.parametrize(("height", "width", "window"), [(5, 7, 3), (7, 5, 4), (6, 6, 1), (9, 4, 5), (5, 5, 2)])
def test_mask_is_that_of_loops(height, width, window):
    expected = np.zeros((height, width, height, width))
    reach = window // 2
    for row in range(height):
        for column in range(width):
            for other_row in range(height):
                for other_column in range(width):
                    if abs(other_row - row) <= reach and abs(other_column - column) <= reach:
                        expected[row, column, other_row, other_column] = -math.inf
    mask = neighbour_mask(height, width, window)
    assert mask.dtype == torch.float32
    np.testing.assert_array_equal(mask.numpy(), expected.reshape(height * width, -1))


@pytest.mark.parametrize(("side", "window"), [(1, 1), (3, 3), (4, 7), (5, 5)])
def test_a_mask_that_hides_the_whole_grid_is_refused(side, window):
    with pytest.raises(ValueError, match=f"{side}×{side}"):
        neighbour_mask(side, side, window)


# --------------------------------------------------------------------------------------------------------- jitter
@pytest.mark.parametrize("dim", [1, 2])
def test_jitter_is_gaussian_and_scales_with_the_norm_of_each_token(dim):
    torch.manual_seed(0)
    channels, draws = 8, 4000
    token = torch.arange(1.0, channels + 1)
    tokens = torch.stack([token, 10 * token, 0 * token])  # 3 C
    features = tokens if dim == 1 else tokens[None].expand(5, 3, channels)
    noise = torch.stack([feature_jitter(features, 20.0, 1.0, dim) - features for _ in range(draws)])
    noise = noise.reshape(-1, 3, channels)
    norm = math.sqrt(sum(value**2 for value in range(1, channels + 1)))
    for row, factor in enumerate((1, 10, 0)):
        expected = 20 * factor * norm / channels
        values = noise[:, row].double()
        assert values.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(values.mean().item()) <= 0.05 * expected
        if factor:  # a Gaussian has 68.3 % within one standard deviation, 95.4 % within two
            share = [(values.abs() < k * expected).double().mean().item() for k in (1, 2)]
            assert share == pytest.approx([0.6827, 0.9545], abs=0.01)


def test_jitter_is_drawn_once_for_a_call():
    torch.manual_seed(0)
    features = torch.ones(4, 3, 6)
    changed = []
    for _ in range(400):
        different = feature_jitter(features, 1.0, 0.25, dim=2) != features
        assert different.all() or not different.any()
        changed.append(bool(different.any()))
    assert np.mean(changed) == pytest.approx(0.25, abs=0.08)
    assert torch.equal(feature_jitter(features, 1.0, 0.0, dim=2), features)
    assert all((feature_jitter(features, 1.0, 1.0, dim=2) != features).any() for _ in range(50))


# ------------------------------------------------------------------------------------------------------ positions
def test_learned_position_is_the_column_then_the_row():
    torch.manual_seed(0)
    position = LearnedPosition(3, 5, 8)
    assert position.rows.shape == (3, 4)
    assert position.columns.shape == (5, 4)
    for table in (position.rows, position.columns):  # uniform in 0…1
        assert 0 <= table.min() < table.max() <= 1
    code = position()
    assert code.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            expected = torch.cat([position.columns[column], position.rows[row]])
            assert torch.equal(code[row * 5 + column], expected)
    assert LearnedPosition(200, 200, 64)().mean().item() == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------------------------------------- blocks
def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return scaled * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """With every parameter away from ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def test_attention_block_is_that_of_loops():
    torch.manual_seed(0)
    dim, heads, queries, keys = 6, 2, 3, 4
    block = shaken(AttentionBlock(dim, heads))
    x, memory = torch.randn(1, queries, dim), torch.randn(1, keys, dim)
    position, key_position = torch.randn(queries, dim), torch.randn(keys, dim)
    mask = torch.zeros(queries, keys)
    mask[0, 1] = mask[2, 3] = -math.inf
    with torch.no_grad():
        result = block(x, memory, position, key_position, mask)[0].double().numpy()

    weights = block.attention.in_proj_weight.detach().double().numpy().reshape(3, dim, dim)
    biases = block.attention.in_proj_bias.detach().double().numpy().reshape(3, dim)
    q = (x[0] + position).double().numpy() @ weights[0].T + biases[0]
    k = (memory[0] + key_position).double().numpy() @ weights[1].T + biases[1]
    v = memory[0].double().numpy() @ weights[2].T + biases[2]  # values carry no position
    width = dim // heads
    for query in range(queries):
        attended = np.zeros(dim)
        seen = [key for key in range(keys) if mask[query, key] == 0]
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            share = softmax(np.array([q[query, part] @ k[key, part] / math.sqrt(width) for key in seen]))
            attended[part] = sum(weight * v[key, part] for weight, key in zip(share, seen))
        out = block.attention.out_proj
        projected = out.weight.detach().double().numpy() @ attended + out.bias.detach().double().numpy()
        expected = layer_norm(x[0, query].double().numpy() + projected, block.norm)
        np.testing.assert_allclose(result[query], expected, atol=1e-5)


def test_feed_forward_is_that_of_loops():
    torch.manual_seed(0)
    block = shaken(FeedForward(4, 7))
    x = torch.randn(2, 3, 4)
    first, second = block.layers[0], block.layers[3]
    with torch.no_grad():
        result = block(x)
        for image in range(2):
            for token in range(3):
                hidden = torch.relu(first.weight @ x[image, token] + first.bias)
                added = x[image, token] + second.weight @ hidden + second.bias
                expected = layer_norm(added.double().numpy(), block.norm)
                np.testing.assert_allclose(result[image, token].numpy(), expected, atol=1e-5)


def test_a_layer_without_queries_needs_a_prompt():
    layer = QueryLayer(TransformerConfig(dim=4, heads=2, hidden=4), 0, None, None)
    tokens = torch.randn(1, 3, 4)
    assert layer(tokens, tokens, torch.zeros(3, 4), tokens).shape == (1, 3, 4)
    with pytest.raises(ValueError, match="needs a prompt"):
        layer(tokens, tokens, torch.zeros(3, 4), None)


def test_dropout_lies_where_it_is_asked_for():
    """Zeroed hidden units and zeroed outputs both change the result; each alone can be switched off."""

    def noisy(dropout: float, inner: float | None) -> tuple[bool, bool]:
        torch.manual_seed(0)
        block = FeedForward(4, 32, dropout, inner_dropout=inner).train()
        x = torch.randn(1, 5, 4)
        hidden = block.layers[:3](x)
        return bool((hidden - torch.relu(block.layers[0](x))).abs().max() > 0), not torch.equal(block(x), block(x))

    assert noisy(0.5, None) == (True, True)
    assert noisy(0.5, 0.0) == (False, True)
    assert noisy(0.0, 0.5) == (True, True)
    assert noisy(0.0, None) == (False, False)
    block = AttentionBlock(4, 2, 0.5)
    assert block.attention.dropout == block.dropout.p == 0.5


def test_linear_layers_and_convolutions_start_xavier_uniform_without_bias():
    torch.manual_seed(0)
    fans = {  # (fan in, fan out), by hand
        "linear": (nn.Linear(60, 90), (60, 90)),
        "plain": (nn.Linear(60, 90, bias=False), (60, 90)),
        "conv": (nn.Conv2d(12, 20, 3), (12 * 9, 20 * 9)),
        "up": (nn.ConvTranspose2d(12, 20, 4), (12 * 16, 20 * 16)),
    }
    module = nn.Sequential(nn.ModuleDict({name: layer for name, (layer, _) in fans.items()}))
    initialise_transformer(module)
    for layer, (fan_in, fan_out) in fans.values():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert layer.bias is None or not layer.bias.any()


def test_packed_projections_norms_and_embeddings_keep_their_own_weights():
    torch.manual_seed(0)
    attention, norm, embedding = nn.MultiheadAttention(16, 2), nn.LayerNorm(16), nn.Embedding(9, 16)
    kept = [attention.in_proj_weight, attention.in_proj_bias, norm.weight, norm.bias, embedding.weight]
    nn.init.normal_(norm.weight)
    before = [parameter.detach().clone() for parameter in kept]
    out = attention.out_proj.weight.detach().clone()
    initialise_transformer(nn.ModuleList([attention, norm, embedding]))
    assert all(torch.equal(parameter, was) for parameter, was in zip(kept, before, strict=True))
    assert not torch.equal(attention.out_proj.weight, out)  # it is a linear layer


# ----------------------------------------------------------------------------------------------------- features
def resized(feature_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """C×h×w to C×height×width: bilinear, the corners of both lie on each other."""
    result = np.zeros((len(feature_map), height, width))
    for row in range(height):
        for column in range(width):
            y = row * (feature_map.shape[1] - 1) / (height - 1)
            x = column * (feature_map.shape[2] - 1) / (width - 1)
            top, left = min(int(y), feature_map.shape[1] - 2), min(int(x), feature_map.shape[2] - 2)
            dy, dx = y - top, x - left
            above = (1 - dx) * feature_map[:, top, left] + dx * feature_map[:, top, left + 1]
            below = (1 - dx) * feature_map[:, top + 1, left] + dx * feature_map[:, top + 1, left + 1]
            result[:, row, column] = (1 - dy) * above + dy * below
    return result


@pytest.mark.parametrize(
    ("taps", "grid_reduction", "grid"), [((4, 8, 16), 16, 6), ((2, 8, 16, 32), 16, 6), ((8, 16), 8, 12)]
)
def test_all_taps_come_to_one_grid_fine_to_coarse(taps, grid_reduction, grid):
    images = random_images(2, side=96)
    neck = FeatureNeck(CNN, taps, grid_reduction, 96)
    torch.manual_seed(CNN.random_seed)
    network = timm.create_model(CNN.name, features_only=True).eval()
    with torch.inference_mode():
        levels = {96 // level.shape[2]: level.double().numpy() for level in network(images)}
    assert neck.grid == (grid, grid)
    assert neck.channels == sum(levels[tap].shape[1] for tap in taps)
    features = neck(images)
    assert features.shape == (2, neck.channels, grid, grid)
    assert features.dtype == torch.float32
    for image in range(2):
        expected = np.concatenate([resized(levels[tap][image], grid, grid) for tap in taps])
        np.testing.assert_allclose(features[image].numpy(), expected, atol=1e-5)


def test_no_gradient_reaches_the_encoder_or_the_images():
    neck = FeatureNeck(CNN, (4, 8), 8, 64).train()
    features = neck(random_images(1).requires_grad_())
    assert not features.requires_grad
    assert not features.is_inference()  # else nothing could be learned from them
    assert not any(module.training for module in neck.encoder.modules())


def test_published_necks():
    """EfficientNet-B4: 272 channels of four taps; for CIFAR-10 720 of five, the coarsest enlarged to stride 16."""
    encoder = BackboneConfig("tf_efficientnet_b4.aa_in1k", weights="random")
    neck = FeatureNeck(encoder, (2, 4, 8, 16, 32), 16, 224)
    assert neck.encoder.channels == [24, 32, 56, 160, 448]
    assert (neck.channels, neck.grid) == (720, (14, 14))


def test_other_pyramids_will_do():
    """A transformer whose layout has channels last, and an input that its reductions do not divide."""
    neck = FeatureNeck(BackboneConfig("swin_tiny_patch4_window7_224", weights="random"), (4, 8, 16), 16, 224)
    assert (neck.channels, neck.grid) == (96 + 192 + 384, (14, 14))
    neck = FeatureNeck(CNN, (2, 4, 8, 16), 16, 100)
    assert neck.grid == (7, 7)
    assert neck(random_images(1, side=100)).shape == (1, neck.channels, 7, 7)

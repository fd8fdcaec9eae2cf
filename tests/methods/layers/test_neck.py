"""The neck against loops over positions."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from tests.methods.conftest import random_images
from unianom.configs.backbone import BackboneConfig
from unianom.methods.layers.neck import FeatureNeck

CNN = BackboneConfig("resnet10t", weights="random", random_seed=3)


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

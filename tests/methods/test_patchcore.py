"""PatchCore against a plain second implementation: loops over patches, windows and bins, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch.nn.functional import adaptive_avg_pool1d, conv2d, unfold

from tests.methods.conftest import INPUT, SIDE, random_images
from unianom.configs.backbone import BackboneConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.memory.index import MemoryBank
from unianom.methods import MaskedPatches
from unianom.methods.patchcore import PatchCore, pooling_kernels

Array = NDArray[np.float64]

CNN = BackboneConfig("resnet10t", weights="random", random_seed=3)


# ------------------------------------------------------------------------------------------ second implementation
def windows(feature_map: Array, size: int) -> Array:
    """C×h×w to h×w×(C·size²): each cell's neighbourhood, zero outside, channel after channel, rows before columns."""
    channels, height, width = feature_map.shape
    reach = size // 2
    result = np.zeros((height, width, channels, size, size))
    for row in range(height):
        for column in range(width):
            for i in range(size):
                for j in range(size):
                    y, x = row + i - reach, column + j - reach
                    if 0 <= y < height and 0 <= x < width:
                        result[row, column, :, i, j] = feature_map[:, y, x]
    return result.reshape(height, width, -1)


def bilinear(cells: Array, height: int, width: int) -> Array:
    """h×w×D to height×width×D; pixel centres lie at half-integers and the border is held (corners not aligned)."""

    def source(position: int, long: int, short: int) -> tuple[int, int, float]:
        at = min(max((position + 0.5) * short / long - 0.5, 0), short - 1)
        low = math.floor(at)
        return low, min(low + 1, short - 1), at - low

    result = np.zeros((height, width, cells.shape[2]))
    for row in range(height):
        up, down, dy = source(row, height, cells.shape[0])
        for column in range(width):
            left, right, dx = source(column, width, cells.shape[1])
            above = (1 - dx) * cells[up, left] + dx * cells[up, right]
            below = (1 - dx) * cells[down, left] + dx * cells[down, right]
            result[row, column] = (1 - dy) * above + dy * below
    return result


def pooled(vector: Array, length: int) -> Array:
    """Adaptive average: bin b covers ⌊b·n/length⌋ up to ⌈(b+1)·n/length⌉."""
    n = len(vector)
    return np.array([vector[b * n // length : -(-(b + 1) * n // length)].mean() for b in range(length)])


def expected_patches(feature_maps: list[Array], size: int, dimension: int) -> Array:
    """N×dimension patches of one image's C×h×w maps, fine to coarse."""
    height, width = feature_maps[0].shape[1:]
    levels = [bilinear(windows(feature_map, size), height, width) for feature_map in feature_maps]
    patches = []
    for row in range(height):
        for column in range(width):
            parts = [pooled(level[row, column], dimension) for level in levels]
            patches.append(pooled(np.concatenate(parts), dimension))
    return np.stack(patches)


def squared(a: Array, b: Array) -> float:
    return float(((a - b) ** 2).sum())


def reweighted(patch: Array, bank: Array, neighbours: int) -> float:
    """Eq. 7 of the paper, for the patch that is farthest from the bank."""
    nearest = min(range(len(bank)), key=lambda row: squared(patch, bank[row]))
    around = sorted(range(len(bank)), key=lambda row: squared(bank[nearest], bank[row]))[:neighbours]
    distance = math.sqrt(squared(patch, bank[nearest]))
    total = sum(math.exp(math.sqrt(squared(patch, bank[row]))) for row in around)
    return (1 - math.exp(distance) / total) * distance


# ----------------------------------------------------------------------------------------------------------- tests
def configure(**changes) -> PatchCoreConfig:
    return PatchCoreConfig(**({"backbone": CNN, "input": INPUT, "dimension": 50} | changes))


def feature_maps(images: torch.Tensor) -> dict[int, Array]:
    """All five maps, by reduction, of the plain timm network with the same weights."""
    torch.manual_seed(CNN.random_seed)
    network = timm.create_model(CNN.name, features_only=True).eval()
    with torch.inference_mode():
        return {SIDE // level.shape[2]: level.double().numpy() for level in network(images)}


@pytest.mark.parametrize(
    ("taps", "size", "dimension"),
    [
        ((8, 16), 3, 50),
        ((8, 16), 1, 50),
        ((16,), 5, 64),
        ((8, 32), 3, 37),
        ((16, 32), 1, 700),  # longer than a patch of one cell: the pooling stretches it
    ],
)
def test_patches_are_those_of_the_second_implementation(taps, size, dimension):
    images = random_images(2)
    levels = feature_maps(images)
    with torch.inference_mode():
        embedding = PatchCore(configure(taps=taps, patch_size=size, dimension=dimension)).embed(images)
    assert embedding.keep.all()
    assert embedding.patches.dtype == torch.float32
    for number in range(2):
        expected = expected_patches([levels[tap][number] for tap in taps], size, dimension)
        np.testing.assert_allclose(embedding.patches[number].numpy(), expected, rtol=1e-4, atol=1e-5)


def bank_and_patches(dimension: int = 50) -> tuple[NDArray[np.float32], torch.Tensor]:
    """Thirty bank vectors, and 2×64 patches near to and far from them."""
    rng = np.random.default_rng(11)
    bank = rng.normal(0, 0.3, (30, dimension)).astype(np.float32)
    patches = bank[rng.integers(0, 30, (2, 64))] + rng.normal(0, 0.2, (2, 64, dimension)).astype(np.float32)
    return bank, torch.from_numpy(patches.astype(np.float32))


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("sigma", [0.0, 4.0])
def test_plain_score_is_the_largest_squared_distance_and_the_map_its_upsampled_grid(neighbours, sigma):
    bank, patches = bank_and_patches()
    method = PatchCore(configure(preset="reference", neighbours=neighbours, blur_sigma=sigma), MemoryBank.build(bank))
    prediction = method.postprocess(method.search_bank(MaskedPatches(patches, torch.ones(2, 64, dtype=torch.bool))))
    for number in range(2):
        distances = np.array(
            [
                np.sort([squared(patch, vector) for vector in bank.astype(np.float64)])[:neighbours].mean()
                for patch in patches[number].double().numpy()
            ]
        )
        assert prediction.score[number].item() == pytest.approx(distances.max(), rel=1e-6)
        grid = bilinear(distances.reshape(8, 8, 1), SIDE, SIDE)[..., 0]
        expected = gaussian_filter(grid, sigma) if sigma else grid
        np.testing.assert_allclose(prediction.anomaly_map[number].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("b", [2, 9, 30, 100])
def test_paper_score_is_reweighted_as_equation_7_says(b):
    """Also where b is all of the bank, or more than it holds."""
    bank, patches = bank_and_patches()
    method = PatchCore(configure(reweight_neighbours=b), MemoryBank.build(bank))
    prediction = method.postprocess(method.search_bank(MaskedPatches(patches, torch.ones(2, 64, dtype=torch.bool))))
    for number in range(2):
        image = patches[number].double().numpy()
        farthest = max(image, key=lambda patch: min(squared(patch, vector) for vector in bank.astype(np.float64)))
        expected = reweighted(farthest, bank.astype(np.float64), b)
        assert prediction.score[number].item() == pytest.approx(expected, rel=1e-5)


def test_reweighting_by_hand():
    """Bank 0 and 3 on a line, one patch at 5: s* = 2, w = 1 − e²/(e² + e⁵)."""
    method = PatchCore(
        configure(reweight_neighbours=2, dimension=1), MemoryBank.build(np.array([[0], [3]], np.float32))
    )
    patches = torch.full((1, 64, 1), 3.0)
    patches[0, 17] = 5
    prediction = method.postprocess(method.search_bank(MaskedPatches(patches, torch.ones(1, 64, dtype=torch.bool))))
    assert prediction.score.item() == pytest.approx((1 - math.exp(2) / (math.exp(2) + math.exp(5))) * 2, rel=1e-6)


def test_reweighting_of_far_patches_stays_finite():
    """exp of a distance of a thousand overflows; the ratio of two does not."""
    method = PatchCore(configure(dimension=1), MemoryBank.build(np.array([[0], [1]], np.float32)))
    prediction = method.postprocess(
        method.search_bank(MaskedPatches(torch.full((1, 64, 1), 1001.0), torch.ones(1, 64, dtype=torch.bool)))
    )
    share = 1 / (1 + math.e)  # e^1000 / (e^1000 + e^1001)
    assert prediction.score.item() == pytest.approx((1 - share) * 1000, rel=1e-5)


def test_presets_differ_in_the_reweighting_alone():
    paper, reference = configure(), configure(preset="reference")
    differing = {f.name for f in dataclasses.fields(paper) if getattr(paper, f.name) != getattr(reference, f.name)}
    assert differing == {"preset", "reweight"}
    assert (paper.reweight, reference.reweight) == (True, False)
    assert configure(preset="paper", reweight=False).reweight is False


def test_published_defaults_give_784_patches_of_1024():
    """Wide-ResNet-50-2 up to layer3 at 224 pixels; its second and third stage on a 28×28 grid."""
    config = PatchCoreConfig()
    assert config.backbone == BackboneConfig("wide_resnet50_2.tv_in1k")
    assert config.input == InputPolicy("short_side", 256, 224, interpolation="bilinear")
    assert (config.taps, config.patch_size, config.dimension, config.neighbours) == ((8, 16), 3, 1024, 1)
    assert config.bank.coreset_ratio == 0.1
    random = dataclasses.replace(config, backbone=BackboneConfig("wide_resnet50_2.tv_in1k", weights="random"))
    method = PatchCore(random)
    assert sum(p.numel() for p in method.parameters()) == 24_862_528
    with torch.inference_mode():
        embedding = method.embed(torch.zeros(1, 3, 224, 224))
    assert embedding.patches.shape == (1, 784, 1024)


def test_one_neighbour_cannot_reweight():
    """The nearest bank vector is its own nearest neighbour, so b = 1 would make every score zero."""
    with pytest.raises(OptionError, match="reweight_neighbours=1"):
        configure(reweight_neighbours=1)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_bank_too_small_for_its_options_is_refused(rows):
    """With one vector the weight of equation 7 is 1 − 1, so every image would score 0."""
    bank = MemoryBank.build(np.eye(rows, 50, dtype=np.float32))
    _, patches = bank_and_patches()
    embedding = MaskedPatches(patches, torch.ones(patches.shape[:2], dtype=torch.bool))
    method = PatchCore(configure(preset="paper"), bank)
    if rows == 1:
        for refused in (method.check_bank, lambda: method.postprocess(method.search_bank(embedding))):
            with pytest.raises(OptionError, match=r"memory bank, which has only 1, .* score 0; .* reweight=false"):
                refused()
        method = PatchCore(configure(preset="paper", reweight=False), bank)
    method.check_bank()
    assert (method.postprocess(method.search_bank(embedding)).score > 0).all()
    more = PatchCore(configure(neighbours=rows + 1, reweight=False), bank)
    for refused in (more.check_bank, lambda: more.postprocess(more.search_bank(embedding))):
        with pytest.raises(OptionError, match=f"neighbours={rows + 1}, but the memory bank has only {rows} vectors"):
            refused()


# ------------------------------------------------------------------------------------------------------------- pooling
@pytest.mark.parametrize(("channels", "dimension"), [((3,), 27), ((5, 2), 8), ((4, 6, 3), 10), ((2, 3), 64)])
def test_pooling_as_convolutions_is_the_published_pooling(channels, dimension):
    """Of one map, of bins that hold values of two maps, and of more bins than values."""
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(2, count, 4, 6, generator=generator, dtype=torch.float64) for count in channels]
    cells = [unfold(feature_map, 3, padding=1).transpose(1, 2) for feature_map in maps]
    wanted = adaptive_avg_pool1d(torch.cat([adaptive_avg_pool1d(cell, dimension) for cell in cells], -1), dimension)
    found = torch.zeros(2, dimension, 4, 6, dtype=torch.float64)
    for feature_map, (first, kernel) in zip(maps, pooling_kernels(channels, 3, dimension)):
        found[:, first : first + len(kernel)] += conv2d(feature_map, kernel.double(), padding=1)
    assert torch.allclose(found.flatten(2).transpose(1, 2), wanted, rtol=0, atol=1e-6)

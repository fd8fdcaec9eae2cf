"""Upsampling, blurs and reductions against PyTorch's, SciPy's and plain sums."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter as scipy_filter

from unianom.methods.layers.postprocess import (
    gaussian_filter,
    pooled_maximum,
    standard_deviation,
    top_mean,
    upsample,
    upsample_and_blur,
    upsample_levels,
)


def by_definition(grid: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """H×W map of an h×w grid, in float64."""
    large = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    return scipy_filter(large, sigma) if sigma else large


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("grid", "size"), [((28, 28), 224), ((14, 14), 224), ((4, 4), 64), ((7, 5), 64), ((1, 3), 32), ((9, 9), 9)]
)
def test_map_is_bilinear_upsampling_then_gaussian_blur(grid, size, sigma):
    """Also for a map smaller than the blur's reach (the border is reflected more than once) and non-square grids."""
    values = np.random.default_rng(0).gamma(2.0, 3.0, (3, *grid))
    maps = upsample_and_blur(torch.from_numpy(values.astype(np.float32)), size, sigma)
    assert maps.shape == (3, size, size)
    assert maps.dtype == torch.float32
    expected = np.stack([by_definition(value, size, sigma) for value in values])
    np.testing.assert_allclose(maps.numpy(), expected, rtol=2e-6, atol=0)


def test_a_constant_grid_stays_constant():
    """Both steps are weighted means, so no border darkens the map."""
    maps = upsample_and_blur(torch.full((1, 6, 8), 2.5), 48, 4.0)
    np.testing.assert_allclose(maps.numpy(), 2.5, rtol=1e-6)


def test_rows_and_columns_are_not_exchanged():
    """A grid whose second row alone is lit gives a map that is lit in a band of rows."""
    grid = torch.zeros(1, 3, 4)
    grid[0, 1] = 1
    maps = upsample_and_blur(grid, 12, 0.0)[0]
    torch.testing.assert_close(maps, maps[:, :1].expand_as(maps))
    assert maps[:, 0].argmax() in (5, 6)


def test_matrices_kept_from_inference_mode_let_gradients_through():
    """They are kept for later calls, whichever mode the first one came in."""
    with torch.inference_mode():
        upsample_and_blur(torch.ones(1, 3, 4), 11, 1.25)
    grid = torch.ones(1, 3, 4, requires_grad=True)
    upsample_and_blur(grid, 11, 1.25).sum().backward()
    assert grid.grad is not None


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampling_is_pytorchs(align_corners):
    grid = torch.rand(2, 5, 3)
    expected = torch.nn.functional.interpolate(
        grid[:, None], size=(11, 11), mode="bilinear", align_corners=align_corners
    )
    assert torch.equal(upsample(grid, 11, align_corners), expected[:, 0])


def test_corners_of_levels_and_input_lie_on_each_other():
    maps = [torch.rand(2, 4, 4), torch.rand(2, 2, 2)]
    large = upsample_levels(maps, 16)
    assert large.shape == (2, 2, 16, 16)
    for level, found in zip(maps, large):
        torch.testing.assert_close(found[:, ::15, ::15], level[:, [0, -1]][:, :, [0, -1]])
    ramp = torch.arange(4.0).expand(1, 4, 4)
    torch.testing.assert_close(upsample_levels([ramp], 10)[0, 0, 0], torch.linspace(0, 3, 10))


@pytest.mark.parametrize(("size", "sigma"), [(3, 1.0), (5, 5 / 3), (9, 3.0)])
def test_filter_is_scipys(size, sigma):
    maps = np.random.default_rng(0).normal(size=(2, 3, 7, 6)).astype(np.float32)
    # SciPy's "mirror" reflects about the centre of the border's cells
    expected = scipy_filter(maps.astype(np.float64), sigma, radius=size // 2, mode="mirror", axes=(2, 3))
    np.testing.assert_allclose(gaussian_filter(torch.from_numpy(maps), size, sigma).numpy(), expected, atol=1e-6)


def test_three_by_three_kernel_of_sigma_one():
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1
    # 1 : exp(-1/2) : exp(-1), divided by their sum (1 + 2 exp(-1/2))²
    edge = 0.6065306597 / 4.8976405
    expected = torch.tensor([[0.0751136, edge, 0.0751136], [edge, 0.2041799, edge], [0.0751136, edge, 0.0751136]])
    torch.testing.assert_close(gaussian_filter(impulse, 3, 1.0)[0, 0, 1:4, 1:4], expected, atol=1e-6, rtol=0)


def test_autocast_does_not_round():
    maps = torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gaussian_filter(maps, 3, 1.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gaussian_filter(maps, 3, 1.0))


@pytest.mark.parametrize(
    ("share", "largest"), [(0.0, 1), (0.001, 1), (0.01, 1), (0.03, 3), (0.0399, 3), (0.5, 50), (1.0, 100)]
)
def test_top_mean(share, largest):
    maps = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float().view(1, 10, 10).repeat(2, 1, 1)
    maps[1] -= 1000
    expected = sum(range(100 - largest, 100)) / largest
    assert top_mean(maps, share).tolist() == pytest.approx([expected, expected - 1000])


def test_standard_deviation_is_numpys():
    maps = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(standard_deviation(torch.from_numpy(maps)).numpy(), maps.std((1, 2)), rtol=1e-5)


def test_pooled_maximum_of_a_spot():
    """A lone pixel of 9 in zeros: at most 9 / 9 under a 3×3 mean, also in the corner."""
    maps = torch.zeros(3, 6, 6)
    maps[0, 2, 3] = maps[1, 0, 5] = 9
    maps[2, 1, 1:4] = 9
    assert pooled_maximum(maps, 3).tolist() == pytest.approx([1, 1, 3])
    assert pooled_maximum(maps, 1).tolist() == [9, 9, 9]

"""The anomaly map against PyTorch's upsampling followed by SciPy's two-dimensional blur."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from unianom.methods.layers.maps import grid_to_map


def by_definition(grid: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """H×W map of an h×w grid, in float64."""
    large = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    return gaussian_filter(large, sigma) if sigma else large


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("grid", "size"), [((28, 28), 224), ((14, 14), 224), ((4, 4), 64), ((7, 5), 64), ((1, 3), 32), ((9, 9), 9)]
)
def test_map_is_bilinear_upsampling_then_gaussian_blur(grid, size, sigma):
    """Also for a map smaller than the blur's reach (the border is reflected more than once) and non-square grids."""
    values = np.random.default_rng(0).gamma(2.0, 3.0, (3, *grid))
    maps = grid_to_map(torch.from_numpy(values.astype(np.float32)), size, sigma)
    assert maps.shape == (3, size, size)
    assert maps.dtype == torch.float32
    expected = np.stack([by_definition(value, size, sigma) for value in values])
    np.testing.assert_allclose(maps.numpy(), expected, rtol=2e-6, atol=0)


def test_a_constant_grid_stays_constant():
    """Both steps are weighted means, so no border darkens the map."""
    maps = grid_to_map(torch.full((1, 6, 8), 2.5), 48, 4.0)
    np.testing.assert_allclose(maps.numpy(), 2.5, rtol=1e-6)


def test_rows_and_columns_are_not_exchanged():
    """A grid whose second row alone is lit gives a map that is lit in a band of rows."""
    grid = torch.zeros(1, 3, 4)
    grid[0, 1] = 1
    maps = grid_to_map(grid, 12, 0.0)[0]
    torch.testing.assert_close(maps, maps[:, :1].expand_as(maps))
    assert maps[:, 0].argmax() in (5, 6)


def test_matrices_kept_from_inference_mode_let_gradients_through():
    """They are kept for later calls, whichever mode the first one came in."""
    with torch.inference_mode():
        grid_to_map(torch.ones(1, 3, 4), 11, 1.25)
    grid = torch.ones(1, 3, 4, requires_grad=True)
    grid_to_map(grid, 11, 1.25).sum().backward()
    assert grid.grad is not None

"""The small Gaussian filter against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter as scipy_filter

from unianom.methods.layers.smoothing import gaussian_filter


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

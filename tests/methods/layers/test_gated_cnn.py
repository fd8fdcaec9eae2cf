"""The multi-granularity CNN against its equation."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import conv2d

from unianom.methods.layers.gated_cnn import MultiGranularityCnn


def test_published_size():
    cnn = MultiGranularityCnn(256, 256)
    # one 1×1 and six 3×3 convolutions with biases
    assert sum(p.numel() for p in cnn.parameters()) == 256 * 257 + 6 * (9 * 256 + 1) * 256


def test_output_is_the_sum_of_gated_branches():
    torch.manual_seed(0)
    cnn = MultiGranularityCnn(3, 2)
    x = torch.randn(1, 3, 5, 5)
    state = cnn.state_dict()
    weights = [state[key] for key in state if key.endswith("weight")]
    biases = [state[key] for key in state if key.endswith("bias")]
    expected = torch.zeros(1, 2, 5, 5)
    layer = 0
    for depth in (1, 1, 2, 3):
        branch = x
        for _ in range(depth):
            branch = conv2d(branch, weights[layer], biases[layer], padding=weights[layer].shape[-1] // 2)
            layer += 1
        expected += 0.5 * branch * (1 + torch.erf(branch / math.sqrt(2)))
    torch.testing.assert_close(cnn(x), expected)


def test_branches_see_one_to_seven_cells():
    cnn = MultiGranularityCnn(1, 1, gated=False)
    impulse = torch.zeros(1, 1, 11, 11)
    impulse[0, 0, 5, 5] = 1
    for branch, reach in zip(cnn.branches, (0, 1, 2, 3)):
        difference = (branch(impulse) - branch(torch.zeros_like(impulse)))[0, 0].abs() > 0
        # a bias next to the border makes no difference, so what remains is what one cell reaches
        rows, columns = difference.nonzero().T
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5 - reach, 5 + reach, 5 - reach, 5 + reach)


def test_without_gates_the_cnn_is_affine():
    cnn = MultiGranularityCnn(2, 3, gated=False)
    x, y, zero = torch.randn(1, 2, 6, 6), torch.randn(1, 2, 6, 6), torch.zeros(1, 2, 6, 6)
    torch.testing.assert_close(cnn(x + y), cnn(x) + cnn(y) - cnn(zero), atol=1e-4, rtol=1e-4)
    gated = MultiGranularityCnn(2, 3)
    assert (gated(x + y) - gated(x) - gated(y) + gated(zero)).abs().max() > 1e-2

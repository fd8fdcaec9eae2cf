"""Batch norm folded into the convolutions before it: the same output from fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

REMAINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: lambda norm: nn.Identity(),
    BatchNormAct2d: lambda norm: nn.Sequential(norm.drop, norm.act),  # timm's, of EfficientNets and MobileNets
}
"""Kinds of batch norm that can be folded, and what is left of each."""


def fold_batch_norm(module: nn.Module) -> int:
    """Scale and shift every convolution, transposed ones too, that a batch norm follows directly, and take the batch
    norm out: W·γ/√(σ² + ε) and (b − μ)·γ/√(σ² + ε) + β (UniNet, eq. 3, which leaves out β). In place; the result can
    neither be trained nor loaded from a file of weights.

    Args:
        module: in evaluation mode; parts that are registered one behind the other are called so, as in ResNets.

    Returns:
        How many batch norms were folded.
    """
    count = 0
    for part in module.modules():
        children = list(part.named_children())
        for (_, convolution), (norm_name, norm) in pairwise(children):
            if not isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if type(norm) not in REMAINS or norm.num_features != convolution.out_channels or norm.training:
                continue
            if norm.running_mean is None or norm.running_var is None:  # it takes every batch's own statistics
                continue
            _fold(convolution, norm, norm.running_mean, norm.running_var)
            setattr(part, norm_name, REMAINS[type(norm)](norm))
            count += 1
    return count


def _fold(convolution: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Fold one of them; PyTorch's own helper knows no transposed convolutions with groups."""
    with torch.no_grad():
        scale = norm.weight / (variance + norm.eps).sqrt()  # C
        bias = torch.zeros_like(mean) if convolution.bias is None else convolution.bias
        bias = (bias - mean) * scale + norm.bias
        weight: Tensor = convolution.weight
        if isinstance(convolution, nn.ConvTranspose2d):  # its weight is inputs × outputs of a group × k × k
            grouped = weight.unflatten(0, (convolution.groups, -1))
            weight = (grouped * scale.view(convolution.groups, 1, -1, 1, 1)).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, 1, 1, 1)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(bias, requires_grad=False)

"""Folded batch norm: gone, and no output changed."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from unianom.configs.backbone import BackboneConfig
from unianom.folding import fold_batch_norm
from unianom.methods.layers.distillation import OneClassBottleneck, ReverseDecoder, residual_plan
from unianom.methods.uninet import MemBottleneck


def stirred(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norm that is not the identity."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values, low in (
                (part.running_mean, -0.5),
                (part.running_var, 0.5),
                (part.weight, 0.5),
                (part.bias, -0.5),
            ):
                values.data.copy_(low + torch.rand(values.shape, generator=generator))
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


PLANS = {name: residual_plan(BackboneConfig(name, weights="random")) for name in ("resnet18", "resnext50_32x4d")}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["bottleneck", "mem3", "mem7", "decoder"])
def test_output_stays(name, kind):
    plan = PLANS[name]
    torch.manual_seed(0)
    fine, middle, coarse, last = plan.channels
    levels = [torch.randn(1, fine, 16, 16), torch.randn(1, middle, 8, 8), torch.randn(1, coarse, 4, 4)]
    if kind == "decoder":
        module, given = ReverseDecoder(plan), torch.randn(1, last, 2, 2)
    else:
        made = {
            "bottleneck": OneClassBottleneck,
            "mem3": lambda p: MemBottleneck(p, 3),
            "mem7": lambda p: MemBottleneck(p, 7),
        }
        module, given = made[kind](plan), levels
    stirred(module)
    with torch.inference_mode():
        before = module(given)
        count = norms(module)
        assert fold_batch_norm(module) == count > 0
        after = module(given)
    assert norms(module) == 0
    for one, other in zip(after if kind == "decoder" else [after], before if kind == "decoder" else [before]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_timm_encoder_folds_whole(name):
    module = stirred(timm.create_model(name, features_only=True, out_indices=(1, 2, 3)))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = module(images)
        assert fold_batch_norm(module) > 0
        after = module(images)
    assert norms(module) == 0
    for one, other in zip(after, before):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_a_norm_in_training_is_left_alone():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).train()
    assert fold_batch_norm(module) == 0
    assert norms(module) == 1


def test_a_norm_without_statistics_is_left_alone():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert fold_batch_norm(module) == 0
    assert norms(module) == 1


def test_by_hand():
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)).eval()
    module[0].weight.data.fill_(3.0)
    for values, value in zip(
        (module[1].running_mean, module[1].running_var, module[1].weight, module[1].bias), (2, 4, 5, 7)
    ):
        values.data.fill_(value)
    fold_batch_norm(module)
    assert module[0].weight.item() == pytest.approx(3 * 5 / 2)
    assert module[0].bias.item() == pytest.approx(-2 * 5 / 2 + 7)

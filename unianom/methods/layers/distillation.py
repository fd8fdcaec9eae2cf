"""What the student–teacher methods share: an encoder's pyramid is fused to one map, and a decoder of residual
blocks grows the pyramid again from it (reverse distillation).

Levels are listed fine to coarse. With a Wide-ResNet-50-2 at 256 pixels: 256×64×64, 512×32×32, 1024×16×16, and 2048×8×8
behind the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unianom.backbones import CnnBackbone, check_name, pyramid_channels
from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig
from unianom.errors import WeightsError
from unianom.methods.layers.postprocess import gaussian_blur, gaussian_filter, upsample_levels

TAPS = (4, 8, 16)
"""Reductions of layer1, layer2 and layer3 of a ResNet."""

PYRAMID = (*TAPS, 32)
"""With that of layer4, which the bottleneck takes the place of."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


# ------------------------------------------------------------------------------------------------ the encoder's plan
@dataclass(frozen=True)
class ResidualPlan:
    """Of what blocks bottlenecks and decoders are made; those of a residual encoder, which they mirror.

    Attributes:
        bottleneck: whether its blocks are 1×1, 3×3, 1×1 convolutions ("bottleneck") or two 3×3 ones ("basic").
        channels: of its stages 1 to 4; (256, 512, 1024, 2048) of a Wide-ResNet-50-2.
        widths: of the 3×3 convolutions inside; (128, 256, 512, 1024).
        depths: blocks of its stages; (3, 4, 6, 3).
        groups: of the 3×3 convolutions.
    """

    bottleneck: bool
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    groups: int


def residual_plan(backbone: BackboneConfig) -> ResidualPlan:
    """Return the plan by which bottleneck and decoder mirror an encoder.

    Those of a timm ResNet (resnet…, wide_resnet…, resnext…) have its own blocks, as published. For any other pyramid
    they have the blocks and depths of a ResNet-18 and the encoder's channels, which no paper has.

    Raises:
        OptionError: no feature maps of reduction 4, 8, 16 and 32.
    """
    check_name(backbone)
    with torch.device("meta"):  # only its structure is asked for
        model: Any = timm.create_model(backbone.name, pretrained=False, **backbone.options)
    kinds = {type(block) for stage in range(1, 5) for block in getattr(model, f"layer{stage}", ())}
    if not isinstance(model, ResNet) or not kinds or not kinds <= {BasicBlock, Bottleneck}:
        channels = pyramid_channels(backbone, PYRAMID)
        return ResidualPlan(False, channels, channels, (2, 2, 2, 2), 1)
    stages = [getattr(model, f"layer{stage}") for stage in range(1, 5)]
    bottleneck = kinds == {Bottleneck}
    last = [stage[-1] for stage in stages]
    return ResidualPlan(
        bottleneck=bottleneck,
        channels=tuple((block.conv3 if bottleneck else block.conv2).out_channels for block in last),
        widths=tuple(block.conv2.out_channels for block in last),
        depths=tuple(len(stage) for stage in stages),
        groups=last[0].conv2.groups,
    )


class TeacherPair(nn.Module):
    """A frozen encoder and a trainable copy of it.

    Args:
        backbone: encoder and weights.
        norm: what batch norm of the copy does in training: "train", as published for most data sets, takes a batch's
            statistics; "eval" keeps those of the weights.

    Raises:
        WeightsError: batch norm is folded into the convolutions of these weights, and `norm` is "train", which would
            make another network of them.
    """

    def __init__(self, backbone: BackboneConfig, norm: Literal["train", "eval"]) -> None:
        super().__init__()
        self.source = CnnBackbone(backbone, TAPS)
        self.target = CnnBackbone(backbone, TAPS, trainable=True)
        self.norm = norm
        if norm == "train" and backbone.weights != "random" and _is_folded(self.target):
            raise WeightsError(
                f"batch norm is folded into the convolutions of {backbone.weights}, so it has no statistics to train "
                f"with; set --method.encoder_norm eval"
            )

    def train(self, mode: bool = True) -> TeacherPair:
        """Set the mode as of any module, but that of the target's batch norm only where it should train."""
        super().train(mode)
        self.target.train(mode and self.norm == "train")
        return self


def _is_folded(encoder: nn.Module) -> bool:
    states = [module.state_dict() for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    return bool(states) and all(
        not state["running_mean"].any() and bool((state["running_var"] == state["running_var"][0]).all())
        for state in states
    )


# --------------------------------------------------------------------------------------------- bottleneck and decoder
def initialise_residual(module: nn.Module) -> None:
    """Draw convolutions Kaiming-normal (fan-out, ReLU) and set batch norm to one and zero, as the published bottlenecks
    and decoders start; transposed convolutions keep PyTorch's own."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """Make a convolution that keeps the grid, but for its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias)


def norm_act(channels: int, activation: type[nn.Module]) -> list[nn.Module]:
    """Make batch norm and activation."""
    return [nn.BatchNorm2d(channels), activation()]


class ResidualBlock(nn.Module):
    """A ResNet block that keeps, halves or doubles the grid.

    Args:
        plan: block type and groups.
        inputs, width, outputs: channels before, inside (of a bottleneck) and after.
        scale: "keep"; "half", by the stride of the 3×3 convolution; "double", by a 2×2 transposed convolution of stride
            2 in its place, and another one in the shortcut.
        activation: class of the activations.
    """

    def __init__(
        self,
        plan: ResidualPlan,
        inputs: int,
        width: int,
        outputs: int,
        scale: Literal["keep", "half", "double"],
        activation: type[nn.Module],
    ) -> None:
        super().__init__()

        def resize(before: int, after: int, groups: int) -> nn.Module:
            if scale == "double":
                return nn.ConvTranspose2d(before, after, kernel_size=2, stride=2, groups=groups, bias=False)
            return convolution(before, after, 3, 2 if scale == "half" else 1, groups)

        if plan.bottleneck:
            layers = [convolution(inputs, width, 1), *norm_act(width, activation)]
            layers += [resize(width, width, plan.groups), *norm_act(width, activation)]
            layers += [convolution(width, outputs, 1)]
        else:
            layers = [resize(inputs, outputs, 1), *norm_act(outputs, activation)]
            layers += [convolution(outputs, outputs, 3)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if scale == "double":
            grown = nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2, bias=False)
            self.shortcut = nn.Sequential(grown, nn.BatchNorm2d(outputs))
        elif scale == "half" or inputs != outputs:
            step = 2 if scale == "half" else 1
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, step), nn.BatchNorm2d(outputs))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map B×inputs×h×w to B×outputs×h'×w'."""
        return self.activation(self.layers(x) + self.shortcut(x))


class PyramidFusion(nn.Module):
    """Three levels on the grid of the coarsest, stacked along channels; 3×3 convolutions of stride 2 bring the finer
    ones there (RD4AD, sec. 3.3).

    Args:
        plan: channels of the levels.
        activation: class of the activations.
    """

    def __init__(self, plan: ResidualPlan, activation: type[nn.Module]) -> None:
        super().__init__()
        fine, middle, coarse = plan.channels[:3]

        def halve(inputs: int, outputs: int) -> list[nn.Module]:
            return [convolution(inputs, outputs, 3, 2), *norm_act(outputs, activation)]

        self.fine = nn.Sequential(*halve(fine, middle), *halve(middle, coarse))
        self.middle = nn.Sequential(*halve(middle, coarse))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map 256@64², 512@32², 1024@16² to 3072@16²."""
        fine, middle, coarse = levels
        return torch.cat([self.fine(fine), self.middle(middle), coarse], dim=1)


class OneClassBottleneck(nn.Module):
    """The one-class bottleneck embedding of RD4AD: fusion, then a residual stage like the encoder's fourth.

    Args:
        plan: of the encoder.
        activation: "relu" or "gelu".
    """

    def __init__(self, plan: ResidualPlan, activation: str = "relu") -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.fusion = PyramidFusion(plan, act)
        fused, width, outputs = 3 * plan.channels[2], plan.widths[3], plan.channels[3]
        blocks = [ResidualBlock(plan, fused, width, outputs, "half", act)]
        blocks += [ResidualBlock(plan, outputs, width, outputs, "keep", act) for _ in range(plan.depths[3] - 1)]
        self.stage = nn.Sequential(*blocks)
        initialise_residual(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map 256@64², 512@32², 1024@16² to 2048@8²."""
        return self.stage(self.fusion(levels))


class ReverseDecoder(nn.Module):
    """The student of reverse distillation: three residual stages, each of which doubles the grid (RD4AD, sec. 3.2).

    Its stages have as many blocks as the encoder's first, second and third.

    Args:
        plan: of the encoder.
        activation: "relu" or "gelu".
    """

    def __init__(self, plan: ResidualPlan, activation: str = "relu") -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.stages = nn.ModuleList()
        inputs = plan.channels[3]
        for level, depth in zip((2, 1, 0), plan.depths):  # coarse to fine
            width, outputs = plan.widths[level], plan.channels[level]
            blocks = [ResidualBlock(plan, inputs, width, outputs, "double", act)]
            blocks += [ResidualBlock(plan, outputs, width, outputs, "keep", act) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = outputs
        initialise_residual(self)

    def forward(self, x: Tensor, skips: Sequence[Tensor] = ()) -> list[Tensor]:
        """Map 2048@8² to 256@64², 512@32², 1024@16².

        Args:
            x: of the bottleneck.
            skips: nothing, or what is added before the second and before the third stage, 1024@16² and 512@32².
        """
        coarse_to_fine: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            if skips and number:
                x = x + skips[number - 1]
            x = stage(x)
            coarse_to_fine.append(x)
        return coarse_to_fine[::-1]


def split_halves(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first B and the last B of 2B×…; unlike `chunk`, also of a graph that takes any B."""
    first, last = levels.unflatten(0, (2, -1)).unbind()
    return first, last


# ---------------------------------------------------------------------------------------------------- losses and maps
def flattened_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 1 − cosine of whole maps B×C×h×w, each taken as one vector; mean over images (ReContrast, eq. 1). In
    float32."""
    return (1 - cosine_similarity(teacher.float().flatten(1), student.float().flatten(1), dim=1)).mean()


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 1 − cosine of the vectors at every position of B×C×h×w maps; B×h×w float32 (RD4AD, eq. 1)."""
    return 1 - cosine_similarity(teacher.float(), student.float(), dim=1)


def fuse_and_blur(distances: Sequence[Tensor], config: DistanceMapConfig, side: int) -> tuple[Tensor, Tensor]:
    """Make anomaly maps of distances: upsampled, fused and blurred.

    Args:
        distances: L maps B×h×w.
        config: how; its `score_share` has no part in this.
        side: S, of the input.

    Returns:
        B×S×S, and the same before the blur.
    """
    maps = upsample_levels(distances, side)
    fused = maps.sum(0) if config.fuse == "sum" else maps.mean(0)
    if config.blur == "gaussian":
        return gaussian_blur(fused, 4.0), fused
    if config.blur == "box":
        return gaussian_filter(fused[:, None], 5, 4.0, padding="zeros")[:, 0], fused
    return fused, fused

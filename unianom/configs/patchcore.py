"""Options of PatchCore."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from unianom.configs.backbone import BackboneConfig, check_taps
from unianom.configs.bank import BankConfig, BlurSigma
from unianom.data.image import InputPolicy
from unianom.options import AtLeastOne, Odd, Options

PRESETS = {"paper": {"reweight": True}, "reference": {"reweight": False}}
"""The text re-weights the image score by the neighbourhood of the nearest bank vector; the released code does not."""


@dataclass(frozen=True)
class PatchCoreConfig(Options):
    """A memory bank of CNN features of normal patches (PatchCore); the defaults are the published ones.

    Args:
        preset: "paper" or "reference" (the released code); fills what is left null below.
        backbone: any timm pyramid of feature maps that has the taps; published: Wide-ResNet-50-2 with
            torchvision's first weights.
        input: published: shorter side 256, centre crop 224.
        bank: coreset and index; published coreset ratio 0.1 at 224 pixels.
        taps: reductions (strides with regard to the image) of the feature maps, fine to coarse; (8, 16) are layer2 and
            layer3 of a ResNet.
        patch_size: odd neighbourhood, in feature cells, that a patch is averaged over.
        dimension: length to which each tap, and then their concatenation, is pooled.
        neighbours: bank vectors averaged in a patch's distance.
        reweight: weight the image score by a softmax over neighbours of the nearest bank vector (eq. 7).
        reweight_neighbours: how many of those, the nearest bank vector itself counted (b in eq. 7; at least 2).
        blur_sigma: Gaussian blur of the anomaly map, in pixels.
    """

    usual = ("preset", "backbone", "input", "bank")

    presets = PRESETS

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("wide_resnet50_2.tv_in1k"))
    input: InputPolicy = field(default_factory=InputPolicy)
    bank: BankConfig = field(default_factory=BankConfig)
    taps: tuple[int, ...] = (8, 16)
    patch_size: Odd = 3
    dimension: AtLeastOne = 1024
    neighbours: AtLeastOne = 1
    reweight: bool = True
    # m* is its own nearest neighbour, so with b = 1 every weight is zero
    reweight_neighbours: Annotated[int, Ge(2)] = 9
    blur_sigma: BlurSigma = 4.0

    def check(self) -> None:
        check_taps(self.taps)

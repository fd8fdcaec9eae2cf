"""Options of UniAD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unianom.configs.backbone import BackboneConfig, resolve_padding
from unianom.configs.training import TrainingConfig
from unianom.configs.transformer import TransformerConfig, check_reconstruction_options
from unianom.data.image import InputPolicy
from unianom.options import AtLeastOne, AtLeastZero, Options


@dataclass(frozen=True)
class UniADConfig(Options):
    """A transformer that reconstructs the features of all categories (UniAD); the defaults are the published ones.

    Args:
        preset: "paper" or "reference" (the released code), which differ in `backbone.padding_side`.
        backbone: any timm pyramid of feature maps that has the taps; published: EfficientNet-B4.
        input: published: stretched to 224×224.
        training: length, batches, optimiser. The released code reaches more on one GPU with batches of 8.
        taps: reductions (strides with regard to the image) of the feature maps, fine to coarse; published:
            (2, 4, 8, 16), for CIFAR-10 (2, 4, 8, 16, 32).
        grid_reduction: the one of the taps whose grid is the token grid.
        transformer: its size, dropout and feature jitter.
        neighbours: side of the square, in tokens, that attention does not see around each token; 0 for no mask.
        masked: which attentions are so masked: of the "encoder", of the decoder's queries to the encoder's tokens
            ("decoder_1") and to the previous layer's ("decoder_2").
        map_form: "norm", the error's L2 norm over channels, upsampled with corners aligned; or "squared", the mean
            squared error over channels, upsampled with corners not aligned, to which CADA calibrates.
        reduce: a map's "max" (industrial images), "mean" (semantic anomalies, CIFAR-10) or "std" is the image score.
        score_pool: side of the mean filter, in pixels, before the maximum; 1 for none.
    """

    usual = ("preset", "backbone", "input", "training")

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("tf_efficientnet_b4.aa_in1k"))
    input: InputPolicy = field(default_factory=lambda: InputPolicy(resize="stretch", size=224, crop=None))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    taps: tuple[int, ...] = (2, 4, 8, 16)
    grid_reduction: int = 16
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    neighbours: AtLeastZero = 7
    masked: tuple[Literal["encoder", "decoder_1", "decoder_2"], ...] = ("encoder", "decoder_1", "decoder_2")
    map_form: Literal["norm", "squared"] = "norm"
    reduce: Literal["max", "mean", "std"] = "max"
    score_pool: AtLeastOne = 16

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        return resolve_padding(cls, super().resolve(given))

    def check(self) -> None:
        check_reconstruction_options(self.taps, self.grid_reduction, self.score_pool, self.input.side)

"""Options of UniAS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unianom.configs.backbone import BackboneConfig, check_taps, resolve_padding
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.options import AtLeastOne, AtLeastZero, NotNegative, Options, Positive, Share, ShareBelowOne

PRESETS = {
    "paper": {
        "cos_sign": "distance",
        "neighbours": 0,
        "sar": "cbam_product",
        "head": "deconvolution",
        "fuse_at": "input",
        "level_blur": False,
    },
    "reference": {
        "cos_sign": "legacy",
        "neighbours": 7,
        "sar": "lincomb",
        "head": "convolutions",
        "fuse_at": "finest",
        "level_blur": True,
    },
}
"""Where text and released code differ.

- cos_sign: the text adds cosine distances (sec. 3.3.2); the code, in one of its versions, similarities.
- neighbours: the text has the standard attention of a vanilla transformer and builds on its global receptive field
  (sec. 3.3.1); the code hides neighbours in both attentions, as UniAD does.
- sar: the text multiplies one query of the token grid's shape by CBAM's weights of the coarsest patches (sec. 3.4);
  the code adds a channel-weighted and a spatially weighted copy of two such queries and mixes them by an MGG-CNN.
- head: the text goes back to the grid and applies one transposed convolution (sec. 3.3.2); the code upsamples and
  applies three convolutions. That tokens are normalised before is only in the code, so both do it.
- fuse_at, level_blur: the text multiplies maps of the input's size (eq. 6); the code blurs them and multiplies at the
  finest level's size.

Three differences are no matter of the preset. The text cuts patches from the filtered features, which the pixel
decoder of the code precedes; it is in all released models and the text's own details are in a supplement, so both
presets have it. Channel attention is absent from the text and on in the code for one data set of two, and flips and
turns are absent from the text and differ by data set in the code: `channel_attention` and `augmentation` are off
unless set, which the recipes do.
"""


NORM_GROUPS = 32
"""Of the group norms in the pixel decoder; they divide its width."""


@dataclass(frozen=True)
class UniASConfig(Options):
    """Reconstruction of features level by level, coarse to fine (UniAS); the defaults are the published ones.

    Args:
        preset: "paper" or "reference" (the released code); fills what is left null below.
        backbone: any timm pyramid of feature maps that has the taps; published: EfficientNet-B4.
        input: published: stretched to 224 pixels. The maps of the taps must divide into the coarsest one's grid.
        training: published: 1000 epochs of batches of 64, learning rate divided by ten every 400 epochs.
        augmentation: flips and turns by category; frozen features cannot be kept while there are any.
        taps: reductions (strides with regard to the image) of the feature maps, fine to coarse.
        dim: width of tokens and decoder (C'); a multiple of 32 and of `heads`.
        heads: of every attention.
        hidden: width inside every feed-forward part.
        encoder_layers: transformer layers on the coarsest level of the pixel decoder.
        dropout: in every transformer layer.
        jitter_scale: strength of the noise added to the decoder's inputs in training.
        jitter_probability: of adding it to a level's maps; drawn once a level and step.
        sar: sample-aware reweighting of the first query: "cbam_product", "lincomb", or "off" for a plain learned one.
        neighbours: side of the square, in tokens, that spatial attention does not see around each token; 0 for no mask.
        channel_attention: add a transformer layer that takes channels for tokens.
        cnn: after each transformer layer: "mgg" (gated branches), "mg" (no gates), "conv3" (one convolution), "none".
        head: from tokens to features: "deconvolution", or bilinear upsampling and three "convolutions".
        cos_sign: "distance" makes reconstruction and target point the same way, "legacy" the opposite way.
        loss_weight: of the sum of all losses.
        fuse_at: level maps are multiplied at the size of the "input" or of the "finest" level.
        level_blur: blur level maps before: 3×3 the coarsest, two cells more each finer one, sigma a third of it.
        levels: numbers of the levels whose maps are multiplied, 1 the finest; () for all. Training has them all.
        reduce: a map's "max" or standard deviation ("std") is the image score.
    """

    usual = ("preset", "backbone", "input", "training")

    presets = PRESETS

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("tf_efficientnet_b4.aa_in1k"))
    input: InputPolicy = field(default_factory=lambda: InputPolicy(resize="stretch", size=224, crop=None))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(decay_at=(0.4, 0.8)))
    augmentation: Augmentation = field(default_factory=Augmentation)
    taps: tuple[int, ...] = (2, 4, 8, 16)
    dim: AtLeastOne = 256
    heads: AtLeastOne = 4
    hidden: AtLeastOne = 2048
    encoder_layers: AtLeastOne = 3
    dropout: ShareBelowOne = 0.1
    jitter_scale: NotNegative = 20.0
    jitter_probability: Share = 0.5
    sar: Literal["cbam_product", "lincomb", "off"] = "cbam_product"
    neighbours: AtLeastZero = 0
    channel_attention: bool = False
    cnn: Literal["mgg", "mg", "conv3", "none"] = "mgg"
    head: Literal["deconvolution", "convolutions"] = "deconvolution"
    cos_sign: Literal["distance", "legacy"] = "distance"
    loss_weight: Positive = 1.0
    fuse_at: Literal["input", "finest"] = "input"
    level_blur: bool = False
    levels: tuple[int, ...] = ()
    reduce: Literal["max", "std"] = "max"

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        return resolve_padding(cls, super().resolve(given))

    def check(self) -> None:
        check_taps(self.taps)
        if self.dim % NORM_GROUPS or self.dim % self.heads:
            raise OptionError(f"dim={self.dim} must be a multiple of {NORM_GROUPS} and of heads={self.heads}")
        if len(set(self.levels)) != len(self.levels) or not all(1 <= n <= len(self.taps) for n in self.levels):
            raise OptionError(f"levels={self.levels} must be distinct numbers from 1 to {len(self.taps)}, one a tap")

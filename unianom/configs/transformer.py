"""Size of the transformer that reconstructs features (UniAD, OneNIP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unianom.configs.backbone import check_taps
from unianom.errors import OptionError
from unianom.options import AtLeastOne, NotNegative, Options, Share, ShareBelowOne, ValueRefused


@dataclass(frozen=True)
class TransformerConfig(Options):
    """Size and regularisation of a reconstruction transformer; the defaults are the published ones.

    Args:
        dim: D, width of tokens.
        heads: attention heads.
        hidden: width inside feed-forward blocks.
        encoder_layers, decoder_layers: how many of each.
        dropout: on attention weights and after every block.
        jitter_scale: strength of the noise on input tokens while training, relative to a token's norm.
        jitter_probability: share of training steps that have this noise.
    """

    dim: AtLeastOne = 256
    heads: AtLeastOne = 8
    hidden: AtLeastOne = 1024
    encoder_layers: AtLeastOne = 4
    decoder_layers: AtLeastOne = 4
    dropout: ShareBelowOne = 0.1
    jitter_scale: NotNegative = 20.0
    jitter_probability: Share = 1.0

    def check(self) -> None:
        if self.dim % self.heads or self.dim % 2:
            raise ValueRefused(f"dim={self.dim} must be even and a multiple of heads={self.heads}")


def check_reconstruction_options(taps: Sequence[int], grid_reduction: int, score_pool: int, side: int) -> None:
    """Refuse what no neck, mask or image score can be made of; for the configs that have these options.

    Raises:
        OptionError: as it says.
    """
    check_taps(taps)
    if grid_reduction not in taps:
        raise OptionError(f"grid_reduction={grid_reduction} must be one of taps={tuple(taps)}")
    if score_pool > side:
        raise OptionError(f"score_pool={score_pool} must be at most the input's {side} pixels")

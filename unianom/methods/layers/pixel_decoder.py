"""A feature pyramid network with a transformer encoder at its top (MaskFormer's pixel decoder, as UniAS uses it)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from unianom.configs.unias import NORM_GROUPS
from unianom.methods.layers.tokens import AttentionBlock, FeedForward, sine_position
from unianom.methods.trained import initialise_transformer


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each with residual and norm.

    Args:
        dim, heads, hidden, dropout: as in `AttentionBlock` and `FeedForward`.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = AttentionBlock(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """B×N×C to B×N×C; `position`, N×C, is added to queries and keys."""
        return self.feed_forward(self.attention(x, x, position, position))


class PixelDecoder(nn.Module):
    """Feature maps of several levels, each mixed with what the coarser ones tell.

    The coarsest level passes a 1×1 convolution, the transformer encoder and a 3×3 convolution with ReLU; every finer
    one is projected (1×1 convolution, group norm), joined by the upsampled result of the level above and smoothed
    (3×3 convolution, group norm, ReLU).

    Args:
        channels: of each level, fine to coarse.
        grid: height and width of the coarsest level.
        dim: channels of every output; a multiple of 32.
        heads, hidden, dropout: of the transformer encoder.
        layers: of the transformer encoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grid: tuple[int, int],
        dim: int,
        heads: int,
        hidden: int,
        dropout: float,
        layers: int,
    ) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.project = nn.Conv2d(coarsest, dim, kernel_size=1)
        self.encoder = nn.ModuleList([EncoderLayer(dim, heads, hidden, dropout) for _ in range(layers)])
        self.coarsest = nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, dim, kernel_size=1, bias=False), nn.GroupNorm(NORM_GROUPS, dim))
            for count in finer
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False), nn.GroupNorm(NORM_GROUPS, dim), nn.ReLU()
            )
            for _ in finer
        )
        self.position: Tensor
        self.register_buffer("position", sine_position(*grid, dim), persistent=False)  # N C
        initialise_transformer(self.encoder)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_uniform_(part.weight, a=1)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps B×C_l×h_l×w_l, fine to coarse, to maps B×dim×h_l×w_l, fine to coarse."""
        *finer, coarsest = levels
        x = self.project(coarsest)  # B dim h w
        tokens = x.flatten(2).mT  # B N dim
        for layer in self.encoder:
            tokens = layer(tokens, self.position)
        decoded = [relu(self.coarsest(tokens.mT.unflatten(2, x.shape[2:])))]
        for level, lateral, output in zip(reversed(finer), reversed(self.laterals), reversed(self.outputs)):
            above = interpolate(decoded[0], size=level.shape[2:], mode="bilinear", align_corners=False)
            decoded.insert(0, output(lateral(level) + above))
        return decoded

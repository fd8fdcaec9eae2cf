"""What the reconstruction methods are built from: the features they reconstruct, attention blocks, and the transformer
that reconstructs (UniAD, NeurIPS 2022).

Features are B×C×h×w, tokens B×N×D with N = h·w, row-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unianom.backbones import CnnBackbone
from unianom.configs.backbone import BackboneConfig
from unianom.configs.transformer import TransformerConfig
from unianom.errors import OptionError


# ------------------------------------------------------------------------------------------------------------- features
class FeatureNeck(nn.Module):
    """A frozen encoder whose taps are resized to one grid and stacked along channels, fine to coarse, without any
    normalisation (the multi-scale feature concatenation of UniAD and OneNIP).

    Reductions 2, 4, 8, 16 of EfficientNet-B4 give 24 + 32 + 56 + 160 = 272 channels on a 14×14 grid at 224 pixels.

    Args:
        backbone: encoder and weights.
        taps: reductions of its maps, fine to coarse, as of `CnnBackbone`.
        grid_reduction: the one of the taps whose grid the others take.
        side: height and width of the images in pixels.

    Attributes:
        channels: C, the sum over taps.
        grid: h and w.

    Raises:
        OptionError, WeightsError: as `CnnBackbone`.
    """

    def __init__(self, backbone: BackboneConfig, taps: Sequence[int], grid_reduction: int, side: int) -> None:
        super().__init__()
        self.encoder = CnnBackbone(backbone, taps)
        self.channels = sum(self.encoder.channels)
        level = list(taps).index(grid_reduction)
        with torch.no_grad():
            height, width = self.encoder(torch.zeros(1, 3, side, side))[level].shape[2:]
        self.grid: tuple[int, int] = (height, width)

    def forward(self, images: Tensor) -> Tensor:
        """Map B×3×S×S normalised images to B×C×h×w float32, without gradients."""
        with torch.no_grad():
            maps = self.encoder(images)
            return torch.cat([self._resize(feature_map) for feature_map in maps], dim=1)

    def _resize(self, feature_map: Tensor) -> Tensor:
        if feature_map.shape[2:] == self.grid:
            return feature_map
        return interpolate(feature_map, size=self.grid, mode="bilinear", align_corners=True)


# ------------------------------------------------------------------------------------------------------------ attention
def neighbour_mask(height: int, width: int, window: int) -> Tensor:
    """Return the additive attention mask that hides from every token itself and its neighbours (UniAD, sec. 3.2).

    Args:
        height, width: of the token grid, which queries and keys share.
        window: keys within ⌊window/2⌋ rows and columns are hidden; the window is clipped at the border.

    Returns:
        N×N float32 of 0 and −∞, queries by keys.

    Raises:
        ValueError: the window hides every key from some token.
    """
    rows = torch.arange(height).repeat_interleave(width)  # N
    columns = torch.arange(width).repeat(height)  # N
    reach = window // 2
    near = ((rows[:, None] - rows).abs() <= reach) & ((columns[:, None] - columns).abs() <= reach)  # N N
    if near.all(1).any():
        raise ValueError(f"a neighbour mask of {window}×{window} hides the whole {height}×{width} grid from a token")
    return torch.zeros(near.shape).masked_fill(near, -math.inf)


def grid_mask(grid: tuple[int, int], neighbours: int) -> Tensor | None:
    """Return the neighbour mask N×N of a token grid; None for `neighbours` = 0.

    Raises:
        OptionError: a token would see nothing.
    """
    try:
        return neighbour_mask(*grid, neighbours) if neighbours else None
    except ValueError as error:
        raise OptionError(f"neighbours={neighbours}: {error}; choose fewer neighbours or a larger input") from error


def feature_jitter(features: Tensor, scale: float, probability: float, dim: int) -> Tensor:
    """Add Gaussian noise in proportion to each token's norm: f + scale · (‖f‖₂ / C) · ε (UniAD, sec. 3.3).

    Args:
        features: any shape; C is the size of `dim`, along which the norm is taken.
        scale: strength; 20 in the published models.
        probability: of jittering this call's features at all, one draw for all of them.
        dim: the channel dimension.
    """
    if probability <= 0 or torch.rand(()) >= probability:
        return features
    strength = features.norm(dim=dim, keepdim=True) * (scale / features.shape[dim])
    return features + strength * torch.randn_like(features)


class LearnedPosition(nn.Module):
    """Learned code of a grid position: the column's half, then the row's (UniAD, OneNIP).

    Args:
        height, width: of the grid.
        dim: C, even.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(height, dim // 2))
        self.columns = nn.Parameter(torch.rand(width, dim // 2))

    def forward(self) -> Tensor:
        """Return the code of every position, N×C."""
        height, width = len(self.rows), len(self.columns)
        columns = self.columns.expand(height, width, -1)
        rows = self.rows[:, None].expand(height, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class AttentionBlock(nn.Module):
    """x ← LayerNorm(x + Dropout(Attention(x + its position, keys + their position, keys))).

    Args:
        dim: width of tokens.
        heads: attention heads.
        dropout: on attention weights and on the sum's new part.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        position: Tensor | float = 0.0,
        key_position: Tensor | float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return new tokens B×N×C.

        Args:
            x: B×N×C, the queries.
            keys: B×M×C, keys and values.
            position, key_position: N×C and M×C, added to queries and to keys, never to values.
            mask: N×M, additive.
        """
        attended, _ = self.attention(x + position, keys + key_position, keys, attn_mask=mask, need_weights=False)
        return self.norm(x + self.dropout(attended))


class FeedForward(nn.Module):
    """x ← LayerNorm(x + Dropout(two linear layers of x with ReLU and dropout between)).

    Args:
        dim: width of tokens.
        hidden: width between the two layers.
        dropout: on the sum's new part.
        inner_dropout: between the layers; None for the same.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.1, inner_dropout: float | None = None) -> None:
        super().__init__()
        inner = nn.Dropout(dropout if inner_dropout is None else inner_dropout)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), inner, nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map B×N×C to B×N×C."""
        return self.norm(x + self.dropout(self.layers(x)))


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each with residual and norm.

    Args:
        dim, heads, hidden, dropout: as of `AttentionBlock` and `FeedForward`.
        mask: N×N additive attention mask; None for none.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask: Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        self.attention = AttentionBlock(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map B×N×C to B×N×C; `position`, N×C, is added to queries and keys."""
        return self.feed_forward(self.attention(x, x, position, position, self.mask))


def initialise_transformer(module: nn.Module) -> None:
    """Set Xavier-uniform weights and zero biases in every linear layer and convolution; packed attention projections,
    norms and embeddings keep PyTorch's own (UniAD, OneNIP)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# ---------------------------------------------------------------------------------------------------------- transformer
class QueryLayer(nn.Module):
    """One layer of the layer-wise query decoder (UniAD, sec. 3.2; OneNIP, eqs. 1 and 2): queries gather from the
    encoder's tokens, then from the previous layer's.

    Args:
        config: sizes.
        queries: N learned queries of its own; 0 if queries are given at each call.
        memory_mask, previous_mask: N×N additive masks of the two attentions.
    """

    def __init__(
        self, config: TransformerConfig, queries: int, memory_mask: Tensor | None, previous_mask: Tensor | None
    ) -> None:
        super().__init__()
        self.memory_mask: Tensor | None
        self.previous_mask: Tensor | None
        self.register_buffer("memory_mask", memory_mask, persistent=False)
        self.register_buffer("previous_mask", previous_mask, persistent=False)
        self.queries = nn.Parameter(torch.randn(queries, config.dim)) if queries else None
        self.from_memory = AttentionBlock(config.dim, config.heads, config.dropout)
        self.from_previous = AttentionBlock(config.dim, config.heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.hidden, config.dropout)

    def forward(self, memory: Tensor, previous: Tensor, position: Tensor, prompt: Tensor | None) -> Tensor:
        """Map encoder tokens and the previous layer's, B×N×D, to B×N×D.

        Args:
            memory, previous: B×N×D.
            position: N×D.
            prompt: B×N×D, the queries of a layer that has none of its own.

        Raises:
            ValueError: it has none and there is no prompt.
        """
        queries = prompt if self.queries is None else self.queries.expand_as(memory)
        if queries is None:
            raise ValueError("a layer without queries of its own needs a prompt")
        queries = self.from_memory(queries, memory, position, position, self.memory_mask)
        queries = self.from_previous(queries, previous, position, position, self.previous_mask)
        return self.feed_forward(queries)


class QueryDecoder(nn.Module):
    """The layer-wise query decoder.

    Args:
        config: sizes.
        queries: N learned queries of every layer; 0 to take a prompt's tokens in their place in every layer.
        memory_mask, previous_mask: as `QueryLayer`.
    """

    def __init__(
        self, config: TransformerConfig, queries: int, memory_mask: Tensor | None, previous_mask: Tensor | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            QueryLayer(config, queries, memory_mask, previous_mask) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, memory: Tensor, position: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Map B×N×D tokens of the encoder (and of a prompt) to B×N×D."""
        previous = memory
        for layer in self.layers:
            previous = layer(memory, previous, position, prompt)
        return self.norm(previous)


class ReconstructionTransformer(nn.Module):
    """Neck features → tokens → self-attention encoder → a decoder → neck features.

    Args:
        channels: C of the neck.
        grid: h and w of the neck.
        config: sizes.
        mask: N×N additive mask of the encoder.
        decoder: takes the encoder's tokens, the position code, and the tokens of a prompt if there is one.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], config: TransformerConfig, mask: Tensor | None, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.grid = grid
        self.jitter_scale, self.jitter_probability = config.jitter_scale, config.jitter_probability
        self.project = nn.Linear(channels, config.dim)
        self.position = LearnedPosition(*grid, config.dim)
        self.encoder = nn.ModuleList(
            EncoderLayer(config.dim, config.heads, config.hidden, config.dropout, mask)
            for _ in range(config.encoder_layers)
        )
        self.decoder = decoder
        self.restore = nn.Linear(config.dim, channels)

    def encode(self, features: Tensor) -> Tensor:
        """Encode B×C×h×w to tokens B×N×D that know their context; jittered in training."""
        tokens = features.flatten(2).transpose(1, 2)  # B N C
        if self.training:
            tokens = feature_jitter(tokens, self.jitter_scale, self.jitter_probability, dim=2)
        tokens = self.project(tokens)  # B N D
        position = self.position()  # N D
        for layer in self.encoder:
            tokens = layer(tokens, position)
        return tokens

    def decode(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Decode tokens B×N×D of the encoder, and of a prompt, to features B×C×h×w."""
        restored = self.restore(self.decoder(tokens, self.position(), prompt))  # B N C
        return restored.transpose(1, 2).unflatten(2, self.grid)

"""The transformer that reconstructs neck features (UniAD, NeurIPS 2022), and what its reconstruction errors become.

Features are B×C×h×w, tokens B×N×D with N = h·w, row-major.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from unianom.configs.transformer import TransformerConfig
from unianom.errors import OptionError
from unianom.methods.layers.tokens import AttentionBlock, FeedForward, LearnedPosition, feature_jitter, neighbour_mask


def grid_mask(grid: tuple[int, int], neighbours: int) -> Tensor | None:
    """The neighbour mask N×N of a token grid; None for `neighbours` = 0.

    Raises:
        OptionError: a token would see nothing.
    """
    try:
        return neighbour_mask(*grid, neighbours) if neighbours else None
    except ValueError as error:
        raise OptionError(f"neighbours={neighbours}: {error}; choose fewer neighbours or a larger input") from error


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward.

    Args:
        config: sizes.
        mask: N×N additive attention mask.
    """

    def __init__(self, config: TransformerConfig, mask: Tensor | None) -> None:
        super().__init__()
        self.mask: Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        self.attention = AttentionBlock(config.dim, config.heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.hidden, config.dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """B×N×D to B×N×D."""
        return self.feed_forward(self.attention(x, x, position, position, self.mask))


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
        """B×N×D of encoder tokens and of the previous layer's to B×N×D; `prompt` B×N×D where nothing is learned."""
        queries = prompt if self.queries is None else self.queries.expand_as(memory)
        assert queries is not None
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
        """B×N×D tokens of the encoder (and of a prompt) to B×N×D."""
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
        self.encoder = nn.ModuleList(EncoderLayer(config, mask) for _ in range(config.encoder_layers))
        self.decoder = decoder
        self.restore = nn.Linear(config.dim, channels)

    def encode(self, features: Tensor) -> Tensor:
        """B×C×h×w to tokens B×N×D that know their context; jittered in training."""
        tokens = features.flatten(2).transpose(1, 2)  # B N C
        if self.training:
            tokens = feature_jitter(tokens, self.jitter_scale, self.jitter_probability, dim=2)
        tokens = self.project(tokens)  # B N D
        position = self.position()  # N D
        for layer in self.encoder:
            tokens = layer(tokens, position)
        return tokens

    def decode(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Tokens B×N×D of the encoder, and of a prompt, to features B×C×h×w."""
        restored = self.restore(self.decoder(tokens, self.position(), prompt))  # B N C
        return restored.transpose(1, 2).unflatten(2, self.grid)


def upsample(grid: Tensor, side: int) -> Tensor:
    """B×h×w to B×S×S, bilinear, corners aligned."""
    return interpolate(grid[:, None], size=(side, side), mode="bilinear", align_corners=True)[:, 0]


def pooled_maximum(anomaly_map: Tensor, window: int) -> Tensor:
    """Largest mean over any window×window pixels of each B×S×S map; B."""
    # a mean over a square is one over columns of one over rows, in far fewer additions
    means = avg_pool2d(anomaly_map[:, None], (window, 1), stride=1)
    return avg_pool2d(means, (1, window), stride=1).amax((1, 2, 3))

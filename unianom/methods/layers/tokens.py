"""What the reconstruction transformers share: neighbour-masked attention, feature jitter, positional codes.

Tokens are B×N×C, row-major over an h×w grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def neighbour_mask(height: int, width: int, window: int) -> Tensor:
    """Additive attention mask that hides from every token itself and its neighbours (UniAD, sec. 3.2).

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
        """N×C."""
        height, width = len(self.rows), len(self.columns)
        columns = self.columns.expand(height, width, -1)
        rows = self.rows[:, None].expand(height, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def sine_position(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed sine code of a grid position, row half first, both axes scaled to (0, 2π] (DETR; UniAS).

    Args:
        height, width: of the grid.
        dim: C, a multiple of 4.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        N×C float32.
    """
    quarter = dim // 4
    frequencies = temperature ** (-torch.arange(quarter, dtype=torch.float32) / quarter)

    def axis(length: int) -> Tensor:
        angle = (torch.arange(length) + 1) / (length + 1e-6) * 2 * math.pi
        phases = angle[:, None] * frequencies  # length quarter
        return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1)  # length dim/2, sine and cosine in turn

    rows = axis(height)[:, None].expand(height, width, -1)
    columns = axis(width).expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


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
        """New tokens.

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
        """B×N×C to B×N×C."""
        return self.norm(x + self.dropout(self.layers(x)))

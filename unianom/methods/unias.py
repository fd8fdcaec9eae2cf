"""UniAS: multi-level feature reconstruction by transformer and gated CNN, coarse to fine (Ma et al., WACV 2025).

The maps of a frozen encoder are smoothed; a decoder reconstructs every level from smoothed maps and what smoothing
took away. Where reconstruction and smoothed map point different ways, on all levels at once, is an anomaly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, mse_loss, relu

from unianom.backbones import CnnBackbone
from unianom.configs.unias import NORM_GROUPS, UniASConfig
from unianom.errors import OptionError
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.layers.postprocess import gaussian_filter, in_order, numbered, standard_deviation, upsample
from unianom.methods.layers.reconstruction import (
    AttentionBlock,
    EncoderLayer,
    FeedForward,
    feature_jitter,
    initialise_transformer,
    neighbour_mask,
)
from unianom.methods.trained import LOSS, BatchSpec, FeatureMaps, TrainedMethod, TrainingBatch

FILTER_SIZE, FILTER_SIGMA = 3, 1.0
"""Of the Gaussian W_G of eq. 2, in feature cells; sizes from the released code."""


# -------------------------------------------------------------------------------------------------------- pixel decoder
def sine_position(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Return the fixed sine code of grid positions, row half first, both axes scaled to (0, 2π] (DETR; UniAS).

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


class PixelDecoder(nn.Module):
    """A feature pyramid network with a transformer encoder at its top (MaskFormer's pixel decoder): feature maps of
    several levels, each mixed with what the coarser ones tell.

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
        """Map levels B×C_l×h_l×w_l, fine to coarse, to B×dim×h_l×w_l, fine to coarse."""
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


# ---------------------------------------------------------------------------------------------------------- first query
class MultiGranularityCnn(nn.Module):
    """Sum of four branches that see 1×1, 3×3, 5×5 and 7×7 cells (UniAS, eq. 5): one 1×1 convolution, and one, two and
    three 3×3 convolutions in a row.

    The exponent of eq. 5 runs from 0 to 2; the text and Figure 3 stack one to three convolutions, as done here.

    Args:
        channels: of the input.
        dim: of the output.
        gated: a GELU at the end of each branch (MGG-CNN), or none (MG-CNN, an ablation).
    """

    def __init__(self, channels: int, dim: int, gated: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(channels, dim, kernel_size=1)])
        for depth in (1, 2, 3):
            widths = [channels] + [dim] * depth
            self.branches.append(
                nn.Sequential(*(nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1) for i in range(depth)))
            )
        self.gate = nn.GELU() if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map B×channels×h×w to B×dim×h×w."""
        first, *others = (self.gate(branch(x)) for branch in self.branches)
        return sum(others, start=first)


class CbamWeights(nn.Module):
    """Channel and spatial weights of a map (Woo et al., CBAM, ECCV 2018; layer sizes as released for UniAS).

    Args:
        dim: channels of the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        narrow = dim // 2
        self.layers = nn.Sequential(
            nn.Linear(dim, narrow), nn.ReLU(), nn.Linear(narrow, narrow), nn.ReLU(), nn.Linear(narrow, dim)
        )
        self.convolution = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def channel(self, features: Tensor) -> Tensor:
        """Return weights B×C×1×1 in (0, 1) of the channels of B×C×h×w."""
        mean, largest = features.mean((2, 3)), features.amax((2, 3))  # B C
        return (self.layers(mean) + self.layers(largest)).sigmoid()[:, :, None, None]

    def spatial(self, features: Tensor) -> Tensor:
        """Return weights B×1×h×w in (0, 1) of the cells of B×C×h×w."""
        pooled = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], dim=1)  # B 2 h w
        return self.convolution(pooled).sigmoid()


class ProductQuery(nn.Module):
    """A learned query times the CBAM weights of the coarsest patches h_K (UniAS, sec. 3.4).

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(dim, *grid))
        self.weights = CbamWeights(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Make the query B×C×h×w of the coarsest patches B×C×h×w."""
        channel = self.weights.channel(patches)
        spatial = self.weights.spatial(channel * patches)  # in CBAM the second attention sees the first one's result
        return self.query * channel * spatial


class CombinedQuery(nn.Module):
    """Two learned queries, each the sum of a channel-weighted and a spatially weighted copy, mixed by an MGG-CNN (the
    released form of UniAS).

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(dim, 2, *grid))
        self.reference = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.weights = CbamWeights(dim)
        self.mix = MultiGranularityCnn(2 * dim, dim)

    def forward(self, decoded: Tensor) -> Tensor:
        """Make the query B×C×h×w of the pixel decoder's coarsest map B×C×h×w."""
        reference = self.reference(decoded)
        weight = self.weights.channel(reference) + self.weights.spatial(reference)  # B C h w
        return self.mix((self.queries * weight[:, :, None]).flatten(1, 2))  # channel by channel, both queries in turn


class PlainQuery(nn.Module):
    """A learned query, the same for all images.

    Args:
        grid: height and width of the token grid.
        dim: C.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(dim, *grid))

    def forward(self, patches: Tensor) -> Tensor:
        """Return the query for each image of B×C×h×w."""
        return self.query.expand(patches.shape[0], -1, -1, -1)


QUERIES = {"cbam_product": ProductQuery, "lincomb": CombinedQuery, "off": PlainQuery}
"""First queries by the option `sar`."""


# ----------------------------------------------------------------------------------------------- decoder and method


class DecoderLayer(nn.Module):
    """Cross-attention, self-attention and feed-forward, each with residual and norm (UniAS, eq. 4).

    Args:
        dim, heads, hidden, dropout: as in `AttentionBlock` and `FeedForward`.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention = AttentionBlock(dim, heads, dropout)
        self.self_attention = AttentionBlock(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)

    def forward(
        self, x: Tensor, keys: Tensor, position: Tensor | float, key_position: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Map B×N×C queries and B×N×C keys to B×N×C; positions and mask as in `AttentionBlock`."""
        x = self.cross_attention(x, keys, position, key_position, mask)
        return self.feed_forward(self.self_attention(x, x, position, position, mask))


class HybridBlock(nn.Module):
    """Transformer layer and CNN of one level (UniAS, sec. 3.3.1).

    Args:
        tokens: N, cells of the token grid.
        config: sizes, and which parts there are.
    """

    def __init__(self, tokens: int, config: UniASConfig) -> None:
        super().__init__()
        dim = config.dim
        self.spatial = DecoderLayer(dim, config.heads, config.hidden, config.dropout)
        self.channel: DecoderLayer | None = None
        if config.channel_attention:
            self.channel = DecoderLayer(tokens, config.heads, config.hidden, config.dropout)
        self.cnn: nn.Module = nn.Identity()
        if config.cnn == "conv3":
            self.cnn = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        elif config.cnn != "none":
            self.cnn = MultiGranularityCnn(dim, dim, gated=config.cnn == "mgg")

    def forward(
        self, state: Tensor, patches: Tensor, position: Tensor, patch_position: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the next state, B×C×h×w.

        Args:
            state: B×C×h×w, the level above's result, or the first query.
            patches: B×C×h×w of this level.
            position, patch_position: N×C.
            mask: N×N, additive.
        """
        queries, keys = state.flatten(2).mT, patches.flatten(2).mT  # B N C
        tokens = self.spatial(queries, keys, position, patch_position, mask)
        if self.channel is not None:  # here the C channels are the tokens, and their queries have no position
            tokens = tokens + self.channel(queries.mT, keys.mT, 0.0, patch_position.mT, None).mT
        return self.cnn(tokens.mT.unflatten(2, state.shape[2:]))


@register_method("unias")
class UniAS(TrainedMethod[UniASConfig]):
    """UniAS: frozen encoder, and a decoder that learns to reconstruct its maps.

    Levels are listed fine to coarse; the decoder walks them from coarse to fine.

    Args:
        config: options.

    Raises:
        OptionError: the encoder's maps do not fit each other, the mask or the channel attention.
    """

    Config = UniASConfig
    schedulable_options = ("training.learning_rate", "training.weight_decay", "loss_weight")
    postprocess_options = ("levels", "fuse_at", "level_blur", "reduce")
    map_options = ("levels", "fuse_at", "level_blur")

    def __init__(self, config: UniASConfig) -> None:
        super().__init__()
        self.config = with_statistics(config)
        self.encoder = CnnBackbone(config.backbone, config.taps)
        self.sizes = _level_sizes(self.encoder, config)
        channels, dim = self.encoder.channels, config.dim
        ratios = [size // self.sizes[-1] for size in self.sizes]
        grid, tokens = (self.sizes[-1],) * 2, self.sizes[-1] ** 2

        self.pixel_decoder = PixelDecoder(
            [2 * count for count in channels],
            grid,
            dim,
            config.heads,
            config.hidden,
            config.dropout,
            config.encoder_layers,
        )
        self.patches = nn.ModuleList(_patch_embedding(dim, ratio) for ratio in ratios)
        self.level_codes = nn.Parameter(torch.randn(len(channels), dim))
        self.query = QUERIES[config.sar](grid, dim)
        self.query_position = nn.Parameter(torch.randn(tokens, dim))
        self.blocks = nn.ModuleList(HybridBlock(tokens, config) for _ in channels)
        self.norm = nn.LayerNorm(dim)
        for part in (self.patches, self.query, self.blocks):
            initialise_transformer(part)
        self.heads = nn.ModuleList(_head(dim, *sizes, config) for sizes in zip(channels, self.sizes, ratios))

        self.patch_position: Tensor
        self.register_buffer("patch_position", sine_position(*grid, dim), persistent=False)  # N C
        self.mask: Tensor | None
        hidden = neighbour_mask(*grid, config.neighbours) if config.neighbours else None
        self.register_buffer("mask", hidden, persistent=False)  # N N

    @property
    def batch_spec(self) -> BatchSpec:
        """Images, flipped and turned as configured."""
        return BatchSpec(augmentation=self.config.augmentation)

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return the encoder's maps B×C_l×h_l×w_l, "level_0" the finest."""
        return {f"level_{index}": level for index, level in enumerate(self.encoder(images))}

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return mean squared errors and cosine terms, each summed over levels, and their weighted sum (sec. 3.3.2)."""
        targets, inputs = self._filtered(self.features_of(batch))
        if self.training:
            scale, probability = self.config.jitter_scale, self.config.jitter_probability
            inputs = [feature_jitter(level, scale, probability, dim=1) for level in inputs]
        reconstructions = self.reconstruct(inputs)
        sign = self.config.cos_sign
        terms = [reconstruction_terms(made, target, sign) for made, target in zip(reconstructions, targets)]
        error, cosine = torch.stack([torch.stack(pair) for pair in terms]).sum(0)
        return {LOSS: self.config.loss_weight * (error + cosine), "squared_error": error, "cosine": cosine}

    def forward(self, images: Tensor) -> RawOutputs:
        """Return "distance_0", …, B×h_l×w_l, of every level, the finest first; as embedding the coarsest level of the
        pixel decoder, 512×7×7 as published."""
        targets, inputs = self._filtered(self.frozen_features(images))
        decoded = self.pixel_decoder(inputs)
        levels = zip(self._restore(decoded), targets)
        tensors = numbered(1 - cosine_similarity(made.float(), target, dim=1) for made, target in levels)
        return RawOutputs(tensors, decoded[-1])

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: UniASConfig | None = None) -> tuple[Tensor, Tensor]:
        """Multiply the levels' maps. Their blur before that belongs to the map; nothing smooths it afterwards."""
        anomaly_map = self.fuse(in_order(tensors), config)
        return anomaly_map, anomaly_map

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: UniASConfig | None = None
    ) -> Tensor:
        """Take the maximum or standard deviation of the map; B."""
        if (config or self.config).reduce == "std":
            return standard_deviation(anomaly_map)
        return anomaly_map.amax((1, 2))

    def reconstruct(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Reconstruct maps B×C_l×h_l×w_l from filtered maps with their residuals, B×2C_l×h_l×w_l; fine to coarse."""
        return self._restore(self.pixel_decoder(inputs))

    def _restore(self, decoded: Sequence[Tensor]) -> list[Tensor]:
        """Reconstruct maps B×C_l×h_l×w_l from the levels of the pixel decoder."""
        patches = [embed(level) for embed, level in zip(self.patches, decoded)]  # each B C h w
        state = self.query(decoded[-1] if self.config.sar == "lincomb" else patches[-1])  # B C h w
        reconstructions: list[Tensor] = []
        for level in reversed(range(len(patches))):
            coded = patches[level] + self.level_codes[level, :, None, None]
            state = self.blocks[level](state, coded, self.query_position, self.patch_position, self.mask)
            normed = self.norm(state.movedim(1, -1)).movedim(-1, 1)
            reconstructions.insert(0, self.heads[level](normed))
        return reconstructions

    def fuse(self, level_maps: Sequence[Tensor], config: UniASConfig | None = None) -> Tensor:
        """Multiply the levels' maps B×h_l×w_l, fine to coarse, that count (eq. 6); B×S×S.

        Raises:
            OptionError: they are too small to be blurred.
        """
        config = config or self.config
        side, count = self.input.side, len(level_maps)
        _check_blur(self.sizes, config)
        size = side if config.fuse_at == "input" else self.sizes[0]
        product = level_maps[0].new_ones(level_maps[0].shape[0], size, size)
        for number in config.levels or range(1, count + 1):
            level = upsample(level_maps[number - 1], size, align_corners=False)
            if config.level_blur:
                kernel = 3 + 2 * (count - number)
                level = gaussian_filter(level[:, None], kernel, kernel / 3)[:, 0]
            product = product * level
        return upsample(product, side, align_corners=True)  # this leaves maps of the input's size as they are

    def _filtered(self, features: FeatureMaps) -> tuple[list[Tensor], list[Tensor]]:
        """Return filtered maps, and filtered maps with what filtering took away, B×2C_l×h_l×w_l (eq. 2)."""
        raw = [features[f"level_{index}"] for index in range(len(features))]
        smooth = [gaussian_filter(level, FILTER_SIZE, FILTER_SIGMA) for level in raw]
        # the text takes the residual the other way round, which the first layer's weights make up for
        return smooth, [torch.cat([low, level - low], dim=1) for low, level in zip(smooth, raw)]


def reconstruction_terms(made: Tensor, target: Tensor, cos_sign: str) -> tuple[Tensor, Tensor]:
    """Return mean squared error and mean cosine term of one level, in float32 whatever autocast says.

    Args:
        made, target: B×C×h×w.
        cos_sign: "distance": 1 − cos; "legacy": cos, as one version of the released code has it.
    """
    with torch.autocast(made.device.type, enabled=False):
        made, target = made.float(), target.float()
        cosine = cosine_similarity(made, target, dim=1).mean()
        return mse_loss(made, target), cosine if cos_sign == "legacy" else 1 - cosine


def _level_sizes(encoder: CnnBackbone, config: UniASConfig) -> list[int]:
    """Return the heights of the encoder's (square) maps, fine to coarse, once they are known to fit.

    Raises:
        OptionError: they do not divide into the coarsest one's cells, or are too small for filters or mask.
    """
    side = config.input.side
    with torch.inference_mode():
        sizes = [level.shape[-1] for level in encoder(torch.zeros(1, 3, side, side))]
    coarsest = sizes[-1]
    if any(size % coarsest for size in sizes):
        raise OptionError(
            f"the maps of {config.backbone.name} for an input of {side} pixels have {sizes} cells a side, which do not "
            f"divide into those of the coarsest; set input.size (or crop, pad) to a multiple of {config.taps[-1]}"
        )
    if coarsest < 2:
        raise OptionError(f"an input of {side} pixels leaves maps of {sizes} cells a side, too few to filter them")
    _check_blur(sizes, config)
    if config.neighbours and config.neighbours // 2 >= coarsest // 2:  # then the centre sees nothing
        raise OptionError(
            f"neighbours={config.neighbours} hides all of the {coarsest}×{coarsest} token grid from its centre; "
            f"choose fewer, 0 for no mask, or a larger input"
        )
    if config.channel_attention and coarsest**2 % config.heads:
        raise OptionError(
            f"channel_attention needs a token grid ({coarsest}×{coarsest}) that divides into heads={config.heads}"
        )
    return sizes


def _check_blur(sizes: Sequence[int], config: UniASConfig) -> None:
    """Refuse to blur maps, one for each of the sizes, that are smaller than the blur's reach.

    Raises:
        OptionError: they are, and are to be blurred.
    """
    side = config.input.side
    blurred = side if config.fuse_at == "input" else sizes[0]
    if config.level_blur and blurred <= len(sizes):
        raise OptionError(f"an input of {side} pixels leaves maps of {list(sizes)} cells a side, too few to blur them")


def _patch_embedding(dim: int, ratio: int) -> nn.Module:
    """Make the layers from a level's map to patches of ratio×ratio cells, B×dim×h×w; wider in between the larger the
    patches are."""
    if ratio == 1:
        return nn.Conv2d(dim, dim, kernel_size=1)
    width = dim // 2 * ratio.bit_length()  # 256, 384, 512 for ratios 2, 4, 8, as published
    return nn.Sequential(
        nn.Conv2d(dim, width, kernel_size=ratio, stride=ratio),
        nn.Conv2d(width, dim, kernel_size=1),
    )


def _head(dim: int, channels: int, size: int, ratio: int, config: UniASConfig) -> nn.Module:
    """Make the layers from the token grid, B×dim×h×w, to a level's reconstruction, B×channels×size×size."""
    if config.head == "deconvolution":
        return nn.ConvTranspose2d(dim, channels, kernel_size=ratio, stride=ratio)
    return nn.Sequential(
        nn.Upsample(size=size, mode="bilinear", align_corners=True),
        nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        nn.Conv2d(dim, channels, kernel_size=3, padding=1),
    )

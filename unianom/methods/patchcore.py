"""PatchCore: a memory bank of locally averaged mid-level CNN features (Roth et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from unianom.backbones import CnnBackbone
from unianom.configs.patchcore import PatchCoreConfig
from unianom.errors import OptionError
from unianom.memory.device_search import DeviceBank
from unianom.memory.graph_search import GraphBank
from unianom.memory.index import MemoryBank
from unianom.memory.patch_distances import mean_distances
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures
from unianom.precision import full_precision


@register_method("patchcore")
class PatchCore(MemoryMethod[PatchCoreConfig]):
    """PatchCore with its bank, once fitted.

    Args:
        config: options.
        bank: the memory bank, where there is one already.
    """

    Config = PatchCoreConfig
    postprocess_options = ("neighbours", "reweight", "reweight_neighbours", "blur_sigma")

    def __init__(self, config: PatchCoreConfig, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.config = with_statistics(config)
        self.bank = bank
        self.encoder = CnnBackbone(config.backbone, config.taps)
        side = config.input.side
        with torch.inference_mode():
            finest = self.encoder(torch.zeros(1, 3, side, side))[0]
        self.grid = (finest.shape[2], finest.shape[3])
        pooling = pooling_kernels(self.encoder.channels, config.patch_size, config.dimension)
        self._first: list[int] = [first for first, _ in pooling]
        for number, (_, kernel) in enumerate(pooling):
            self.register_buffer(f"_kernel_{number}", kernel, persistent=False)

    def encode(self, images: Tensor) -> PatchFeatures:
        """Average neighbourhoods of the encoder's maps of B×3×S×S normalised images to patches B×N×dimension, without
        attention."""
        return PatchFeatures(self._pool(self.encoder(images)), None)

    def _pool(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Pool neighbourhoods of B×C×h×w maps, fine to coarse, on the finest grid, to B×N×dimension.

        Published are three steps, all of them linear and so one: neighbourhoods are pooled to `dimension` values each,
        maps interpolated to the finest, and the values of all maps pooled to `dimension` again.
        """
        parts = []
        with full_precision(feature_maps[0].device):
            for number, (first, feature_map) in enumerate(zip(self._first, feature_maps, strict=True)):
                kernel = self.get_buffer(f"_kernel_{number}")
                part = conv2d(feature_map, kernel, padding=self.config.patch_size // 2)  # B values h w
                if part.shape[2:] != self.grid:
                    part = interpolate(part, size=self.grid, mode="bilinear", align_corners=False)
                parts.append(pad(part, (0, 0, 0, 0, first, self.config.dimension - first - len(kernel))))
        pooled = sum(parts[1:], start=parts[0])
        return pooled.flatten(2).transpose(1, 2).contiguous()

    def raw_outputs(self, embedding: MaskedPatches, distances: Tensor, rows: Tensor) -> RawOutputs:
        """Make the raw outputs of what `nearest_vectors` found.

        Besides "distances" the tensors hold what eq. 7 needs of an image's peak, its patch of largest mean distance
        to the k nearest vectors, for k = 1…K: "peak" B×K×D, the patch; "peak_distance" B×K, squared, to its nearest
        vector m*; "peak_row" B×K, the bank's row of m*.
        """
        batch, _, count = distances.shape
        peak = torch.stack([mean_distances(distances, k + 1).argmax(1) for k in range(count)], dim=1)  # B K
        image = torch.arange(batch, device=distances.device)[:, None]
        tensors = {
            "peak": embedding.patches[image, peak],
            "peak_distance": distances[image, peak, 0],
            "peak_row": rows[image, peak, 0],
        }
        raw = super().raw_outputs(embedding, distances, rows)
        return raw._replace(tensors={**raw.tensors, **tensors})

    def deciding_patches(self, config: PatchCoreConfig | None = None) -> int:
        """One: the patch of largest mean distance."""
        return 1

    def check_bank(self, config: PatchCoreConfig | None = None) -> None:
        """Check the bank as every memory method does, and that it has the two vectors that re-weighted scores need."""
        super().check_bank(config)
        config = config or self.config
        rows = self.require_bank().rows
        if config.reweight and rows < 2:
            raise OptionError(
                f"reweight compares the nearest vector with others of the memory bank, which has only {rows}, so every "
                f"image would score 0; give the bank more by more images or a larger bank.coreset_ratio, or take "
                f"reweight=false"
            )

    def patch_scores(self, tensors: Mapping[str, Tensor], config: PatchCoreConfig | None = None) -> Tensor:
        """Take the largest squared distance of a patch, re-weighted (eq. 7) if so configured; B."""
        config = config or self.config
        distances = mean_distances(tensors["distances"], config.neighbours)  # B N
        if not config.reweight:
            return distances.amax(1)
        self.check_bank(replace(self.config, neighbours=1, reweight=True))
        bank = self.bank_on_device()
        where = torch.device("cpu") if bank is None else bank.device
        names = ("peak", "peak_distance", "peak_row")
        patch, nearest, row = (tensors[name][:, config.neighbours - 1].to(where) for name in names)
        if bank is not None:
            score = _reweighted_on_device(bank, patch, nearest, row, config.reweight_neighbours)
        else:
            score = torch.from_numpy(
                self._reweighted(patch.numpy(), nearest.numpy(), row.numpy(), config.reweight_neighbours)
            )
        return score.to(distances.device)

    def _reweighted(self, queries: np.ndarray, nearest: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
        """Return eq. 7, B float32: s = (1 − exp‖q−m*‖ / Σ_{m ∈ N_b(m*)} exp‖q−m‖) · ‖q−m*‖, with unsquared distances.

        Args:
            queries: B×D, the patch of largest distance of each image.
            nearest: B squared distances to the nearest bank vector m*.
            ids: B bank rows of m*.
            count: b.
        """
        bank = self.require_bank()
        near = min(count, bank.rows)
        _, neighbours = bank.search(bank.rows_at(ids), near)  # B b; m* is its own nearest
        to_neighbours = np.sqrt(((queries[:, None] - bank.rows_at(neighbours)) ** 2).sum(-1))  # B b
        to_nearest = np.sqrt(nearest)  # B
        # a shared factor cancels; taking out the largest exponent keeps exp finite
        largest = np.maximum(to_neighbours.max(1), to_nearest)
        share = np.exp(to_nearest - largest) / np.exp(to_neighbours - largest[:, None]).sum(1)
        return ((1 - share) * to_nearest).astype(np.float32)


def _reweighted_on_device(
    bank: DeviceBank | GraphBank, queries: Tensor, nearest: Tensor, ids: Tensor, count: int
) -> Tensor:
    """Return what `PatchCore._reweighted` does, on the device."""
    _, neighbours = bank.search(bank.rows_at(ids), min(count, bank.rows))  # B b
    to_neighbours = (queries[:, None] - bank.rows_at(neighbours)).square().sum(2).sqrt()  # B b
    to_nearest = nearest.sqrt()  # B
    largest = torch.maximum(to_neighbours.amax(1), to_nearest)
    share = (to_nearest - largest).exp() / (to_neighbours - largest[:, None]).exp().sum(1)
    return (1 - share) * to_nearest


def pooling_kernels(channels: Sequence[int], size: int, dimension: int) -> list[tuple[int, Tensor]]:
    """Return PatchCore's pooling of size×size neighbourhoods of several maps as convolutions whose results are added.

    Args:
        channels: of each map.
        size: odd, of the neighbourhoods.
        dimension: values that each map's neighbourhoods, and then those of all maps together, are pooled to.

    Returns:
        For each map the first of the pooled values that it has a part in, and the kernel, values×channels×size×size
        float32, of those from there on.
    """
    together = _averages(len(channels) * dimension, dimension)
    kernels = []
    for number, count in enumerate(channels):
        own = together[:, number * dimension : (number + 1) * dimension] @ _averages(count * size**2, dimension)
        touched = own.any(1).nonzero()
        first, last = int(touched[0]), int(touched[-1])
        kernels.append((first, own[first : last + 1].float().reshape(-1, count, size, size)))
    return kernels


def _averages(given: int, count: int) -> Tensor:
    """Return the matrix, count×given float64, by which `adaptive_avg_pool1d` averages values."""
    number, place = torch.arange(count)[:, None], torch.arange(given)
    inside = (place >= number * given // count) & (place < ((number + 1) * given + count - 1) // count)
    return inside / inside.sum(1, keepdim=True, dtype=torch.float64)

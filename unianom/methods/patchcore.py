"""PatchCore: a memory bank of locally averaged mid-level CNN features (Roth et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, unfold

from unianom.backbones import CnnBackbone
from unianom.configs.patchcore import PatchCoreConfig
from unianom.errors import OptionError
from unianom.memory.device_search import DeviceBank
from unianom.memory.index import MemoryBank
from unianom.memory.patch_distances import mean_distances
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures


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

    def encode(self, images: Tensor) -> PatchFeatures:
        """Average neighbourhoods of the encoder's maps of B×3×S×S normalised images to patches B×N×dimension, without
        attention."""
        pooled = [self._pool(feature_map) for feature_map in self.encoder(images)]  # each B N dimension
        patches = torch.stack(pooled, dim=2).flatten(2).unflatten(2, (self.config.dimension, len(pooled)))
        return PatchFeatures(average_in_order(list(patches.unbind(-1))), None)  # B N dimension

    def _pool(self, feature_map: Tensor) -> Tensor:
        """Pool neighbourhoods of B×C×h×w, on the finest grid, to B×N×dimension."""
        size = self.config.patch_size
        cells = unfold(feature_map, size, padding=size // 2)  # B C·size² h·w
        pooled = average_rows(cells, self.config.dimension).transpose(1, 2).contiguous()  # B h·w dimension
        if feature_map.shape[2:] == self.grid:
            return pooled
        # pooling and interpolation are both linear, so the order is free; pooled first, there is less to interpolate
        coarse = pooled.transpose(1, 2).unflatten(2, feature_map.shape[2:])  # B dimension h w
        finest = interpolate(coarse, size=self.grid, mode="bilinear", align_corners=False)
        return finest.flatten(2).transpose(1, 2)

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


def _reweighted_on_device(bank: DeviceBank, queries: Tensor, nearest: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return what `PatchCore._reweighted` does, on the device."""
    _, neighbours = bank.search(bank.rows_at(ids), min(count, bank.rows))  # B b
    to_neighbours = (queries[:, None] - bank.rows_at(neighbours)).square().sum(2).sqrt()  # B b
    to_nearest = nearest.sqrt()  # B
    largest = torch.maximum(to_neighbours.amax(1), to_nearest)
    share = (to_nearest - largest).exp() / (to_neighbours - largest[:, None]).exp().sum(1)
    return (1 - share) * to_nearest


def average_rows(rows: Tensor, count: int) -> Tensor:
    """Average B×P×N over P to B×count×N, in the bins of `adaptive_avg_pool1d` and to the same bits.

    Whole rows are added, where that function goes over memory in strides.
    """
    given = rows.shape[1]
    number = torch.arange(count, device=rows.device)
    start, end = number * given // count, ((number + 1) * given + count - 1) // count
    length = (end - start)[:, None]
    total = rows.index_select(1, start)
    for step in range(1, -(-given // count) + 1):
        inside = (step < length).to(rows.dtype)
        total.addcmul_(rows.index_select(1, (start + step).clamp(max=given - 1)), inside)
    return total.div_(length.to(rows.dtype))


def average_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Average tensors, added in their order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.div_(len(parts))

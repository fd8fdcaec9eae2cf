"""What every memory method is: patches, masks and a bank that is built rather than trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from unianom.configs.bank import BankConfig
from unianom.errors import ModelError, OptionError
from unianom.memory.bounded_search import search_largest
from unianom.memory.device_search import DeviceBank, Products
from unianom.memory.graph_search import GraphBank
from unianom.memory.index import BankWithoutImage, MemoryBank
from unianom.memory.patch_distances import mean_distances
from unianom.methods.base import Method, MethodConfig, Prediction, RawOutputs, ScoredImages, nan_where_not_finite
from unianom.methods.layers.postprocess import upsample, upsample_and_blur

LARGEST_SHARE = 0.5
"""Share of an image's patches that decide its score beyond which bounds save no time."""

LEAST_PRODUCTS = 2e8
"""Multiplications of a full search below which it is no slower than finding bounds."""

MAX_CELLS = 8
"""Cells a side of the embedding at most; as many as the bottleneck of RevDist has."""


class PatchFeatures(NamedTuple):
    """The output of a memory method's network for B images, before any patch is masked.

    Attributes:
        patches: B×N×D float32, row-major over the patch grid.
        attention: B×h×w float32, by which patches are masked; None where the method asks its network for none.
    """

    patches: Tensor
    attention: Tensor | None


class MaskedPatches(NamedTuple):
    """Patches of B images, and which of them count.

    Attributes:
        patches: B×N×D float32, row-major over the patch grid.
        keep: B×N bool; patches that enter the bank and count in scores.
    """

    patches: Tensor
    keep: Tensor


class MemoryConfig(MethodConfig, Protocol):
    """The options that every memory method has."""

    @property
    def bank(self) -> BankConfig:
        """Coreset and index."""
        ...

    @property
    def neighbours(self) -> int:
        """Bank vectors averaged in a patch's distance."""
        ...

    @property
    def blur_sigma(self) -> float:
        """Gaussian blur of the anomaly map, in pixels."""
        ...


B = TypeVar("B", bound=MemoryConfig)


class MemoryMethod(Method[B]):
    """A training-free method: it embeds images, and fitting it is building a bank of normal patches.

    Its image score comes from the distances of patches, not from the map: subclasses override `patch_scores`, and
    `deciding_patches` where few patches decide it.

    Attributes:
        bank: once fitted.
        grid: h and w of the patch grid.
        graph_bank: searched in place of the bank, where the method is exported as a graph; else it is not there.
        bank_options: dotted names of the options that act between network and bank: those of `mask_patches` and
            `mask_bank_patches`, and "bank", which stands for all of that group.
    """

    bank_options: ClassVar[tuple[str, ...]] = ("bank",)
    map_options: ClassVar[tuple[str, ...]] = ("neighbours", "blur_sigma")
    bank: MemoryBank | None = None
    grid: tuple[int, int]
    graph_bank: GraphBank
    _on_device: tuple[MemoryBank, DeviceBank] | None = None

    def encode(self, images: Tensor) -> PatchFeatures:
        """Run the network on B×3×S×S normalised images."""
        raise NotImplementedError

    def mask_patches(self, encoded: PatchFeatures, config: B | None = None) -> MaskedPatches:
        """Choose the patches that count: all, unless a method masks some.

        Args:
            encoded: of `encode`.
            config: options that differ from the method's own in `bank_options` only; None takes its own.
        """
        patches = encoded.patches
        return MaskedPatches(patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))

    def mask_bank_patches(self, encoded: PatchFeatures, config: B | None = None) -> MaskedPatches:
        """Choose the patches that count in images that go into the bank, as `mask_patches` does.

        Methods whose published code treats these images otherwise override this.
        """
        return self.mask_patches(encoded, config)

    @property
    def masks_bank_otherwise(self) -> bool:
        """Whether `mask_bank_patches` may choose other patches than `mask_patches` does."""
        return type(self).mask_bank_patches is not MemoryMethod.mask_bank_patches

    def embed(self, images: Tensor) -> MaskedPatches:
        """Return the patches of B×3×S×S normalised images, and which of them count."""
        return self.mask_patches(self.encode(images))

    def embed_for_bank(self, images: Tensor) -> MaskedPatches:
        """Return patches as `embed` does, of images that go into the bank."""
        return self.mask_bank_patches(self.encode(images))

    def forward(self, images: Tensor) -> RawOutputs:
        """Embed B×3×S×S normalised images and search the bank; see `search_bank`."""
        return self.search_bank(self.embed(images))

    def search_bank(self, embedding: MaskedPatches, neighbours: int | None = None) -> RawOutputs:
        """Search the bank.

        Args:
            embedding: of `mask_patches`.
            neighbours: K, how many vectors to find for each patch; None takes those of the config. Raw outputs serve
                all configs with that many or fewer.

        Returns:
            Tensor "distances", B×N×K squared distances to the K nearest vectors, ascending, 0 where a patch is not
            kept. The embedding is the patches, masked or not, on at most 8 × 8 cells.

        Raises:
            OptionError: the bank has fewer vectors.
            ModelError: there is no bank.
        """
        return self.raw_outputs(embedding, *self.nearest_vectors(embedding, neighbours))

    def raw_outputs(self, embedding: MaskedPatches, distances: Tensor, rows: Tensor) -> RawOutputs:
        """Make the raw outputs of what `nearest_vectors` found."""
        return RawOutputs({"distances": distances}, pooled_embedding(embedding.patches, self.grid))

    def nearest_vectors(self, embedding: MaskedPatches, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
        """Find the vectors of the bank that are nearest to patches; arguments and errors as of `search_bank`.

        Returns:
            Squared distances to them and their rows in the bank, both B×N×K, and 0 where a patch is not kept.
        """
        count = neighbours or self.config.neighbours
        self._check_neighbours(count)
        on_device = self.bank_on_device()
        if on_device is not None:
            return _nearest_on_device(on_device, embedding, count)
        keep = embedding.keep.cpu()  # B N
        distances = torch.zeros(*keep.shape, count)
        rows = torch.zeros(*keep.shape, count, dtype=torch.int64)
        queries = embedding.patches[embedding.keep]  # M D
        if len(queries):
            found, ids = self.require_bank().search(queries.float().cpu().numpy(), count)  # M K
            distances[keep], rows[keep] = torch.from_numpy(found), torch.from_numpy(ids)
        return distances.to(embedding.patches.device), rows.to(embedding.patches.device)

    def bank_on_device(self) -> DeviceBank | GraphBank | None:
        """Return the bank as it lies on the method's device, where it is searched there, see `Execution.search`, or as
        it lies in a graph; None where it is searched exactly, on the CPU, as a bank without one of its images always
        is.

        Matrix products are in bfloat16 where the encoder works in half precision, else in float32.

        Raises:
            OptionError: the search on the device was asked for, but the bank has inverted lists; or it does not fit.
            ModelError: there is no bank.
        """
        if hasattr(self, "graph_bank"):
            return self.graph_bank
        bank, device, search = self.require_bank(), self.device, self.execution.search
        if search == "exact" or (search == "auto" and device.type == "cpu") or isinstance(bank, BankWithoutImage):
            return None
        if bank.kind != "flat":
            if search == "auto":
                return None
            raise OptionError(
                f"search=device compares with all vectors, but this memory bank is of kind '{bank.kind}'; take "
                f"search=exact, or fit the model with bank.index=flat"
            )
        products: Products = "fp32" if self.config.backbone.precision == "fp32" else "bf16"
        if self._on_device is not None:
            of, held = self._on_device
            if of is bank and held.device == device and held.products == products:
                return held
        self._on_device = None  # memory is free before it is taken again
        held = DeviceBank(bank.vectors(), device, products)
        self._on_device = (bank, held)
        return held

    @torch.inference_mode()
    def score_images(self, images: Tensor) -> ScoredImages:
        """Score B×3×S×S normalised images as every method does; see `score_patches`."""
        self.check_images(images)
        scored = self.score_patches(self.embed(images))
        return replace(scored, score=nan_where_not_finite(scored.score, images))

    @torch.inference_mode()
    def score_patches(self, embedding: MaskedPatches) -> ScoredImages:
        """Score images by their patches. Scores are those of `search_bank`, bit for bit; where the bank has proposals,
        only the patches that can decide a score are searched in full, and the others of images that are predicted.

        Args:
            embedding: of `mask_patches`.

        Raises:
            OptionError, ModelError: as `search_bank`.
        """
        raw, predict = (self._search_deciding if self._bounds_pay(embedding) else self._search_all)(embedding)
        return ScoredImages(self.patch_scores(raw.tensors), raw.embedding, torch.inference_mode()(predict))

    def _search_all(self, embedding: MaskedPatches) -> tuple[RawOutputs, Callable[[Tensor], Prediction]]:
        """Return the raw outputs of images, and what predicts some of them."""
        raw = self.search_bank(embedding)

        def predict(rows: Tensor) -> Prediction:
            tensors = {name: tensor[rows] for name, tensor in raw.tensors.items()}
            return self.postprocess(RawOutputs(tensors, raw.embedding[rows]))

        return raw, predict

    def _search_deciding(self, embedding: MaskedPatches) -> tuple[RawOutputs, Callable[[Tensor], Prediction]]:
        """Return raw outputs of images that suffice for their scores, and what predicts some of them."""
        count = self.config.neighbours
        self._check_neighbours(count)
        found = search_largest(self.require_bank(), *embedding, count, self.deciding_patches())

        def predict(rows: Tensor) -> Prediction:
            return self.postprocess(self.search_bank(MaskedPatches(embedding.patches[rows], embedding.keep[rows])))

        return self.raw_outputs(embedding, *found), predict

    def _bounds_pay(self, embedding: MaskedPatches) -> bool:
        """Return whether a bounded search takes less time than a full one."""
        bank = self.require_bank()
        return (
            self.bank_on_device() is None
            and bank.proposals is not None
            and embedding.patches.device.type == "cpu"
            and embedding.patches.numel() * bank.rows >= LEAST_PRODUCTS
            and self.deciding_patches() <= LARGEST_SHARE * embedding.keep.shape[1]
        )

    def deciding_patches(self, config: B | None = None) -> int:
        """Return how many patches an image's score is made of, those of largest mean distance: all, unless a method
        takes fewer.

        Args:
            config: options that differ from the method's own in `postprocess_options` only; None takes its own.
        """
        return self.grid[0] * self.grid[1]

    def patch_scores(self, tensors: Mapping[str, Tensor], config: B | None = None) -> Tensor:
        """Compute image scores of raw outputs, B; arguments and errors as of `anomaly_maps`.

        The distances of patches that are not among the `deciding_patches` may be larger than they are, as long as they
        stay out of these.
        """
        raise NotImplementedError

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: B | None = None) -> Tensor:
        """Compute image scores as every method does; the map plays no part."""
        return self.patch_scores(tensors, config)

    @torch.inference_mode()
    def score_without_image(self, embedding: MaskedPatches, image: int, added: np.ndarray | None = None) -> float:
        """Return the score that an image has by a bank without the vectors of one image of the bank: of an image of the
        bank itself, its leave-one-out score.

        Args:
            embedding: of `mask_patches`, of a single image.
            image: number of the image that is left out, among those of the bank's `origins`.
            added: A×D float32, vectors that take the place of its own.

        Raises:
            ModelError: there is no bank, or it does not know the origins of its vectors.
            OptionError: without that image it has fewer vectors than scores need.
        """
        bank = self.require_bank()
        self.bank = bank.without_image(image, added)
        try:
            self.check_bank()
            return float(self.score_patches(embedding).score)
        finally:
            self.bank = bank

    def patch_distances(self, embedding: MaskedPatches) -> Tensor:
        """Return the mean squared distance of each patch to its `neighbours` nearest vectors of the bank, B×N float32;
        0 where the patch is not kept. Errors as of `search_bank`."""
        return mean_distances(self.nearest_vectors(embedding)[0], self.config.neighbours)

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: B | None = None) -> tuple[Tensor, Tensor]:
        """Upsample the patches' mean distances and blur them."""
        config = config or self.config
        distances = mean_distances(tensors["distances"], config.neighbours)  # B N
        cells = distances.unflatten(1, self.grid)
        side = self.input.side
        return upsample_and_blur(cells, side, config.blur_sigma), upsample(cells, side, align_corners=False)

    def check_bank(self, config: B | None = None) -> None:
        """Check that the bank holds as many vectors as scores need.

        Args:
            config: options to score with; None takes the method's own.

        Raises:
            OptionError: it holds fewer.
            ModelError: there is no bank.
        """
        self._check_neighbours((config or self.config).neighbours)

    def _check_neighbours(self, count: int) -> None:
        rows = self.require_bank().rows
        if count > rows:
            raise OptionError(
                f"neighbours={count}, but the memory bank has only {rows} vectors; lower it, or give the bank more by "
                f"more images or a larger bank.coreset_ratio"
            )

    def require_bank(self) -> MemoryBank:
        """Return the bank.

        Raises:
            ModelError: there is none; says how to get one.
        """
        if self.bank is None:
            raise ModelError(f"{self.name} has no memory bank yet; fit it with jobs/train.py {self.name}")
        return self.bank


def _nearest_on_device(bank: DeviceBank | GraphBank, embedding: MaskedPatches, count: int) -> tuple[Tensor, Tensor]:
    """Return what `MemoryMethod.nearest_vectors` does. Patches that are not kept are searched, too: to pick out the
    others the host would have to wait for their number."""
    patches, keep = embedding.patches, embedding.keep[:, :, None]  # B N 1
    found = bank.search(patches.flatten(0, 1).float().to(bank.device), count)  # B·N K
    distances, rows = (part.unflatten(0, patches.shape[:2]).to(patches.device) for part in found)
    return torch.where(keep, distances, 0), torch.where(keep, rows, 0)


def pooled_embedding(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return patches B×N×D, row-major over their grid, as a feature map B×D×h×w, averaged so that it has no more than
    8 × 8 cells: the embedding of a memory method."""
    cells = patches.transpose(1, 2).unflatten(2, grid)
    return adaptive_avg_pool2d(cells, (min(grid[0], MAX_CELLS), min(grid[1], MAX_CELLS)))

"""What every method is: one interface, one registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from unianom.backbones import weight_statistics
from unianom.configs import CONFIGS
from unianom.data.image import InputPolicy
from unianom.errors import ModelError, OptionError
from unianom.memory.index import MemoryBank
from unianom.methods.layers.maps import grid_to_map, pooled_embedding, upsampled_grid


class Prediction(NamedTuple):
    """What a method says of B images.

    Attributes:
        anomaly_map: B×H×W float32 at input resolution; higher is more anomalous; raw, on the method's own scale.
        score: B float32; the image score, raw.
    """

    anomaly_map: Tensor
    score: Tensor


class Inspection(NamedTuple):
    """All that a method finds out about B images; what calibration needs besides the prediction.

    Attributes:
        anomaly_map, score: as in `Prediction`.
        unsmoothed: B×S×S float32; the anomaly map before its final smoothing; the map itself where nothing smooths it.
        features: B×C×h×w; the method's own embedding of the images, φ(x) in CADA. Each method says what it is.
    """

    anomaly_map: Tensor
    score: Tensor
    unsmoothed: Tensor
    features: Tensor


class RawOutputs(NamedTuple):
    """What a network finds in B images, before any option comes in that is cheap to choose otherwise.

    Attributes:
        raw_outputs: by name, each B×… float32 or int64; small, grids and levels rather than maps of the input's size.
            Each method says which.
        features: B×C×h×w, as in `Inspection`.
    """

    raw_outputs: dict[str, Tensor]
    features: Tensor


class Maps(NamedTuple):
    """Anomaly maps of B images, B×S×S float32, as in `Inspection`."""

    anomaly_map: Tensor
    unsmoothed: Tensor


class PatchFeatures(NamedTuple):
    """What the network of a memory method makes of B images, before any patch is masked.

    Attributes:
        patches: B×N×D float32, row-major over the patch grid.
        attention: B×h×w float32, by which patches are masked; None where the method asks its network for none.
    """

    patches: Tensor
    attention: Tensor | None


class MaskedPatches(NamedTuple):
    """What a memory method makes of B images.

    Attributes:
        patches: B×N×D float32, row-major over the patch grid.
        keep: B×N bool; patches that enter the bank and count in scores.
    """

    patches: Tensor
    keep: Tensor


class Method(nn.Module):
    """A visual anomaly detection method.

    Subclasses set `name` and `Config`, and take one `Config` in their constructor.

    What comes after the network is apart from it, so that these options can be varied without running it again:
    `forward` runs it, `anomaly_maps` and `image_scores` make maps and scores of what it finds.

    Attributes:
        config: the frozen options, all resolved (no value left to a preset or a backbone).
        postprocess_options: dotted names of the options that act in `anomaly_maps` and `image_scores` and nowhere else.
        map_options: those of them that change the maps, and so maybe the score; the others change the score alone.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    postprocess_options: ClassVar[tuple[str, ...]] = ()
    map_options: ClassVar[tuple[str, ...]] = ()
    config: Any

    @property
    def input(self) -> InputPolicy:
        """How images become this method's input."""
        return self.config.input

    @property
    def device(self) -> torch.device:
        """Where the method's parameters lie."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> RawOutputs:
        """What the network finds in B×3×S×S normalised images that were checked."""
        raise NotImplementedError

    def anomaly_maps(self, raw_outputs: Mapping[str, Tensor], config: Any = None) -> Maps:
        """Anomaly maps from what was found, on the device it lies on.

        Args:
            raw_outputs: of `forward`.
            config: options that differ from the method's own in `postprocess_options` only; None takes its own.

        Raises:
            OptionError: what was found does not suffice for these options.
        """
        raise NotImplementedError

    def image_scores(self, raw_outputs: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor:
        """Image scores, B.

        Args:
            raw_outputs, config: as of `anomaly_maps`.
            anomaly_map: B×S×S, what `anomaly_maps` makes of them; the same for all options that are no `map_options`.

        Raises:
            OptionError: as `anomaly_maps`.
        """
        raise NotImplementedError

    def inspect(self, images: Tensor) -> Inspection:
        """Maps, scores and embeddings of B×3×S×S normalised images that were checked. The result does not depend on
        which images share a batch."""
        return self.read(self.forward(images))

    def read(self, found: RawOutputs, config: Any = None) -> Inspection:
        """All that is to be known of the images in which this was found; `config` as of `anomaly_maps`."""
        anomaly_map, unsmoothed = self.anomaly_maps(found.raw_outputs, config)
        score = self.image_scores(found.raw_outputs, anomaly_map, config)
        return Inspection(anomaly_map, score, unsmoothed, found.features)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """Anomaly maps and image scores of B×3×S×S normalised images. The result does not depend on which images share
        a batch.

        Raises:
            OptionError: not a batch of this method's input.
            ModelError: the method is not fitted.
        """
        self.check_images(images)
        found = self.inspect(images)
        return Prediction(found.anomaly_map, found.score)

    def size_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Before weights are loaded: give buffers whose size training decides the size they have in `state`."""

    def check_images(self, images: Tensor) -> None:
        """Refuse what is not a batch of this method's input.

        Raises:
            OptionError: wrong shape or type, or a value that is not finite.
        """
        side = self.input.side
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or images.dtype != torch.float32:
            given = f"{tuple(images.shape)} {images.dtype}"
            raise OptionError(f"{self.name} takes images of shape B×3×{side}×{side} float32, got {given}")
        if not torch.isfinite(images.sum()):  # one pass; any NaN or infinity reaches the sum
            raise OptionError(f"{self.name} got images with NaN or infinite values; check decoding and mean/std")


class MemoryMethod(Method):
    """A training-free method: it embeds images, and fitting it is building a bank of normal patches.

    Its configs have the options `neighbours` and `blur_sigma`.

    Attributes:
        bank: once fitted.
        grid: h and w of the patch grid.
        bank_options: dotted names of the options that act between network and bank: those of `mask_patches` and
            `mask_bank_patches`, and "bank", which stands for all of that group.
    """

    bank_options: ClassVar[tuple[str, ...]] = ("bank",)
    map_options: ClassVar[tuple[str, ...]] = ("neighbours", "blur_sigma")
    bank: MemoryBank | None = None
    grid: tuple[int, int]

    def encode(self, images: Tensor) -> PatchFeatures:
        """What the network alone makes of B×3×H×W normalised images."""
        raise NotImplementedError

    def mask_patches(self, encoded: PatchFeatures, config: Any = None) -> MaskedPatches:
        """Patches, and which of them count: all, unless a method masks some.

        Args:
            encoded: of `encode`.
            config: options that differ from the method's own in `bank_options` only; None takes its own.
        """
        patches = encoded.patches
        return MaskedPatches(patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))

    def mask_bank_patches(self, encoded: PatchFeatures, config: Any = None) -> MaskedPatches:
        """As `mask_patches`, for images that go into the bank; methods whose published code treats them otherwise
        override."""
        return self.mask_patches(encoded, config)

    def embed(self, images: Tensor) -> MaskedPatches:
        """Patches of B×3×H×W normalised images, and which of them count."""
        return self.mask_patches(self.encode(images))

    def embed_for_bank(self, images: Tensor) -> MaskedPatches:
        """As `embed`, for images that go into the bank."""
        return self.mask_bank_patches(self.encode(images))

    def forward(self, images: Tensor) -> RawOutputs:
        return self.search_bank(self.embed(images))

    def search_bank(self, embedding: MaskedPatches, neighbours: int | None = None) -> RawOutputs:
        """Search in the bank.

        Args:
            embedding: of `mask_patches`.
            neighbours: K, how many vectors to find for each patch; None takes those of the config. Raw outputs serve
                all configs with that many or fewer.

        Returns:
            Raw outputs "distances", B×N×K squared distances to the K nearest vectors, ascending, 0 where a patch is not
            kept. Features are the patches, masked or not, on at most 8 × 8 cells.

        Raises:
            ModelError: there is no bank.
        """
        distances, _ = self._search(embedding, neighbours)
        return RawOutputs({"distances": distances}, pooled_embedding(embedding.patches, self.grid))

    def _search(self, embedding: MaskedPatches, neighbours: int | None) -> tuple[Tensor, Tensor]:
        """Squared distances of patches to their K nearest vectors of the bank, and the rows of these; both B×N×K, and 0
        where a patch is not kept."""
        count = neighbours or self.config.neighbours
        self._check_neighbours(count)
        keep = embedding.keep.cpu()  # B N
        distances = torch.zeros(*keep.shape, count)
        rows = torch.zeros(*keep.shape, count, dtype=torch.int64)
        queries = embedding.patches[embedding.keep]  # M D
        if len(queries):
            found, ids = self.require_bank().search(queries.float().cpu().numpy(), count)  # M K
            distances[keep], rows[keep] = torch.from_numpy(found), torch.from_numpy(ids)
        return distances.to(embedding.patches.device), rows.to(embedding.patches.device)

    def anomaly_maps(self, raw_outputs: Mapping[str, Tensor], config: Any = None) -> Maps:
        """The patches' mean distances as maps."""
        config = config or self.config
        distances = mean_distances(raw_outputs["distances"], config.neighbours)  # B N
        cells = distances.unflatten(1, self.grid)
        side = self.config.input.side
        return Maps(grid_to_map(cells, side, config.blur_sigma), upsampled_grid(cells, side))

    def score_patches(self, embedding: MaskedPatches) -> Inspection:
        """Maps and scores from patches: search in the bank, then the method's own scoring."""
        return self.read(self.search_bank(embedding))

    def patch_distances(self, embedding: MaskedPatches) -> Tensor:
        """Mean squared distance of each patch to its `neighbours` nearest vectors of the bank, B×N float32; 0 where the
        patch is not kept.

        Raises:
            ModelError: there is no bank.
        """
        return mean_distances(self._search(embedding, None)[0], self.config.neighbours)

    def check_bank(self, config: Any = None) -> None:
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
        """The bank, or an error that says how to get one."""
        if self.bank is None:
            raise ModelError(f"{self.name} has no memory bank yet; fit it with jobs/train.py {self.name}")
        return self.bank


def mean_distances(distances: Tensor, neighbours: int) -> Tensor:
    """Mean of the first of K distances; B×N×K to B×N.

    Raises:
        OptionError: there are fewer than `neighbours`.
    """
    found = distances.shape[2]
    if neighbours > found:
        raise OptionError(f"neighbours={neighbours}, but only {found} were searched; search for that many")
    # the search gives its results on the CPU; a mean taken there does not differ by device
    return distances[:, :, :neighbours].cpu().contiguous().mean(2).to(distances.device)


METHODS: dict[str, type[Method]] = {}
"""Every method by the name used on the command line and in model folders."""

M = TypeVar("M", bound=type[Method])


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by `name`."""

    def register(cls: M) -> M:
        if name in METHODS:
            raise ValueError(f"two methods are named {name}")
        cls.name = name
        METHODS[name] = cls
        CONFIGS.setdefault(name, cls.Config)
        return cls

    return register


def with_statistics(config: Any) -> Any:
    """The config with the input's mean and std filled in from the backbone where they are null."""
    if config.input.mean is not None and config.input.std is not None:
        return config
    mean, std = weight_statistics(config.backbone)
    policy = dataclasses.replace(config.input, mean=config.input.mean or mean, std=config.input.std or std)
    return dataclasses.replace(config, input=policy)

"""Images embedded once, for protocols that fit and score many banks of the same images.

    shards ─▶ actors: decode, embed, mask ─▶ cached patches of both splits ─▶ any bank, any scoring

All protocols and draws with the same encoder share the cache. Patches are the very ones that jobs/train.py and
jobs/score.py would make: with batches of one image to the last bit, with larger batches up to the rounding of the
forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from pipelines.data.extractors import Extractor
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.data.patch_matrix import KEEP, PATCHES, KeptPatches, PatchMatrix
from pipelines.evaluation.options import EmbeddingOptions
from pipelines.runtime.models import make_memory_method
from pipelines.training.per_category import weights_digest
from unianom import files
from unianom.data.shards import Selection, ShardSet
from unianom.errors import OptionError
from unianom.methods import MaskedPatches
from unianom.model import Model
from unianom.options import to_plain

Side = Literal["train", "test"]

COLUMNS = ("sample_id", "category", "defect", "label")
"""What is known of an embedded image."""


def embed_once(
    name: str, config: Any, options: EmbeddingOptions, shards: ShardSet, selections: dict[Side, Selection]
) -> EmbeddedImages:
    """Embed the images of both sides, or find them embedded.

    Args:
        name, config: a memory method and its options; those of its bank play no part.
        options: where, and on what.
        shards: the images.
        selections: which go into banks ("train") and which are scored ("test").

    Raises:
        OptionError: the method's patches depend on what shares their batch.
        DataError: an image cannot be read, or its patches are not finite.
    """
    check_scope(config, options.batch_size)
    plain = to_plain(config)
    del plain["bank"]
    cache = FeatureCache.below(
        files.full_uri(options.embeddings or files.beside(options.output, "embeddings")),
        "embeddings",
        {side: SampleSource(shards, selection, options.limits) for side, selection in selections.items()},
        {"method": name, "config": plain, "weights": weights_digest(config.backbone.name, config.backbone.weights)},
        options.runtime,
        options.batch_size,
    )

    def encoder() -> Model:
        return Model(make_memory_method(name, config), shards.categories)

    extractors: dict[str, Extractor] = {
        side: KeptPatches(cache.encoder, for_bank=side == "train") for side in selections
    }
    cache.fill(extractors, options.batch_size, options.runtime, "embed", encoder)
    return EmbeddedImages(cache, shards, selections)


def check_scope(config: Any, batch_size: int) -> None:
    """Refuse options with which the patches of an image depend on what shares its batch.

    Raises:
        OptionError: they do.
    """
    if getattr(config, "mask_scope", "image") == "batch" and batch_size > 1:
        raise OptionError(
            "with method.mask_scope=batch patches depend on what shares their batch, so images cannot be embedded once "
            "for all banks; give --batch_size 1, or --method.mask_scope image"
        )


class EmbeddedImages:
    """Reads embedded images: patches for banks, and embeddings to score, without the network.

    Args:
        cache: a filled one.
        shards: whose images they are.
        selections: which of them, by side.

    Attributes:
        shards: whose images they are.
        encoder: model folder, without a bank, of the method that embedded them.
    """

    def __init__(self, cache: FeatureCache, shards: ShardSet, selections: dict[Side, Selection]) -> None:
        self.shards, self.encoder = shards, cache.encoder
        self._selections, self._features = selections, CachedFeatures(cache.uri)

    @cached_property
    def _samples(self) -> dict[Side, dict[str, list[dict[str, Any]]]]:
        """`COLUMNS` of every image, by side and part of the cache."""
        found: dict[Side, dict[str, list[dict[str, Any]]]] = {}
        for side, selection in self._selections.items():
            rows = iter(self.shards.table(selection, COLUMNS).to_pylist())  # in the order of the cache
            parts = self._features.parts_of(side)
            found[side] = {part: list(islice(rows, self._features.rows(part))) for part in parts}
        return found

    def samples(self, side: Side) -> list[dict[str, Any]]:
        """Return `COLUMNS` of every image of a side, in the order of the parts."""
        return [row for rows in self._samples[side].values() for row in rows]

    def patches_of(self, chosen: frozenset[str]) -> PatchMatrix:
        """Return the kept patches of some training images, by sample_id, as a fit on these alone would have them.

        Raises:
            DataError: not a single patch was kept.
        """
        arrays = []
        for part, rows in self._samples["train"].items():
            inside = [number for number, row in enumerate(rows) if row["sample_id"] in chosen]
            if not inside:
                continue
            patches, ends = self._patches(part)
            if inside[-1] - inside[0] + 1 == len(inside):  # in a row, so they need not be copied from the disk
                arrays.append(patches[ends[inside[0]] : ends[inside[-1] + 1]])
            else:
                arrays.append(np.concatenate([patches[ends[number] : ends[number + 1]] for number in inside]))
        return PatchMatrix(arrays)

    def batches(
        self, batch_size: int, categories: tuple[str, ...] = ()
    ) -> Iterator[tuple[list[dict[str, Any]], MaskedPatches]]:
        """Return test images and their embeddings, at most `batch_size` at once, in the order of the parts.

        Args:
            batch_size: how many at once.
            categories: those to give; empty for all.

        Yields:
            `COLUMNS` of B images, and B×N×D patches with B×N keep; patches that were not kept are zero.
        """
        for part, rows in self._samples["test"].items():
            inside = [n for n, row in enumerate(rows) if not categories or row["category"] in categories]
            if not inside:
                continue
            patches, ends = self._patches(part)
            keep = self._features.array(part, KEEP)
            for start in range(0, len(inside), batch_size):
                numbers = inside[start : start + batch_size]
                own = keep[numbers]  # B N
                filled = np.zeros((*own.shape, patches.shape[1]), np.float32)
                filled[own] = np.concatenate([patches[ends[number] : ends[number + 1]] for number in numbers])
                yield [rows[n] for n in numbers], MaskedPatches(torch.from_numpy(filled), torch.from_numpy(own))

    def _patches(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the patches of a part, and where those of each image begin, with the end of the last."""
        counts = self._features.array(part, KEEP).sum(1)
        return self._features.array(part, PATCHES), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

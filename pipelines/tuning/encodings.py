"""Images encoded once for all the memory banks of a campaign: patches and attention as the network gives them, before
masking, coreset and search.

    shards, validation images ─▶ actors: the network ─▶ cached patches and attention ─▶ any mask, any bank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch, finite
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import SampleSource, ValidationSource
from pipelines.data.patch_matrix import PATCHES, PatchMatrix
from pipelines.runtime.models import input_policy, make_memory_method, memory_method, memory_method_class
from pipelines.training.options import FitOptions
from pipelines.training.per_category import weights_digest
from unianom.data.image import InputPolicy
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.methods import MaskedPatches, MemoryMethod, Method, PatchFeatures
from unianom.model import Model
from unianom.options import to_plain

LEARNED, COMPARED = "learned", "compared"
"""Groups of encoded images: those that banks are made of, and those that settings are compared on."""

ATTENTION = "attention"
"""Name of the array of attention, n×h×w float32, beside the patches, n×N×D float32; not there where the network is not
asked for it."""

MASKED_AT_ONCE = 32
"""Images that are masked at once."""


@dataclass(frozen=True)
class EncodedPatches:
    """All patches of images, and the attention that masks them. An `Extractor`.

    Attributes:
        model: folder of a memory method, without a bank.
    """

    model: str

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = memory_method(load(self.model))

        def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
            encoded = method.encode(images)
            attention = {} if encoded.attention is None else {ATTENTION: encoded.attention.float()}
            return {PATCHES: encoded.patches.float(), **attention}

        def arrays(batch: ImageBatch, found: Arrays) -> Arrays:
            error = f"patches of {batch.part} hold NaN or infinite values; use --method.backbone.precision fp32"
            finite(found[PATCHES], error)
            return found

        return BatchFunction(method.input, arrays, network, method.device)


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images, and of which images they are.

    Attributes:
        cache: where they lie.
        validation_set: URI of the images that settings are compared on.
    """

    cache: FeatureCache
    validation_set: str

    @property
    def encoder(self) -> str:
        """Model folder, without a bank, of the method that encoded them."""
        return self.cache.encoder

    def bank_patches(self, method: MemoryMethod, config: Any) -> PatchMatrix:
        """Return the patches of the images learned from that masking by `config` keeps, in the order of jobs/train.py.

        Args:
            method: the method that encoded them.
            config: its options that masking goes by.

        Raises:
            DataError: not a single patch is kept.
        """
        arrays, features = [], self.cache.open()
        for part in features.parts_of(LEARNED):
            kept = [one.patches[one.keep].numpy() for one in _masked(features, part, method.mask_bank_patches, config)]
            if kept:
                # one array a part, for products of other shapes differ in their last bits, and so may the coreset
                arrays.append(np.concatenate(kept))
        return PatchMatrix(arrays)

    def compared_patches(self, method: MemoryMethod, config: Any) -> Iterator[MaskedPatches]:
        """Return the patches of the images that settings are compared on, in order; arguments as `bank_patches`."""
        features = self.cache.open()
        for part in features.parts_of(COMPARED):
            yield from _masked(features, part, method.mask_patches, config)


def _masked(
    features: CachedFeatures, part: str, mask: Callable[[PatchFeatures, Any], MaskedPatches], config: Any
) -> Iterator[MaskedPatches]:
    if not features.rows(part):
        return
    patches = features.array(part, PATCHES)
    attention = features.array(part, ATTENTION) if features.has(part, ATTENTION) else None
    for start in range(0, len(patches), MASKED_AT_ONCE):
        some = slice(start, start + MASKED_AT_ONCE)
        own = None if attention is None else torch.from_numpy(np.array(attention[some]))
        yield mask(PatchFeatures(torch.from_numpy(np.array(patches[some])), own), config)


def encode_once(
    name: str,
    config: Any,
    options: FitOptions,
    shards: ShardSet,
    categories: list[str],
    learn: frozenset[str],
    validation_set: str,
    folder: str,
) -> EncodedImages:
    """Encode the images that banks are made of and those that they are compared on, or find them encoded.

    Args:
        name, config: a memory method and its options; those of masking, bank and reading play no part.
        options: batches, limits and actors.
        shards, categories, learn: images of the bank.
        validation_set: from `build_validation_set`.
        folder: below which encoded images are kept.

    Raises:
        DataError: an image cannot be read, or its patches are not finite.
    """
    selection = Selection(("train",), tuple(categories), (NORMAL,))
    cache = FeatureCache.below(
        folder,
        "encodings",
        {
            LEARNED: SampleSource(shards, selection, options.limits, learn),
            COMPARED: ValidationSource(validation_set),
        },
        {
            "method": name,
            "config": network_part(name, config),
            "attention": getattr(config, "mask", "off") != "off",
            "weights": weights_digest(config.backbone.name, config.backbone.weights),
        },
        options.runtime,
        options.batch_size,
    )

    def encoder() -> Model:
        return Model(make_memory_method(name, config), categories)

    extractor = EncodedPatches(cache.encoder)
    cache.fill({LEARNED: extractor, COMPARED: extractor}, options.batch_size, options.runtime, "encode", encoder)
    return EncodedImages(cache, validation_set)


def network_part(name: str, config: Any) -> dict[str, Any]:
    """Return the options of a memory method that its patches and attention depend on, as plain data."""
    method = memory_method_class(name)
    plain: dict[str, Any] = to_plain(config)
    for option in [*method.bank_options, *method.postprocess_options]:
        plain.pop(option, None)
    return plain

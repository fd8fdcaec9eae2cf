"""Images encoded once for all the memory banks of a campaign: patches and attention as the network gives them, before
masking, coreset and search.

    shards, validation images ─▶ actors: the network ─▶ patches and attention, one file each ─▶ any mask, any bank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipelines.data.reader import SampleReader
from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.training.memory_bank import PatchMatrix
from pipelines.training.options import FitOptions
from pipelines.training.per_category import weights_digest
from unianom import __version__, files
from unianom.data.image import ImageLimits
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS, MaskedPatches, MemoryMethod, PatchFeatures
from unianom.model import Model, is_model
from unianom.options import to_plain

LEARNED, COMPARED = "learned", "compared"
"""Kinds of encoded images: those that banks are made of, and those that settings are compared on."""

IMAGES_PER_UNIT = 128
"""Validation images encoded by one task."""


@dataclass(frozen=True)
class EncodingSet:
    """Where encoded images lie, and of which images they are.

    Attributes:
        uri: their folder.
        shards, categories: the corpus.
        learn: sample_ids of the images that banks are made of.
        validation_set: URI of the images that settings are compared on.
    """

    uri: str
    shards: ShardSet
    categories: tuple[str, ...]
    learn: frozenset[str]
    validation_set: str

    @property
    def encoder(self) -> str:
        """Model folder, without a bank, of the method that encoded them."""
        return files.join(self.uri, "encoder")


def encode_once(
    name: str,
    config: Any,
    options: FitOptions,
    shards: ShardSet,
    categories: list[str],
    learn: frozenset[str],
    validation_set: str,
    folder: str,
) -> EncodingSet:
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
    plan = {
        "tool": __version__,
        "method": name,
        "config": network_part(name, config),
        "attention": getattr(config, "mask", "off") != "off",
        "weights": weights_digest(config.backbone.weights),
        "shards": shards.digest,
        "categories": categories,
        "learn": sorted(learn),
        "proxy": validation_set.rsplit("/", 1)[-1],
        "batch_size": options.batch_size,
        "limits": to_plain(options.limits),
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    uri = files.join(folder, files.digest_of(plan)[:20])
    made = EncodingSet(uri, shards, tuple(categories), learn, validation_set)
    with outputs.open_cache(uri, "encodings", plan) as complete:
        if complete:
            return made
        if not is_model(made.encoder):
            with memory_limit(f"--method: {name}"):
                Model(METHODS[name](config), categories).save(made.encoder)
        compared = len(ValidationSet(validation_set))
        tasks: dict[str, dict[str, Any]] = {}
        for part in shards.parts:
            tasks[patch_name(LEARNED, part)] = {"kind": LEARNED, "part": part}
        for start in range(0, compared, IMAGES_PER_UNIT):
            tasks[patch_name(COMPARED, str(start))] = {"kind": COMPARED, "part": str(start)}
        _encode(made, options, tasks, len(learn) + compared)
        outputs.finish(uri, {"learned": len(learn), "compared": compared})
        return made


def network_part(name: str, config: Any) -> dict[str, Any]:
    """The options of a memory method that its patches and attention depend on, as plain data."""
    method = METHODS[name]
    assert issubclass(method, MemoryMethod)
    plain = to_plain(config)
    for option in [*method.bank_options, *method.postprocess_options]:
        plain.pop(option, None)
    return plain


def _encode(made: EncodingSet, options: FitOptions, tasks: dict[str, dict[str, Any]], images: int) -> None:
    arguments = {
        "made": made,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    run_unfinished(PartEncoder, arguments, tasks, made.uri, options.runtime, Progress("encode", images), "images")


def patch_name(kind: str, part: str) -> str:
    """Name of the patches of a part of the images."""
    return f"{kind}-{part.removesuffix('.parquet')}.npy"


def attention_name(kind: str, part: str) -> str:
    """Name of their attention."""
    return f"{kind}-{part.removesuffix('.parquet')}-attention.npy"


class PartEncoder:
    """Writes patches n×N×D float32, and attention n×h×w float32 where there is one, of a part. A `PartTask`."""

    def __init__(self, made: EncodingSet, batch_size: int, limits: ImageLimits, device: str, threads: int) -> None:
        method = load_model(made.encoder, device).method
        assert isinstance(method, MemoryMethod)
        self._method, self._made = method, made
        self._batch_size, self._limits, self._threads = batch_size, limits, threads

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Encode a part and commit it."""
        kind, part = task["kind"], task["part"]
        patches, attention = [], []
        for images in self._batches(kind, part):
            encoded = self._method.encode(images)
            patches.append(encoded.patches.float().cpu().numpy())
            if encoded.attention is not None:
                attention.append(encoded.attention.float().cpu().numpy())
        made = np.concatenate(patches) if patches else np.zeros((0, 0, 0), np.float32)
        if not np.isfinite(made).all():
            raise DataError(f"patches of {part} hold NaN or infinite values; use --method.backbone.precision fp32")
        if attention:
            files.write_array(files.join(self._made.uri, attention_name(kind, part)), np.concatenate(attention))
        name = patch_name(kind, part)
        files.write_array(files.join(self._made.uri, name), made)
        record = {"name": name, "images": len(made)}
        outputs.commit_part(self._made.uri, name, record)
        return record

    def _batches(self, kind: str, part: str) -> Iterator[torch.Tensor]:
        method, made = self._method, self._made
        if kind == COMPARED:
            validation_set = ValidationSet(made.validation_set)
            first = int(part)
            yield from validation_set.batches(
                self._batch_size, method.input, method.device, first, first + IMAGES_PER_UNIT
            )
            return
        selection = Selection(("train",), made.categories, (NORMAL,))
        reader = SampleReader(made.shards, selection, made.learn, self._batch_size, self._limits, self._threads)
        yield from reader.batches(part, method)


class EncodingReader:
    """Reads encoded images as any mask leaves them.

    Args:
        made: a finished set.

    Attributes:
        method: the method that encoded them, on the CPU, without a bank.
    """

    def __init__(self, made: EncodingSet) -> None:
        self._made = made
        self._copies = TemporaryDirectory(prefix="unianom-encodings-")

    @cached_property
    def method(self) -> MemoryMethod:
        method = load_model(self._made.encoder, "cpu").method
        assert isinstance(method, MemoryMethod)
        return method

    def bank_patches(self, config: Any) -> PatchMatrix:
        """The patches of the images learned from that masking by `config` keeps, in the order of jobs/train.py."""
        arrays = []
        for part in self._made.shards.parts:
            kept = [one.patches[one.keep].numpy() for one in self._embeddings(LEARNED, part, config)]
            if kept:
                # one array a part, for products of other shapes differ in their last bits, and so may the coreset
                arrays.append(np.concatenate(kept))
        return PatchMatrix(arrays)

    def compared(self, config: Any) -> Iterator[MaskedPatches]:
        """Embeddings of the images that settings are compared on, in order."""
        for start in range(0, len(ValidationSet(self._made.validation_set)), IMAGES_PER_UNIT):
            yield from self._embeddings(COMPARED, str(start), config)

    def _embeddings(self, kind: str, part: str, config: Any) -> Iterator[MaskedPatches]:
        patches = self._open(patch_name(kind, part))
        name = attention_name(kind, part)
        attention = self._open(name) if files.exists(files.join(self._made.uri, name)) else None
        keep = self.method.mask_bank_patches if kind == LEARNED else self.method.mask_patches
        for start in range(0, len(patches), 32):
            some = slice(start, start + 32)
            own = None if attention is None else torch.from_numpy(np.array(attention[some]))
            yield keep(PatchFeatures(torch.from_numpy(np.array(patches[some])), own), config)

    def _open(self, name: str) -> np.ndarray:
        return files.map_array(files.join(self._made.uri, name), Path(self._copies.name))

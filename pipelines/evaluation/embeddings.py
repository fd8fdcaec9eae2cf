"""Images embedded once, for protocols that fit and score many banks of the same images.

    shards ─▶ actors: decode, embed, mask ─▶ patch files of both splits, one per part ─▶ any bank, any scoring

A set lies below its content key (shards, method, input …), so all protocols and draws with the same encoder share it,
and a killed run continues. Patches are the very ones that jobs/train.py and jobs/score.py would make: with batches of
one image to the last bit, with larger batches up to the rounding of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from pipelines.data.reader import SampleReader
from pipelines.evaluation.options import EmbeddingOptions
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.training.memory_bank import PatchMatrix
from pipelines.training.per_category import weights_digest
from unianom import __version__, files
from unianom.data.image import ImageLimits
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS, MaskedPatches, MemoryMethod
from unianom.model import Model, is_model
from unianom.options import to_plain

Side = Literal["train", "test"]

COLUMNS = ("sample_id", "category", "defect", "label")
"""What is known of an embedded image."""


@dataclass(frozen=True)
class EmbeddingSet:
    """A finished set of embedded images.

    Attributes:
        uri: its folder.
        shards: whose images.
        selections: which of them, by side.
    """

    uri: str
    shards: ShardSet
    selections: dict[Side, Selection]

    @property
    def encoder(self) -> str:
        """Model folder, without a bank, that embedded them."""
        return files.join(self.uri, "encoder")


def embed_once(
    name: str, config: Any, options: EmbeddingOptions, shards: ShardSet, selections: dict[Side, Selection]
) -> EmbeddingSet:
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
    _check_scope(config, options.batch_size)
    plain = to_plain(config)
    del plain["bank"]
    plan = {
        "tool": __version__,
        "method": name,
        "config": plain,
        "weights": weights_digest(config.backbone.weights),
        "shards": shards.digest,
        "selections": to_plain(selections),
        "batch_size": options.batch_size,
        "limits": to_plain(options.limits),
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    folder = files.full_uri(options.embeddings or files.beside(options.output, "embeddings"))
    uri = files.join(folder, files.digest_of(plan)[:20])
    made = EmbeddingSet(uri, shards, selections)
    with outputs.open_cache(uri, "embeddings", plan) as complete:
        if complete:
            return made
        if not is_model(made.encoder):
            with memory_limit(f"--method: {name}"):
                Model(METHODS[name](config), shards.categories).save(made.encoder)
        arguments = {
            "embedded": made,
            "batch_size": options.batch_size,
            "limits": options.limits,
            "device": options.runtime.device,
            "threads": options.runtime.cpus_per_worker,
        }
        tasks = {patch_file(part, side): {"part": part, "side": side} for part in shards.parts for side in selections}
        progress = Progress("embed", sum(shards.count(selection) for selection in selections.values()))
        run_unfinished(PartEmbedder, arguments, tasks, uri, options.runtime, progress, "images")
        outputs.finish(uri, {"images": {side: shards.count(selection) for side, selection in selections.items()}})
        return made


def _check_scope(config: Any, batch_size: int) -> None:
    if getattr(config, "mask_scope", "image") == "batch" and batch_size > 1:
        raise OptionError(
            "with method.mask_scope=batch patches depend on what shares their batch, so images cannot be embedded once "
            "for all banks; give --batch_size 1, or --method.mask_scope image"
        )


def patch_file(part: str, side: str) -> str:
    """Name of the file of kept patches of one part and side."""
    return f"{part.removesuffix('.parquet')}-{side}.npy"


def keep_file(part: str, side: str) -> str:
    """Name of the file that tells which patches of each image were kept."""
    return f"{part.removesuffix('.parquet')}-{side}-keep.npy"


class PartEmbedder:
    """Writes the kept patches (M×D float32) of one part and side, and which they are (n×N bool). A `PartTask`.

    Args:
        embedded: the set to write to.
        batch_size: images in one forward pass.
        limits: what an image may cost.
        device: where the network runs.
        threads: images decoded at the same time, ahead of the network.
    """

    def __init__(self, embedded: EmbeddingSet, batch_size: int, limits: ImageLimits, device: str, threads: int) -> None:
        method = load_model(embedded.encoder, device).method
        assert isinstance(method, MemoryMethod)
        self._method, self._embedded = method, embedded
        self._batch_size, self._limits, self._threads = batch_size, limits, threads

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write both files of a part and side, and their record."""
        part, side = task["part"], task["side"]
        shards, selection = self._embedded.shards, self._embedded.selections[side]
        chosen = frozenset(row["sample_id"] for row in _rows(shards, part, selection))
        reader = SampleReader(shards, selection, chosen, self._batch_size, self._limits, self._threads)
        embed = self._method.embed_for_bank if side == "train" else self._method.embed
        kept, keep = [], []
        for batch in reader.batches(part, self._method):
            embedding = embed(batch)
            kept.append(embedding.patches[embedding.keep].float().cpu().numpy())
            keep.append(embedding.keep.cpu().numpy())
        patches = np.concatenate(kept) if kept else np.zeros((0, 0), np.float32)
        if not np.isfinite(patches).all():
            raise DataError(f"patches of {part} hold NaN or infinite values; use --method.backbone.precision fp32")
        folder, name = self._embedded.uri, patch_file(part, side)
        keeps = np.concatenate(keep) if keep else np.zeros((0, 0), bool)
        files.write_array(files.join(folder, keep_file(part, side)), keeps)
        files.write_array(files.join(folder, name), patches)
        record = {"name": name, "images": len(chosen), "rows": len(patches)}
        outputs.commit_part(folder, name, record)
        return record


def _rows(shards: ShardSet, part: str, selection: Selection) -> list[dict[str, Any]]:
    return [row for batch in shards.read(part, selection, list(COLUMNS)) for row in batch.to_pylist()]


class EmbeddingReader:
    """Reads an embedding set: patches for banks, and embeddings to score, without the network.

    Args:
        embedded: a finished set.

    Attributes:
        shards: whose images they are.
    """

    def __init__(self, embedded: EmbeddingSet) -> None:
        self.shards = embedded.shards
        self._embedded = embedded
        self._copies = TemporaryDirectory(prefix="unianom-embeddings-")
        self._samples = {
            side: {part: _rows(embedded.shards, part, selection) for part in embedded.shards.parts}
            for side, selection in embedded.selections.items()
        }

    def samples(self, side: Side) -> list[dict[str, Any]]:
        """`COLUMNS` of every image of a side, in the order of the parts."""
        return [row for rows in self._samples[side].values() for row in rows]

    def patches_of(self, chosen: frozenset[str]) -> PatchMatrix:
        """Kept patches of some training images, by sample_id, as a fit on these alone would have them.

        Raises:
            DataError: not a single patch was kept.
        """
        arrays = []
        for part, rows in self._samples["train"].items():
            inside = [number for number, row in enumerate(rows) if row["sample_id"] in chosen]
            if not inside:
                continue
            patches, ends = self._patches(part, "train")
            if inside[-1] - inside[0] + 1 == len(inside):  # in a row, so they need not be copied from the disk
                arrays.append(patches[ends[inside[0]] : ends[inside[-1] + 1]])
            else:
                arrays.append(np.concatenate([patches[ends[number] : ends[number + 1]] for number in inside]))
        return PatchMatrix(arrays)

    def batches(
        self, batch_size: int, categories: tuple[str, ...] = ()
    ) -> Iterator[tuple[list[dict[str, Any]], MaskedPatches]]:
        """Test images and their embeddings, at most `batch_size` at once, in the order of the parts.

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
            patches, ends = self._patches(part, "test")
            keep = self._open(keep_file(part, "test"))
            for start in range(0, len(inside), batch_size):
                numbers = inside[start : start + batch_size]
                own = keep[numbers]  # B N
                filled = np.zeros((*own.shape, patches.shape[1]), np.float32)
                filled[own] = np.concatenate([patches[ends[number] : ends[number + 1]] for number in numbers])
                yield [rows[n] for n in numbers], MaskedPatches(torch.from_numpy(filled), torch.from_numpy(own))

    def _patches(self, part: str, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """Patches of a part, and where those of each image begin, with the end of the last."""
        counts = self._open(keep_file(part, side)).sum(1)
        return self._open(patch_file(part, side)), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _open(self, name: str) -> np.ndarray:
        return files.map_array(files.join(self._embedded.uri, name), Path(self._copies.name))

"""Fitting a memory method: normal images → patches → coreset → bank → threshold → model folder.

    shards ─▶ actors: decode, embed, mask ─▶ patch files, one per part ─▶ coreset ─▶ bank ─▶ scores of held-out
    normals ─▶ threshold ─▶ model folder

Patch files are made by part with fixed batches and threads, and read in the order of the parts, so the bank is the
same, bit for bit, whatever the number of workers. They stay until the model is written, so a killed run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipelines.data.reader import SampleReader
from pipelines.data.splits import TrainValSplit, choose_samples, held_out_record
from pipelines.runtime import outputs
from pipelines.runtime.actors import connect, run_unfinished
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.training.options import WORK, FitOptions
from pipelines.training.per_category import FitResult, FitTask, fit_all, open_models, plan_fits, weights_digest
from pipelines.training.threshold import held_out_threshold
from unianom import files
from unianom.configs.bank import BankConfig
from unianom.data.image import ImageLimits
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.memory.coreset import greedy_coreset, random_projection
from unianom.memory.index import MemoryBank
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS, MemoryMethod
from unianom.model import Model, is_model, versions
from unianom.options import to_plain


def fit_banks(name: str, config: Any, options: FitOptions) -> list[FitResult]:
    """Fit one model for all categories, or one each.

    Args:
        name: a memory method.
        config: its options.
        options: data, output and the rest.

    Raises:
        DataError, OptionError, WeightsError: wrong inputs; nothing is lost, the same command continues.
    """
    tasks = plan_banks(name, config, options)
    with open_models(tasks, options):
        return fit_planned_banks(name, tasks, options)


def plan_banks(name: str, config: Any, options: FitOptions) -> list[FitTask]:
    """Plan what `fit_banks` fits; arguments and errors are the same."""
    weights = cache(weights_digest)

    def describe(own: Any, shards: ShardSet, categories: list[str]) -> tuple[TrainValSplit, str, dict[str, Any]]:
        chosen, notice = choose_samples(shards, categories, options.split)
        plan = {
            "method": name,
            "config": to_plain(own),
            "shards": shards.digest,
            "categories": categories,
            "few_shot": options.few_shot,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "threshold": to_plain(options.threshold),
            "limits": to_plain(options.limits),
            "device": options.runtime.device,
            "threads": options.runtime.cpus_per_worker,
            "weights": weights(own.backbone.weights),
        }
        return chosen, notice, plan

    return plan_fits(config, options, describe)


def fit_planned_banks(name: str, tasks: Sequence[FitTask], options: FitOptions) -> list[FitResult]:
    """Fit what `plan_banks` planned, in folders that are claimed."""
    return fit_all(tasks, options, partial(_fit, name, options))


def _fit(name: str, options: FitOptions, task: FitTask, digest: str) -> FitResult:
    config, shards, categories, output = task.config, task.shards, task.categories, task.output
    chosen, notice = task.chosen, task.notice
    if is_model(output):
        return _result(load_model(output, "cpu"), output, False, 0.0)
    work = files.join(output, WORK)
    encoder = files.join(work, "encoder")
    if not is_model(encoder):
        with memory_limit(f"--method: {name}"):
            Model(METHODS[name](config), categories).save(encoder)
    connect(options.runtime)
    rate = _embed(encoder, shards, chosen.learn, categories, work, options)
    method = load_model(encoder, "cpu").method
    assert isinstance(method, MemoryMethod)
    with TemporaryDirectory(prefix="unianom-patches-") as copies:
        patches = PatchFiles(work, shards.parts, Path(copies))
        method.bank, radius = build_bank(patches, config.bank)
        method.check_bank()
        patch_count = patches.rows
    fitted = files.join(work, "fitted")
    threshold = held_out_threshold(Model(method, categories), fitted, shards, chosen.held_out, options)
    provenance = {
        "plan_digest": digest,
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "bank": {
            "images": len(chosen.learn),
            "patches": patch_count,
            "rows": method.bank.rows,
            "cover_radius": radius,
        },
        "held_out_normals": len(chosen.held_out),
        "held_out": held_out_record(shards, categories, options.split),
        "notice": notice,
        "seeds": {"split": options.seed, "coreset": config.bank.seed},
        "few_shot": options.few_shot,
        "device": options.runtime.device,
        "versions": versions(),
    }
    model = Model(method, categories, threshold, provenance)
    model.save(output)
    files.remove(work)
    return _result(model, output, True, rate)


def _result(model: Model, output: str, fresh: bool, rate: float) -> FitResult:
    made = model.provenance["bank"]
    metrics = {key: made[key] for key in ("images", "patches", "rows", "cover_radius")}
    return FitResult(
        folder=output,
        categories=model.categories,
        fresh=fresh,
        summary=f"{made['images']} normal images, {made['patches']} patches, bank of {made['rows']}",
        metrics={**metrics, "images_per_second": rate} if fresh else metrics,
        threshold=model.threshold,
        notice=model.provenance["notice"],
    )


def _embed(
    encoder: str, shards: ShardSet, chosen: frozenset[str], categories: list[str], work: str, options: FitOptions
) -> float:
    """Write the patch files of all parts that have none yet; returns images per second."""
    arguments = {
        "encoder": encoder,
        "shards": shards,
        "selection": Selection(("train",), tuple(categories), (NORMAL,)),
        "chosen": chosen,
        "work": work,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    tasks = {patch_part(part): {"part": part} for part in shards.parts}
    progress = Progress("embed", len(chosen))
    return run_unfinished(PartEmbedder, arguments, tasks, work, options.runtime, progress, "images")[1]


def patch_part(part: str) -> str:
    """Name of the patch file of a shard part."""
    return part.removesuffix(".parquet") + ".npy"


class PartEmbedder:
    """Writes the kept patches of one part's chosen images as a .npy file of M×D float32. A `PartTask`."""

    def __init__(
        self,
        encoder: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        work: str,
        batch_size: int,
        limits: ImageLimits,
        device: str,
        threads: int,
    ) -> None:
        self._model = load_model(encoder, device)
        self._reader = SampleReader(shards, selection, chosen, batch_size, limits, threads)
        self._work = work

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one patch file and its record."""
        method = self._model.method
        assert isinstance(method, MemoryMethod)
        kept: list[np.ndarray] = []
        images = 0
        for batch in self._reader.batches(task["part"], method):
            embedding = method.embed_for_bank(batch)
            kept.append(embedding.patches[embedding.keep].float().cpu().numpy())
            images += len(batch)
        patches = np.concatenate(kept) if kept else np.zeros((0, 0), np.float32)
        if not np.isfinite(patches).all():
            raise DataError(f"patches of {task['part']} hold NaN or infinite values; use backbone.precision=fp32")
        name = patch_part(task["part"])
        files.write_array(files.join(self._work, name), patches)
        record = {"name": name, "images": images, "rows": len(patches)}
        outputs.commit_part(self._work, name, record)
        return record


class PatchMatrix:
    """Patches in several arrays, in order, as one matrix of M×D float32; memory-mapped ones stay on disk.

    Args:
        arrays: each m×D float32.

    Raises:
        DataError: not a single patch was kept.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = [array for array in arrays if len(array)]
        if not self._arrays:
            raise DataError(
                "masking left no patch for the bank; lower --method.mask_threshold or take --method.mask off"
            )
        self.rows = sum(len(array) for array in self._arrays)
        self.dimension = int(self._arrays[0].shape[1])

    def projected(self, dimension: int, seed: int) -> np.ndarray:
        """Every row in fewer dimensions, M×dimension; 0 leaves them as they are."""
        if dimension == 0:
            return np.concatenate(self._arrays)
        matrix = random_projection(self.dimension, dimension, seed=seed)
        return np.concatenate([array @ matrix for array in self._arrays])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """TrainValSplit rows, in the order of `indices`."""
        starts = np.cumsum([0, *(len(array) for array in self._arrays)])
        taken = np.empty((len(indices), self.dimension), np.float32)
        for number, array in enumerate(self._arrays):
            inside = (indices >= starts[number]) & (indices < starts[number + 1])
            taken[inside] = array[indices[inside] - starts[number]]
        return taken


class PatchFiles(PatchMatrix):
    """The patch files of all parts, in order, as one matrix that stays on disk.

    Args:
        work: folder of the patch files.
        parts: shard parts, in order.
        copies: local folder to fetch the files to, where they lie on an object store.

    Raises:
        DataError: not a single patch was kept.
    """

    def __init__(self, work: str, parts: list[str], copies: Path) -> None:
        super().__init__([files.map_array(files.join(work, patch_part(part)), copies) for part in parts])


def build_bank(patches: PatchMatrix, config: BankConfig) -> tuple[MemoryBank, float]:
    """Choose the coreset and index it; also the cover radius in the projected space."""
    count = max(1, int(config.coreset_ratio * patches.rows))
    radius = 0.0
    indices = np.arange(patches.rows)
    if count < patches.rows:
        progress = Progress("coreset", count, "patches")
        chosen = greedy_coreset(
            patches.projected(config.projection, config.seed),
            count,
            config.seed,
            config.start_points,
            progress=lambda done, _: progress.set(done),
        )
        progress.close()
        indices, radius = chosen.indices, chosen.radius
    # ascending rows, so that equal distances fall to the earliest patch whatever the order of choice
    vectors = patches.take(np.sort(indices))
    metadata = {
        "coreset_ratio": config.coreset_ratio,
        "projection": config.projection,
        "start_points": config.start_points,
        "seed": config.seed,
        "patches": patches.rows,
        "cover_radius": radius,
    }
    bank = MemoryBank.build(
        vectors,
        shards=config.shards,
        kind=config.index,
        nlist=config.nlist,
        nprobe=config.nprobe,
        seed=config.seed,
        metadata=metadata,
    )
    return bank, radius

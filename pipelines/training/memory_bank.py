"""Fitting a memory method: normal images → patches → coreset → bank → threshold → model folder.

    shards ─▶ actors: decode, embed, mask ─▶ cached patches ─▶ coreset ─▶ bank ─▶ scores of held-out normals, or of all
    images of the bank without their own vectors ─▶ threshold ─▶ model folder

Patches are computed by range with fixed batches and threads, and read in the order of the shards, so the bank is the
same, bit for bit, whatever the number of workers. They stay until the model is written, so a killed run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from pipelines.data.feature_cache import FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.data.listed_shards import planned_source
from pipelines.data.patch_matrix import KEEP, PATCHES, KeptPatches, PatchMatrix
from pipelines.data.splits import LEFT_OUT, TrainValSplit, choose_samples, held_out_record
from pipelines.runtime.models import load_memory_method, load_model, make_memory_method
from pipelines.runtime.progress import Progress
from pipelines.training.leave_one_out import score_left_out
from pipelines.training.options import WORK, FitOptions
from pipelines.training.per_category import FitResult, FitTask, fit_all, open_models, plan_fits, weights_digest
from pipelines.training.threshold import score_held_out, set_thresholds
from unianom import files
from unianom.configs.bank import BankConfig
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.execution import CPU
from unianom.memory.coreset import greedy_coreset
from unianom.memory.cover import cover_without_images
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.model import Model, is_model, versions
from unianom.options import to_plain

TOO_FEW_VECTORS = (
    "no threshold: without the vectors of one image the bank has fewer of others than scores need; add normal images, "
    "raise --method.bank.coreset_ratio, or take --threshold.source held_out"
)
"""Notice of a model whose images have no leave-one-out scores."""


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


def plan_banks(name: str, config: Any, options: FitOptions, shards: ShardSet | None = None) -> list[FitTask]:
    """Plan what `fit_banks` fits; arguments and errors are the same.

    Args:
        name, config, options: see there.
        shards: the images; None opens those of the options.
    """
    make_memory_method(name, config)
    weights = cache(weights_digest)

    def describe(own: Any, shards: ShardSet, categories: list[str]) -> tuple[TrainValSplit, str, dict[str, Any]]:
        if own != config:
            make_memory_method(name, own)
        chosen, notice = choose_samples(shards, categories, options.split)
        plan = {
            "method": name,
            "config": to_plain(own),
            **planned_source(shards),
            "categories": categories,
            "few_shot": options.few_shot,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "threshold": to_plain(options.threshold),
            "limits": to_plain(options.limits),
            **options.runtime.execution.plan,
            "threads": options.runtime.cpus_per_worker,
            "weights": weights(own.backbone.name, own.backbone.weights),
        }
        return chosen, notice, plan

    return plan_fits(config, options, describe, shards=shards)


def fit_planned_banks(name: str, tasks: Sequence[FitTask], options: FitOptions) -> list[FitResult]:
    """Fit what `plan_banks` planned, in folders that are claimed."""
    return fit_all(tasks, options, partial(_fit, name, options))


def _fit(name: str, options: FitOptions, task: FitTask, digest: str) -> FitResult:
    config, shards, categories, output = task.config, task.shards, task.categories, task.output
    chosen, notice = task.chosen, task.notice
    if is_model(output):
        return _result(load_model(output, CPU), output, False, 0.0)
    work = files.join(output, WORK)
    embedded, rate = _embed(name, task, files.join(work, "patches"), options)
    method = load_memory_method(embedded.encoder, CPU)
    cached = embedded.open()
    patches = PatchMatrix(cached.arrays(PATCHES))
    rows = shards.table(_normals(categories), ["sample_id", "category"]).to_pylist()
    images = [row for row in rows if row["sample_id"] in chosen.learn]  # in the order of the cache
    counts = np.concatenate([keep.sum(1) for keep in cached.arrays(KEEP)])
    came_from = np.repeat(np.arange(len(images), dtype=np.int32), counts)
    origins = Origins(tuple(row["sample_id"] for row in images), came_from)
    indices, radius = choose_coreset(patches, config.bank)
    method.bank = index_coreset(patches, indices, radius, config.bank, origins)
    method.check_bank()
    model = Model(method, categories)
    if chosen.held_out or (chosen.source == LEFT_OUT and len(images) > 1):
        fitted = files.join(work, "fitted")
        model.save(fitted)
        if chosen.source == LEFT_OUT:
            scored, added = embedded, files.join(work, "added.npy")
            if method.masks_bank_otherwise:
                scored, _ = _embed(name, task, files.join(work, "scored_patches"), options, for_bank=False)
            files.write_array(added, _added(patches, indices, radius, config.bank, origins))
            names = [row["category"] for row in images]
            found = score_left_out(fitted, scored, embedded, added, names, options.runtime)
            notice = TOO_FEW_VECTORS if found is None else notice
        else:
            folder = files.join(work, "held_out")
            found = score_held_out(fitted, shards, chosen.held_out, categories, options, folder)
        if found is not None:
            set_thresholds(model, found, options.threshold)
    provenance = {
        "plan_digest": digest,
        "shards": {"digest": shards.digest},  # not where they lie: a copy elsewhere makes the same model
        "bank": {
            "images": len(chosen.learn),
            "patches": patches.rows,
            "rows": method.bank.rows,
            "cover_radius": radius,
        },
        "held_out_normals": len(chosen.held_out),
        "held_out": held_out_record(shards, categories, options.split),
        "notice": notice,
        "seeds": {"split": options.seed, "coreset": config.bank.seed},
        "few_shot": options.few_shot,
        **options.runtime.execution.plan,
        "versions": versions(),
    }
    model.provenance = provenance
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
        category_thresholds=model.category_thresholds,
        notice=model.provenance["notice"],
    )


def _normals(categories: Sequence[str]) -> Selection:
    return Selection(("train",), tuple(categories), (NORMAL,))


def _added(patches: PatchMatrix, chosen: np.ndarray, radius: float, config: BankConfig, origins: Origins) -> np.ndarray:
    """Return which patches take the place of an image's chosen ones: A×2, numbers of images, ascending, and rows."""
    if len(chosen) == patches.rows:
        return np.empty((0, 2), np.int64)
    features = patches.projected(config.projection, config.seed)
    added = cover_without_images(features, chosen, origins.rows, len(origins.images), radius)
    return np.concatenate([np.column_stack([np.full(len(rows), image), rows]) for image, rows in enumerate(added)])


def _embed(
    name: str, task: FitTask, folder: str, options: FitOptions, for_bank: bool = True
) -> tuple[FeatureCache, float]:
    """Cache the patches of the images to learn from in a folder of unfinished work; also images per second."""
    config, selection = task.config, _normals(task.categories)
    embedded = FeatureCache.below(
        folder,
        "patches",
        {"": SampleSource(task.shards, selection, options.limits, task.chosen.learn)},
        {"method": name, "config": to_plain(config), "weights": task.plan["weights"]},
        options.runtime,
        options.batch_size,
    )

    def encoder() -> Model:
        return Model(make_memory_method(name, config), task.categories)

    extractor = KeptPatches(embedded.encoder, for_bank)
    return embedded, embedded.fill(
        {"": extractor}, options.batch_size, options.runtime, "embed", encoder, temporary=True
    )


def build_bank(patches: PatchMatrix, config: BankConfig) -> tuple[MemoryBank, float]:
    """Choose the coreset and index it; also the cover radius in the projected space."""
    indices, radius = choose_coreset(patches, config)
    return index_coreset(patches, indices, radius, config), radius


def choose_coreset(patches: PatchMatrix, config: BankConfig) -> tuple[np.ndarray, float]:
    """Return the rows of the patches that are kept, ascending, and the cover radius in the projected space."""
    count = max(1, int(config.coreset_ratio * patches.rows))
    if count == patches.rows:
        return np.arange(patches.rows), 0.0
    progress = Progress("coreset", count, "patches")
    chosen = greedy_coreset(
        patches.projected(config.projection, config.seed),
        count,
        config.seed,
        config.start_points,
        progress=lambda done, _: progress.set(done),
    )
    progress.close()
    # ascending rows, so that equal distances fall to the earliest patch whatever the order of choice
    return np.sort(chosen.indices), chosen.radius


def index_coreset(
    patches: PatchMatrix, indices: np.ndarray, radius: float, config: BankConfig, origins: Origins | None = None
) -> MemoryBank:
    """Return the bank of chosen patches.

    Args:
        patches: of all images.
        indices, radius: of `choose_coreset`.
        config: of the bank.
        origins: the image of each patch, where the bank is to know those of its vectors.
    """
    metadata = {
        "coreset_ratio": config.coreset_ratio,
        "projection": config.projection,
        "start_points": config.start_points,
        "seed": config.seed,
        "patches": patches.rows,
        "cover_radius": radius,
    }
    return MemoryBank.build(
        patches.take(indices),
        shards=config.shards,
        kind=config.index,
        nlist=config.nlist,
        nprobe=config.nprobe,
        seed=config.seed,
        metadata=metadata,
        origins=None if origins is None else Origins(origins.images, origins.rows[indices]),
        proposals=True,
    )

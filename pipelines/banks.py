"""Fitting a memory method: normal images → patches → coreset → bank → threshold → model folder.

    shards ─▶ actors: decode, embed, mask ─▶ patch files, one per part ─▶ coreset ─▶ bank ─▶ scores of held-out
    normals ─▶ threshold ─▶ model folder

Patch files are made by part with fixed batches and threads, and read in the order of the parts, so the bank is the
same, bit for bit, whatever the number of workers. They stay until the model is written, so a killed run continues.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.ingest import map_ahead
from pipelines.models import load_model, write_index
from pipelines.runtime import Progress, RuntimeOptions, connect, run_units
from unianom import files
from unianom.data.image import ImageLimits, decode_prepared, normalise
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot, hold_out
from unianom.errors import DataError, OptionError
from unianom.memory.coreset import greedy_coreset, random_projection
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod
from unianom.methods.layers.bank import BankConfig
from unianom.model import Model, is_model, versions
from unianom.serialise import to_plain
from unianom.thresholds import Threshold, fit_threshold, normals_needed, smallest_supported_rate

WORK = "_work"
"""Folder below the model folder where unfinished work lies."""

USUAL_FPR = 0.05


@dataclass(frozen=True)
class ThresholdOptions:
    """How the decision threshold is chosen, from normal images that are in no bank and no training batch.

    Args:
        target_fpr: highest share of normal images that may fail; null aims at 0.05 and leaves the model without a
            threshold, saying so, where the held-out normals cannot support that.
        confidence: probability that the promise holds.
        validation_fraction: share of each category's normal training images held out where the shards have no "val"
            split; 0 for none, and then no threshold.
    """

    target_fpr: float | None = None
    confidence: float = 0.95
    validation_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.target_fpr is not None and not 0 < self.target_fpr < 1:
            raise OptionError(f"threshold.target_fpr={self.target_fpr} must be in (0, 1)")
        if not 0 < self.confidence < 1:
            raise OptionError(f"threshold.confidence={self.confidence} must be in (0, 1)")
        if not 0 <= self.validation_fraction < 1:
            raise OptionError(f"threshold.validation_fraction={self.validation_fraction} must be in [0, 1)")


@dataclass(frozen=True)
class BankOptions:
    """What fitting a memory method needs besides the method's own options.

    Args:
        shards: shard set; path or URI.
        output: model folder to write; path or URI.
        categories: those to fit on; empty for all.
        per_category: one model for each category, in folders below `output`, instead of one for all.
        few_shot: normal images per category, drawn with `seed`; null takes all.
        seed: of the held-out normals and the few-shot draw. The coreset has its own, method.bank.seed.
        batch_size: images in one forward pass.
        overwrite: replace another model in the output.
        threshold: how the decision threshold is chosen.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
    """

    shards: str
    output: str
    categories: tuple[str, ...] = ()
    per_category: bool = False
    few_shot: int | None = None
    seed: int = 0
    batch_size: int = 8
    overwrite: bool = False
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.few_shot is not None and self.few_shot < 1):
            raise OptionError("batch_size and few_shot must be positive")


@dataclass(frozen=True)
class FitResult:
    """One fitted model.

    Attributes:
        folder: its model folder.
        categories: those it was fitted on.
        fresh: whether this run wrote it.
        images: images in the bank.
        patches: patches that the bank was chosen from.
        bank_rows: vectors in the bank.
        cover_radius: largest distance of a patch to the bank, in the space the coreset was chosen in.
        threshold: the stored threshold, or None.
        notice: why there is no threshold, else "".
        images_per_second: of the embedding; 0 if it was not run.
    """

    folder: str
    categories: list[str]
    fresh: bool
    images: int
    patches: int
    bank_rows: int
    cover_radius: float
    threshold: Threshold | None
    notice: str
    images_per_second: float


def fit_banks(name: str, config: Any, options: BankOptions) -> list[FitResult]:
    """Fit one model for all categories, or one each.

    Args:
        name: a memory method.
        config: its options.
        options: data, output and the rest.

    Raises:
        DataError, OptionError, WeightsError: wrong inputs; nothing is lost, the same command continues.
    """
    shards = ShardSet.open(options.shards)
    shards.check(Selection(("train",), options.categories, (NORMAL,)))
    categories = list(options.categories) or shards.categories
    output = files.full_uri(options.output)
    if not options.per_category:
        return [_fit(name, config, options, shards, categories, output)]
    results = [_fit(name, config, options, shards, [category], files.join(output, category)) for category in categories]
    write_index(output, {category: category for category in categories})
    return results


@dataclass(frozen=True)
class _Chosen:
    """Which samples go into the bank, and which are held out for the threshold."""

    bank: frozenset[str]
    held_out: frozenset[str]


def choose_samples(shards: ShardSet, categories: list[str], options: BankOptions) -> tuple[_Chosen, str]:
    """Split the normal training images into bank and held-out ones; also why there will be no threshold, or "".

    Raises:
        OptionError: the held-out normals cannot support an explicitly given target rate.
        DataError: a category has no normal training image.
    """
    columns = ["sample_id", "category", "split"]
    normals = shards.table(Selection(("train", "val"), tuple(categories), (NORMAL,)), columns).to_pylist()
    train = [row for row in normals if row["split"] == "train"]
    empty = sorted(set(categories) - {row["category"] for row in train})
    if empty:
        raise DataError(f"{shards.uri} has no normal training image of category {', '.join(empty)}")
    held_out = frozenset(row["sample_id"] for row in normals if row["split"] == "val")
    if not held_out and options.threshold.validation_fraction:
        ids, groups = [row["sample_id"] for row in train], [row["category"] for row in train]
        held_out = frozenset(hold_out(ids, groups, options.threshold.validation_fraction, options.seed))
    rest = [row for row in train if row["sample_id"] not in held_out]
    bank = frozenset(row["sample_id"] for row in rest)
    if options.few_shot is not None:
        ids, groups = [row["sample_id"] for row in rest], [row["category"] for row in rest]
        bank = frozenset(few_shot(ids, groups, options.few_shot, options.seed))
    target, confidence = options.threshold.target_fpr, options.threshold.confidence
    needed = normals_needed(target or USUAL_FPR, confidence)
    notice = ""
    if len(held_out) < needed:
        best = f"they support {smallest_supported_rate(len(held_out), confidence):.3g} at best" if held_out else "none"
        shortage = (
            f"{len(held_out)} held-out normal images cannot support a false-positive rate of "
            f"{target or USUAL_FPR:g} at {100 * confidence:g} % confidence ({best}; {needed} are needed)"
        )
        if target is not None:
            raise OptionError(
                f"{shortage}; raise --threshold.target_fpr or --threshold.validation_fraction, or add normal images"
            )
        notice = f"no threshold: {shortage}; ask for a higher --threshold.target_fpr"
        held_out = frozenset()
        if options.few_shot is None and not any(row["split"] == "val" for row in normals):
            bank = frozenset(row["sample_id"] for row in train)
    return _Chosen(bank, held_out), notice


def _fit(
    name: str, config: Any, options: BankOptions, shards: ShardSet, categories: list[str], output: str
) -> FitResult:
    chosen, notice = choose_samples(shards, categories, options)
    plan = {
        "method": name,
        "config": to_plain(config),
        "shards": shards.digest,
        "categories": categories,
        "few_shot": options.few_shot,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "threshold": to_plain(options.threshold),
        "limits": to_plain(options.limits),
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
        "weights": _weights_digest(config.backbone.weights),
    }
    digest = storage.claim(output, plan, options.overwrite, "training")
    if is_model(output):
        return _result(load_model(output, "cpu"), output, False, 0.0)
    work = files.join(output, WORK)
    encoder = files.join(work, "encoder")
    if not is_model(encoder):
        Model(METHODS[name](config), categories).save(encoder)
    connect(options.runtime)
    rate = _embed(encoder, shards, chosen.bank, categories, work, options)
    method = load_model(encoder, "cpu").method
    assert isinstance(method, MemoryMethod)
    with TemporaryDirectory(prefix="unianom-patches-") as copies:
        patches = PatchFiles(work, shards.parts, Path(copies))
        method.bank, radius = build_bank(patches, config.bank)
        patch_count = patches.rows
    threshold = None
    if chosen.held_out:
        fitted = files.join(work, "fitted")
        Model(method, categories).save(fitted)
        scores = _score_held_out(fitted, shards, chosen.held_out, categories, options)
        threshold = fit_threshold(scores, options.threshold.target_fpr or USUAL_FPR, options.threshold.confidence)
    provenance = {
        "plan_digest": digest,
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "bank": {
            "images": len(chosen.bank),
            "patches": patch_count,
            "rows": method.bank.rows,
            "cover_radius": radius,
        },
        "held_out_normals": len(chosen.held_out),
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
    return FitResult(
        folder=output,
        categories=model.categories,
        fresh=fresh,
        images=made["images"],
        patches=made["patches"],
        bank_rows=made["rows"],
        cover_radius=made["cover_radius"],
        threshold=model.threshold,
        notice=model.provenance["notice"],
        images_per_second=rate,
    )


def _weights_digest(weights: str) -> str | None:
    """Checksum of a weights file, so that another file under the same name is another plan."""
    if weights in ("pretrained", "random") or not files.exists(weights):
        return None  # a missing file is told by the backbone, with the ways out
    return files.sha256_file(weights)


def _embed(
    encoder: str, shards: ShardSet, chosen: frozenset[str], categories: list[str], work: str, options: BankOptions
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
    units, done = [], 0
    for part in shards.parts:
        record = storage.part_record(work, patch_part(part))
        if record is None:
            units.append({"part": part})
        else:
            done += record["images"]
    progress = Progress("embed", len(chosen) - done)
    for record in run_units(PartEmbedder, arguments, units, options.runtime):
        progress.advance(record["images"])
    return progress.close()


def patch_part(part: str) -> str:
    """Name of the patch file of a shard part."""
    return part.removesuffix(".parquet") + ".npy"


class _PartReader:
    """Reads chosen samples of a part as network input, decoded ahead. What embedding and scoring held-outs share."""

    def __init__(
        self,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        threads: int,
    ) -> None:
        self._shards, self._selection, self._chosen = shards, selection, chosen
        self._batch_size, self._limits = batch_size, limits
        self._pool = ThreadPoolExecutor(threads)

    def batches(self, part: str, model: Model) -> Iterator[torch.Tensor]:
        """B×3×S×S batches of the chosen samples, in the order of the part."""
        method = model.method

        def prepare(row: dict[str, Any]) -> np.ndarray:
            return decode_prepared(row["image"], method.input, self._limits)

        waiting: list[np.ndarray] = []
        for pixels in map_ahead(self._pool, prepare, self._rows(part), 2 * self._batch_size):
            waiting.append(pixels)
            if len(waiting) == self._batch_size:
                yield normalise(waiting, method.input).to(method.device)
                waiting = []
        if waiting:
            yield normalise(waiting, method.input).to(method.device)

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        for batch in self._shards.read(part, self._selection, ["sample_id", "image"]):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._chosen)


class PartEmbedder:
    """Writes the kept patches of one part's chosen images as a .npy file of M×D float32. A `UnitWorker`."""

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
        self._reader = _PartReader(shards, selection, chosen, batch_size, limits, threads)
        self._work = work

    @torch.inference_mode()
    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Write one patch file and its record."""
        method = self._model.method
        assert isinstance(method, MemoryMethod)
        kept: list[np.ndarray] = []
        images = 0
        for batch in self._reader.batches(unit["part"], self._model):
            embedding = method.embed_for_bank(batch)
            kept.append(embedding.patches[embedding.keep].float().cpu().numpy())
            images += len(batch)
        patches = np.concatenate(kept) if kept else np.zeros((0, 0), np.float32)
        if not np.isfinite(patches).all():
            raise DataError(f"patches of {unit['part']} hold NaN or infinite values; use backbone.precision=fp32")
        buffer = io.BytesIO()
        np.save(buffer, patches, allow_pickle=False)
        name = patch_part(unit["part"])
        files.write_bytes(files.join(self._work, name), buffer.getvalue())
        record = {"name": name, "images": images, "rows": len(patches)}
        storage.commit_part(self._work, name, record)
        return record


class HeldOutScorer:
    """Scores the held-out normals of one part. A `UnitWorker`."""

    def __init__(
        self,
        model: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        device: str,
        threads: int,
    ) -> None:
        self._model = load_model(model, device)
        self._reader = _PartReader(shards, selection, chosen, batch_size, limits, threads)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Scores of one part's held-out images."""
        scores: list[float] = []
        for batch in self._reader.batches(unit["part"], self._model):
            scores += self._model.method.predict(batch).score.float().cpu().tolist()
        return {"scores": scores}


class PatchFiles:
    """The patch files of all parts, in order, as one matrix of M×D float32 that stays on disk.

    Args:
        work: folder of the patch files.
        parts: shard parts, in order.
        copies: local folder to fetch the files to, where they lie on an object store.

    Raises:
        DataError: not a single patch was kept.
    """

    def __init__(self, work: str, parts: list[str], copies: Path) -> None:
        self._arrays: list[np.ndarray] = []
        for part in parts:
            uri = files.join(work, patch_part(part))
            if not files.is_local(uri):
                (copies / patch_part(part)).write_bytes(files.read_bytes(uri))
                uri = str(copies / patch_part(part))
            array = np.load(uri, mmap_mode="r", allow_pickle=False)
            if len(array):
                self._arrays.append(array)
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
        """Chosen rows, in the order of `indices`."""
        starts = np.cumsum([0, *(len(array) for array in self._arrays)])
        taken = np.empty((len(indices), self.dimension), np.float32)
        for number, array in enumerate(self._arrays):
            inside = (indices >= starts[number]) & (indices < starts[number + 1])
            taken[inside] = array[indices[inside] - starts[number]]
        return taken


def build_bank(patches: PatchFiles, config: BankConfig) -> tuple[MemoryBank, float]:
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


def _score_held_out(
    model: str, shards: ShardSet, held_out: frozenset[str], categories: list[str], options: BankOptions
) -> list[float]:
    arguments = {
        "model": model,
        "shards": shards,
        "selection": Selection(("train", "val"), tuple(categories), (NORMAL,)),
        "chosen": held_out,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    progress = Progress("score held-out normals", len(held_out))
    scores: list[float] = []
    for result in run_units(HeldOutScorer, arguments, [{"part": part} for part in shards.parts], options.runtime):
        scores += result["scores"]
        progress.advance(len(result["scores"]))
    progress.close()
    return scores

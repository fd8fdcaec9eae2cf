"""Coreset and search of memory banks against the plain algorithms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipelines.benchmarks.harness import OURS, _absent, _report, check_positive, clocked, fixed_threads, interleave
from pipelines.benchmarks.references import (
    anomalib_coreset,
    plain_coreset,
)
from pipelines.benchmarks.scoring import input_batches, memory_model
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.memory.coreset import farthest_points, greedy_coreset, random_projection
from unianom.memory.index import MemoryBank
from unianom.methods import MemoryMethod
from unianom.model import Model

# --- coreset: against the plain algorithm ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CoresetBenchmark:
    """The greedy coreset against the plain algorithm and anomalib's, on the same projected features.

    Args:
        output: JSON file to write; path or URI.
        features: .npy file of N×D float32; null embeds the normal training images of `shards` with `model`.
        model: model folder of a memory method; path or URI.
        shards: shard set; path or URI.
        rows: how many features, drawn at random.
        count: how many of them to choose.
        projection: dimension in which they are compared; 0 for their own.
        seed: of the draw, the projection and the start rows.
        rounds: turns of each side.
        threads: threads of each side.
    """

    output: str
    features: str | None = None
    model: str | None = None
    shards: str | None = None
    rows: int = 40_000
    count: int = 4_000
    projection: int = 128
    seed: int = 0
    rounds: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "rows", "count", "rounds", "threads")
        if (self.features is None) == (self.model is None or self.shards is None):
            raise OptionError("give either features, or model and shards")
        if self.count > self.rows or self.projection < 0:
            raise OptionError("need count <= rows, and projection >= 0")


def measure_coreset(options: CoresetBenchmark) -> dict[str, Any]:
    """Choose the same coreset in three ways, and compare picks and cover radius."""
    features = _features(options)
    start_points = 10
    starts = np.random.default_rng(options.seed).choice(len(features), start_points, replace=False)  # as ours draws
    works: dict[str, Callable[[], Any]] = {
        OURS: lambda: greedy_coreset(features, options.count, options.seed, start_points).indices,
        "plain": lambda: plain_coreset(features, starts, options.count),
    }
    if find_spec("anomalib"):
        works["anomalib"] = anomalib_coreset(features, options.count, options.seed)
    with fixed_threads(options.threads):
        sides = {name: clocked(options.count, work) for name, work in works.items()}
        measured = interleave(sides, options.rounds)
        picks = {name: np.asarray(measured.result(name)) for name in works}
        same_rule = {"plain": picks[OURS]}
        if "anomalib" in picks:
            # anomalib starts from one random row, which is its first pick
            first = picks["anomalib"][0]
            initial = np.linalg.norm(features.astype(np.float64) - features[first], axis=1)
            same_rule["anomalib"] = np.r_[first, farthest_points(features, initial, options.count - 1).indices]
        table: dict[str, dict[str, Any]] = {
            name: {"cover radius": cover_radius(features, picks[name])} for name in works
        }
    for name, ours in same_rule.items():
        table[name]["picks we share by its start rule"] = f"{len(np.intersect1d(picks[name], ours))}/{options.count}"
    return _report(
        options,
        "picks",
        measured,
        {f"{OURS} ÷ {name}": measured.ratio(OURS, name) for name in works if name != OURS},
        tables={f"{options.count} of {len(features)} rows in {features.shape[1]} dimensions": table},
        notes=_absent(["anomalib"]),
    )


def _features(options: CoresetBenchmark) -> np.ndarray:
    """`rows` × `projection` float32."""
    if options.features is not None:
        everything = np.load(options.features, mmap_mode="r", allow_pickle=False)
    else:
        assert options.model is not None
        assert options.shards is not None
        everything = patch_features(memory_model(options.model), ShardSet.open(options.shards), options.rows)
    if everything.ndim != 2 or len(everything) < options.rows:
        raise DataError(f"{options.rows} rows are wanted, there are features of shape {everything.shape}; lower --rows")
    drawn = np.random.default_rng(options.seed).choice(len(everything), options.rows, replace=False)
    features = np.asarray(everything[np.sort(drawn)], dtype=np.float32)
    if options.projection == 0:
        return features
    return features @ random_projection(features.shape[1], options.projection, seed=options.seed)


@torch.inference_mode()
def patch_features(model: Model, shards: ShardSet, rows: int) -> np.ndarray:
    """Kept patches of normal training images, M×D float32, from as many images as give at least `rows`."""
    method = model.method
    assert isinstance(method, MemoryMethod)
    kept: list[np.ndarray] = []
    for batch in input_batches(model, shards, Selection(("train",), (), (NORMAL,)), 1):
        embedding = method.embed_for_bank(batch)
        kept.append(embedding.patches[embedding.keep].float().numpy())
        if sum(len(patches) for patches in kept) >= rows:
            break
    return np.concatenate(kept)


def cover_radius(features: np.ndarray, picks: np.ndarray) -> float:
    """Largest distance of any row to its nearest pick, in float64."""
    rows = torch.from_numpy(features).double()
    chosen = rows[torch.from_numpy(np.asarray(picks))]
    return max(float(torch.cdist(block, chosen).amin(1).max()) for block in rows.split(2048))


# --- search: exact against inverted lists ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchBenchmark:
    """A fitted model's bank searched exactly and by inverted lists, with what the latter changes.

    Args:
        model: model folder of a memory method; path or URI.
        shards: shard set, whose test images are the queries; path or URI.
        output: JSON file to write; path or URI.
        images: how many.
        nprobe: lists that "ivf_flat" compares with each query.
        batch_size: images whose patches are searched at once.
        rounds: turns of each side.
        threads: threads of each side.
    """

    model: str
    shards: str
    output: str
    images: int = 64
    nprobe: int = 8
    batch_size: int = 8
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "images", "nprobe", "batch_size", "rounds", "threads")


@torch.inference_mode()
def measure_search(options: SearchBenchmark) -> dict[str, Any]:
    """Score the same patches with both kinds of bank, in turns."""
    model = memory_model(options.model)
    method: Any = model.method
    batches = input_batches(model, ShardSet.open(options.shards), Selection(("test",)), options.batch_size)
    embeddings = [method.embed(batch) for batch in islice(batches, max(1, options.images // options.batch_size))]
    if not embeddings:
        raise DataError(f"{options.shards} has fewer than {options.batch_size} test images; lower --batch_size")
    queries = [embedding.patches[embedding.keep].numpy() for embedding in embeddings]
    vectors = method.require_bank().vectors()
    with fixed_threads(options.threads):
        banks = {
            "flat": MemoryBank.build(vectors),
            "ivf_flat": MemoryBank.build(vectors, kind="ivf_flat", nprobe=options.nprobe),
        }

        def searched(bank: MemoryBank) -> None:
            for some in queries:
                bank.search(some, method.config.neighbours)

        amount = sum(len(some) for some in queries)
        sides = {name: clocked(amount, partial(searched, bank)) for name, bank in banks.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
        scores = {}
        for name, method.bank in banks.items():
            scores[name] = torch.cat([method.score_patches(embedding).score for embedding in embeddings]).double()
        recall = banks["ivf_flat"].recall(np.concatenate(queries))
    change = (scores["ivf_flat"] - scores["flat"]).abs()
    found = {
        "images": len(change),
        "bank rows": len(vectors),
        "lists": banks["ivf_flat"].shards[0].index.nlist,
        "recall at 1": recall.at_1,
        "max |Δ image score|": float(change.max()),
        "relative": float((change / scores["flat"].abs()).max()),
    }
    return _report(
        options,
        "queries",
        measured,
        {"ivf_flat ÷ flat": measured.ratio("ivf_flat", "flat")},
        tables={"what ivf_flat changes": {f"nprobe {options.nprobe}": found}},
    )

"""Coreset and search of memory banks against the plain algorithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipelines.benchmarks.harness import OURS, clocked, fixed_threads, interleave
from pipelines.benchmarks.options import CoresetBenchmark, SearchBenchmark
from pipelines.benchmarks.references import (
    anomalib_coreset,
    plain_coreset,
)
from pipelines.benchmarks.report import missing_peers, write_report
from pipelines.benchmarks.scoring import input_batches, memory_model
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.memory.coreset import farthest_points, greedy_coreset, random_projection
from unianom.memory.index import MemoryBank
from unianom.methods import MemoryMethod


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
    return write_report(
        options,
        "picks",
        measured,
        {f"{OURS} ÷ {name}": measured.ratio(OURS, name) for name in works if name != OURS},
        tables={f"{options.count} of {len(features)} rows in {features.shape[1]} dimensions": table},
        notes=missing_peers(["anomalib"]),
    )


def _features(options: CoresetBenchmark) -> np.ndarray:
    """Return `rows` × `projection` float32."""
    source = options.source
    if isinstance(source, str):
        everything = np.load(source, mmap_mode="r", allow_pickle=False)
    else:
        model, shards = source
        everything = patch_features(memory_model(model), ShardSet.open(shards), options.rows)
    if everything.ndim != 2 or len(everything) < options.rows:
        raise DataError(f"{options.rows} rows are wanted, there are features of shape {everything.shape}; lower --rows")
    drawn = np.random.default_rng(options.seed).choice(len(everything), options.rows, replace=False)
    features = np.asarray(everything[np.sort(drawn)], dtype=np.float32)
    if options.projection == 0:
        return features
    return features @ random_projection(features.shape[1], options.projection, seed=options.seed)


@torch.inference_mode()
def patch_features(method: MemoryMethod, shards: ShardSet, rows: int) -> np.ndarray:
    """Return kept patches of normal training images, M×D float32, of as many images as give `rows` at least."""
    kept: list[np.ndarray] = []
    for batch in input_batches(method, shards, Selection(("train",), (), (NORMAL,)), 1):
        embedding = method.embed_for_bank(batch)
        kept.append(embedding.patches[embedding.keep].float().numpy())
        if sum(len(patches) for patches in kept) >= rows:
            break
    if not kept:
        raise DataError(f"{shards.uri} has no normal training images to take patches of; give another shard set")
    return np.concatenate(kept)


def cover_radius(features: np.ndarray, picks: np.ndarray) -> float:
    """Return the largest distance of any row to its nearest pick, in float64."""
    rows = torch.from_numpy(features).double()
    chosen = rows[torch.from_numpy(np.asarray(picks))]
    return max(float(torch.cdist(block, chosen).amin(1).max()) for block in rows.split(2048))


@torch.inference_mode()
def measure_search(options: SearchBenchmark) -> dict[str, Any]:
    """Score the same patches with both kinds of bank, in turns."""
    method: Any = memory_model(options.model)
    batches = input_batches(method, ShardSet.open(options.shards), Selection(("test",)), options.batch_size)
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
            predictions = [method.postprocess(method.search_bank(embedding)) for embedding in embeddings]
            scores[name] = torch.cat([prediction.score for prediction in predictions]).double()
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
    return write_report(
        options,
        "queries",
        measured,
        {"ivf_flat ÷ flat": measured.ratio("ivf_flat", "flat")},
        tables={"what ivf_flat changes": {f"nprobe {options.nprobe}": found}},
    )

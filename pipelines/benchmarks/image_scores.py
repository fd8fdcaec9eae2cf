"""Image scores of memory methods: how much of a full search they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.benchmarks.harness import clocked, fixed_threads, interleave
from pipelines.benchmarks.memory_bank import patch_features
from pipelines.benchmarks.options import ScoresBenchmark
from pipelines.benchmarks.references import nearest_distances
from pipelines.benchmarks.report import write_report
from pipelines.benchmarks.scoring import input_batches, memory_model
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.memory.bounded_search import search_largest
from unianom.memory.index import MemoryBank
from unianom.memory.patch_distances import mean_distances
from unianom.methods import MaskedPatches, MemoryMethod

FAISS, ANOMALIB = "FAISS flat", "anomalib's search"
ALL, LARGEST = "unianom, all patches", "unianom, largest"


class CountingBank(MemoryBank):
    """A bank that counts the queries that are searched in full."""

    queries = 0

    def search(self, queries: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Search as every bank does."""
        self.queries += len(queries)
        return super().search(queries, k)


@torch.inference_mode()
def measure_scores(options: ScoresBenchmark) -> dict[str, Any]:
    """Search the patches of test images in several ways, in turns; one neighbour for each patch.

    Plain FAISS and anomalib's search get all patches, since neither knows of masks.
    """
    method = memory_model(options.model)
    shards = ShardSet.open(options.shards)
    batches = input_batches(method, shards, Selection(("test",)), options.batch_size)
    embeddings = [method.embed(batch) for batch in islice(batches, max(1, options.images // options.batch_size))]
    if not embeddings:
        raise DataError(f"{options.shards} has fewer than {options.batch_size} test images; lower --batch_size")
    vectors = _vectors(options, method, shards)
    images, cells = options.batch_size * len(embeddings), embeddings[0].keep.shape[1]
    top = max(1, round(options.share * cells))
    share = f"unianom, top {top} of {cells}"
    with fixed_threads(options.threads):
        start = time.process_time()
        flat = MemoryBank.build(vectors)
        middle = time.process_time()
        bank = CountingBank.build(vectors, proposals=True)
        built = time.process_time() - middle - (middle - start)
        if bank.proposals is None:
            raise DataError(f"a bank of {len(vectors)} rows has no proposals; give a larger one")
        every = [embedding.patches.flatten(0, 1).contiguous() for embedding in embeddings]
        index, rows = flat.shards[0].index, torch.from_numpy(vectors)
        works: dict[str, Callable[[], Any]] = {
            FAISS: lambda: [index.search(patches.numpy(), 1) for patches in every],
            ANOMALIB: lambda: [nearest_distances(patches, rows) for patches in every],
            ALL: lambda: [_all_distances(bank, embedding) for embedding in embeddings],
            LARGEST: lambda: list(_largest(bank, embeddings, 1)),
            share: lambda: list(_largest(bank, embeddings, top)),
        }
        sides = {name: clocked(images, work, time.process_time) for name, work in works.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
        table = {}
        full = torch.cat(measured.result(ALL))
        for name, count in ((LARGEST, 1), (share, top)):
            found = torch.cat(measured.result(name))
            bank.queries = 0
            works[name]()
            table[name] = {
                "patches searched in full": bank.queries / (images * cells),
                "scores equal to the bit": torch.equal(found, full.topk(count).values),
            }
    milliseconds = {
        name: {"CPU ms an image": 1000 * summary["seconds_median"] / images}
        for name, summary in measured.summary().items()
    }
    return write_report(
        options,
        "images",
        measured,
        {f"{name} ÷ {FAISS}": measured.ratio(name, FAISS) for name in works if name != FAISS}
        | {f"{name} ÷ {ANOMALIB}": measured.ratio(name, ANOMALIB) for name in (LARGEST, share)},
        tables={f"bank of {len(vectors)} × {vectors.shape[1]}": milliseconds, "bounded search": table},
        notes=[f"proposals took {built:.2f} CPU seconds to build"],
    )


def _vectors(options: ScoresBenchmark, method: MemoryMethod, shards: ShardSet) -> np.ndarray:
    if options.bank_rows is None:
        return method.require_bank().vectors()
    everything = patch_features(method, shards, options.bank_rows)
    if len(everything) < options.bank_rows:
        raise DataError(f"{options.shards} has {len(everything)} patches to draw from; lower --bank_rows")
    drawn = np.random.default_rng(options.seed).choice(len(everything), options.bank_rows, replace=False)
    return everything[np.sort(drawn)]


def _all_distances(bank: MemoryBank, embedding: MaskedPatches) -> Tensor:
    """Return the distance of every patch, B×N; 0 where it is not kept."""
    distances = torch.zeros(embedding.keep.shape)
    found, _ = bank.search(embedding.patches[embedding.keep].numpy(), 1)
    distances[embedding.keep] = torch.from_numpy(found[:, 0])
    return distances


def _largest(bank: MemoryBank, embeddings: list[MaskedPatches], count: int) -> Iterator[Tensor]:
    """Yield the largest distances of the images of each batch, B×count, in falling order."""
    for embedding in embeddings:
        distances, _ = search_largest(bank, *embedding, 1, count)
        yield mean_distances(distances, 1).topk(count).values

"""Semantic anomalies and few normal images: protocols that fit many banks to the same images.

    embeddings ─▶ actors: a bank for each task or draw, scores of the test split, metrics ─▶ tables, figure, section

The network sees every image once. A task is one bank; it leaves a Parquet file of scores and a record, so a
killed run continues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.engine import choose_engine
from pipelines.data.image_source import SampleSource
from pipelines.evaluation.embeddings import EmbeddedImages, Side, check_scope, embed_once
from pipelines.evaluation.options import EmbeddingOptions
from pipelines.runtime import outputs
from pipelines.runtime.models import load_memory_method, make_memory_method
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_unfinished
from pipelines.training.memory_bank import build_bank
from pipelines.training.per_category import weights_digest
from unianom import __version__, files
from unianom.configs import method_of
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.execution import CPU
from unianom.options import to_plain

SECTION = "section.json"
"""What a report shows of a protocol."""


@dataclass(frozen=True)
class ProtocolResult:
    """What a protocol found.

    Attributes:
        folder: where it lies.
        fresh: whether this run wrote it.
        content: of its JSON file.
    """

    folder: str
    fresh: bool
    content: dict[str, Any]


def scores_file(number: int) -> str:
    """Return the name of the file of scores of one bank."""
    return f"scores-{number:05d}.parquet"


KINDS = {"score": pa.float32(), "label": pa.int8(), "shots": pa.int32(), "seed": pa.int32()}
"""Types of the columns of scores that are not text."""


class BankScorer:
    """Fits one bank to embedded images and scores embedded test images with it. A `PartTask` of both protocols.

    Args:
        embedded: the images.
        config: the method's options.
        batch_size: images scored at once.
        output: folder of the results.
        plan: digest of the plan.
        tasks: what each is about, by its number; they themselves travel as numbers, since Ray Data would turn
            their lists into arrays.
    """

    def __init__(
        self,
        embedded: EmbeddedImages,
        config: Any,
        batch_size: int,
        output: str,
        plan: str,
        tasks: Sequence[dict[str, Any]],
    ) -> None:
        self.method = load_memory_method(embedded.encoder, CPU)
        self.config, self.output, self.plan, self.tasks = config, output, plan, tasks
        self.reader = embedded
        self._batch_size = batch_size

    def fit(self, chosen: frozenset[str]) -> dict[str, Any]:
        """Build the bank of some training images; tells how large it is."""
        patches = self.reader.patches_of(chosen)
        self.method.bank, _ = build_bank(patches, self.config.bank)
        self.method.check_bank(self.config)
        return {"images": len(chosen), "patches": patches.rows, "bank_rows": self.method.bank.rows}

    def score(
        self, see: Callable[[dict[str, Any], np.ndarray], None] | None = None, categories: tuple[str, ...] = ()
    ) -> list[dict[str, Any]]:
        """Score test images.

        Args:
            see: takes every image and its S×S anomaly map, which is not kept.
            categories: those to score; empty for all.

        Returns:
            What is known of each image, and its `score`.
        """
        scored = []
        for rows, embedding in self.reader.batches(self._batch_size, categories):
            if see is None:
                scores = self.method.score_patches(embedding).score.float().numpy()
            else:
                found = self.method.postprocess(self.method.search_bank(embedding))
                scores, maps = found.score.float().numpy(), found.anomaly_map.float().numpy()
            for number, (row, value) in enumerate(zip(rows, scores, strict=True)):
                if not np.isfinite(value):
                    raise DataError(f"{row['sample_id']} got the score {value}; check the weights and the precision")
                scored.append({**row, "score": float(value)})
                if see is not None:
                    see(row, maps[number])
        return scored

    def commit(self, number: int, rows: list[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any]:
        """Write the scores of a unit, then its record."""
        name = scores_file(number)
        table = pa.Table.from_pylist(rows)
        table = table.cast(pa.schema([(column, KINDS.get(column, pa.string())) for column in table.column_names]))
        with files.open_atomic(files.join(self.output, name)) as handle:
            pq.write_table(table, handle, compression="zstd")
        record = {"plan": self.plan, "name": name, **record}
        outputs.commit_part(self.output, name, record)
        return record


def run_banks(
    worker: type,
    options: Any,
    shards: ShardSet,
    sides: dict[Side, Selection],
    output: str,
    plan: str,
    tasks: Sequence[dict[str, Any]],
    words: str,
) -> list[dict[str, Any]]:
    """Embed the images of both sides, then fit and score a bank for each task; the tasks' records, in their order."""
    arguments = {
        "embedded": embed_once(method_of(options.method), options.method, options, shards, sides),
        "config": options.method,
        "batch_size": options.batch_size,
        "output": output,
        "plan": plan,
        "tasks": tasks,
    }
    numbered = {scores_file(task["number"]): {"number": task["number"]} for task in tasks}
    runtime = dataclasses.replace(options.runtime, gpus_per_worker=0)
    images = len(tasks) * sum(shards.count(selection) for selection in sides.values())
    progress = Progress(words, len(numbered), "banks")
    records, _ = run_unfinished(worker, arguments, numbered, output, runtime, progress, images)
    return list(records.values())


E = TypeVar("E", bound=EmbeddingOptions)


def checked(options: E, shards: ShardSet, sides: Mapping[Side, Selection]) -> E:
    """Refuse, before an output is claimed, options of a method that no images could be embedded with; return them with
    the engine that computes its encoder.

    Args:
        options: of the protocol.
        shards, sides: the images.

    Raises:
        OptionError, WeightsError: see `check_scope`, `make_memory_method` and `choose_engine`.
    """
    check_scope(options.method, options.batch_size)
    method = make_memory_method(method_of(options.method), options.method)
    images = sum(shards.count(selection) for selection in sides.values())
    source = SampleSource(shards, sides["train"], options.limits)
    runtime = choose_engine(options.runtime, source, images, lambda: method)
    return dataclasses.replace(options, runtime=runtime)


def protocol_plan(options: Any, shards: ShardSet, **own: Any) -> dict[str, Any]:
    """Return what the results depend on."""
    return {
        "tool": __version__,
        "method": method_of(options.method),
        "config": to_plain(options.method),
        "weights": weights_digest(options.method.backbone.name, options.method.backbone.weights),
        "shards": shards.digest,
        "batch_size": options.batch_size,
        "limits": to_plain(options.limits),
        **options.runtime.execution.plan,
        "threads": options.runtime.cpus_per_worker,
        **own,
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation (n − 1 in the denominator) of some values; None where there are too few."""
    mean = math.fsum(values) / len(values) if values else None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "sd": deviation}

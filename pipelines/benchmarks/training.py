"""Training on frozen features that are kept, against encoding in every step."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.benchmarks.harness import Side, Timing, fixed_threads, interleave
from pipelines.benchmarks.options import TrainingBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.data.cache_writer import CacheWriter, range_task
from pipelines.data.extractors import Extractor
from pipelines.data.feature_cache import CachedFeatures
from pipelines.data.image_source import SampleSource
from pipelines.runtime.models import load_model
from pipelines.training.dataset import PreparedFeatures, PreparedImages, TrainingSet
from pipelines.training.job import synthesiser_of, wants_pixels
from pipelines.training.loader import BatchLoader
from pipelines.training.prepared import DESCRIPTOR, FrozenFeatures, PreparedPixels, learnable
from pipelines.training.sampler import ReferenceSampler, StepSampler
from pipelines.training.samples import TrainingImages
from pipelines.training.trainer import Trainer
from unianom.data.image import ImageLimits
from unianom.data.shards import ShardSet
from unianom.errors import OptionError
from unianom.execution import Execution
from unianom.methods.trained import TrainedMethod

KEPT, ENCODED = "features kept", "encoded every step"


def measure_training(options: TrainingBenchmark) -> dict[str, Any]:
    """Take the same steps on the same images from either source; measure what is kept, and the wait for data."""
    shards = ShardSet.open(options.shards)
    model = load_model(options.model, Execution(options.device))
    method = model.method
    if (
        not isinstance(method, TrainedMethod)
        or method.batch_spec.prompts == "nearest"
        or method.batch_spec.augmentation.active
    ):
        raise OptionError(f"{options.model}: needs a trained method without augmentation or prompts by features")
    waiting: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder, fixed_threads(options.threads):
        sources, table, images = _sources(options, method, model.categories, shards, Path(folder))

        def side(name: str) -> Side:
            trainer = _trainer(method, sources[name], images, options)

            def timing() -> Timing:
                start = time.perf_counter()
                steps = list(trainer.steps(trainer.step + options.steps))
                if options.device == "cuda":
                    torch.cuda.synchronize()
                waiting[name] += [step["data"] / step["all"] for step in steps]
                return Timing(options.steps, time.perf_counter() - start)

            return timing

        measured = interleave({name: side(name) for name in sources}, options.rounds, warm_up=True)
    for name, shares in waiting.items():
        table[name]["waiting for data"] = f"{100 * statistics.median(shares):.1f} %"
    return write_report(
        options,
        "steps",
        measured,
        {f"{KEPT} ÷ {ENCODED}": measured.ratio(KEPT, ENCODED)},
        tables={f"{method.name} on {len(images)} images, batches of {method.config.training.batch_size}": table},
    )


def _sources(
    options: TrainingBenchmark, method: TrainedMethod, categories: list[str], shards: ShardSet, folder: Path
) -> tuple[dict[str, TrainingSet], dict[str, dict[str, Any]], TrainingImages]:
    """Return training sets that read kept features and images, what each keeps, and the images."""
    selection = learnable(categories, method.batch_spec.labels)
    masks = method.batch_spec.masks
    extractors: dict[str, Extractor] = {
        KEPT: FrozenFeatures(options.model, half=True),
        ENCODED: PreparedPixels(method.input, masks),
    }
    table: dict[str, dict[str, Any]] = {}
    cached: dict[str, CachedFeatures] = {}
    names: list[str] = []
    rows = 0
    for name, extractor in extractors.items():
        samples = SampleSource(shards, selection, ImageLimits(), masks=masks and name == ENCODED)
        uri = str(folder / name.replace(" ", "_"))
        writer = CacheWriter(uri, {"": samples}, {"": extractor}, 8, Execution(options.device), options.threads)
        parts: list[str] = []
        start, rows, size = time.perf_counter(), 0, 0
        for within in samples.ranges():
            record = writer.run(range_task(within, ""))
            parts.append(record["part"])
            rows, size = rows + record["rows"], size + record["bytes"]
            if name == KEPT:
                names = [array for array in record["arrays"] if array != DESCRIPTOR] or names
            if rows >= options.images:
                break
        seconds = time.perf_counter() - start
        table[name] = {"kB kept an image": size / rows / 1000, "prepared, images/s": rows / seconds}
        cached[name] = CachedFeatures(uri, folder, parts)
    everything = TrainingImages.choose(shards, categories, None, method.batch_spec.labels)
    images = everything.first(rows)
    prepared, kept = PreparedImages(cached[ENCODED], images), PreparedFeatures(cached[KEPT], names, images)
    needs = method.batch_spec
    references = ReferenceSampler(images, False, None) if needs.prompts or needs.synthetic else None
    sources = {
        name: TrainingSet(
            images,
            categories,
            needs,
            prepared if wants_pixels(needs, name == KEPT) else None,
            kept if name == KEPT else None,
            references,
            synthesiser_of(method),
            seed=0,
        )
        for name in extractors
    }
    return sources, table, images


def _trainer(method: TrainedMethod, data: TrainingSet, images: TrainingImages, options: TrainingBenchmark) -> Trainer:
    order = StepSampler(len(images), 0, method.config.training.batch_size)
    batches = BatchLoader(data, order, 0, pin=options.device == "cuda", repeats=method.batch_spec.repeats)
    return Trainer(method, batches, (options.rounds + 1) * options.steps, order.share, options.precision)

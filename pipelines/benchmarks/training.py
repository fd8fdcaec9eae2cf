"""Training and inference of networks against what they could do without."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.benchmarks.harness import Side, Timing, _report, clocked, fixed_threads, interleave
from pipelines.benchmarks.metrics import resident_peak
from pipelines.benchmarks.options import InferenceBenchmark, SimilarityBenchmark, TrainingBenchmark
from pipelines.data.feature_cache import CachedFeatures, CacheWriter, Extractor, FeatureCache, part_name
from pipelines.data.image_source import SampleSource
from pipelines.runtime.models import load_model, trained_method
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
from unianom.methods.layers.similarity import EPSILON, log_similarity
from unianom.methods.trained import TrainedMethod
from unianom.model import Model

# --- training: frozen features kept against encoded in every step ----------------------------------------------------


KEPT, ENCODED = "features kept", "encoded every step"


BLOCKS, WHOLE = "in blocks", "whole matrices"


def measure_training(options: TrainingBenchmark) -> dict[str, Any]:
    """The same steps on the same images from either source; also what is kept, and what waiting for data takes."""
    shards = ShardSet.open(options.shards)
    model = load_model(options.model, options.device)
    method = model.method
    if (
        not isinstance(method, TrainedMethod)
        or method.batch_spec.prompts == "nearest"
        or method.batch_spec.augmentation.active
    ):
        raise OptionError(f"{options.model}: needs a trained method without augmentation or prompts by features")
    waiting: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder, fixed_threads(options.threads):
        sources, table, images = _sources(options, model, shards, Path(folder))

        def side(name: str) -> Side:
            trainer = _trainer(method, sources[name], images, options)

            def timing() -> Timing:
                start = time.perf_counter()
                told = list(trainer.steps(trainer.step + options.steps))
                if options.device == "cuda":
                    torch.cuda.synchronize()
                waiting[name] += [step["data"] / step["all"] for step in told]
                return Timing(options.steps, time.perf_counter() - start)

            return timing

        measured = interleave({name: side(name) for name in sources}, options.rounds, warm_up=True)
    for name, shares in waiting.items():
        table[name]["waiting for data"] = f"{100 * statistics.median(shares):.1f} %"
    return _report(
        options,
        "steps",
        measured,
        {f"{KEPT} ÷ {ENCODED}": measured.ratio(KEPT, ENCODED)},
        tables={f"{method.name} on {len(images)} images, batches of {method.config.training.batch_size}": table},
    )


def _sources(
    options: TrainingBenchmark, model: Model, shards: ShardSet, folder: Path
) -> tuple[dict[str, TrainingSet], dict[str, dict[str, Any]], TrainingImages]:
    """A training set that reads kept features and one that reads images; what each keeps; the images."""
    method = trained_method(model.method)
    parts = [part_name(part) for part in shards.parts]
    selection = learnable(model.categories, method.batch_spec.labels)
    masks = method.batch_spec.masks
    extractors: dict[str, Extractor] = {
        KEPT: FrozenFeatures(options.model, half=True),
        ENCODED: PreparedPixels(method.input, masks),
    }
    table: dict[str, dict[str, Any]] = {}
    cached: dict[str, CachedFeatures] = {}
    names: list[str] = []
    made: set[int] = set()
    for name, extractor in extractors.items():
        samples = SampleSource(shards, selection, ImageLimits(), masks=masks and name == ENCODED)
        cache = FeatureCache(str(folder / name.replace(" ", "_")), "features", {}, {"": samples})
        writer = CacheWriter(cache, {"": extractor}, 8, options.device, options.threads)
        start, rows, size, made = time.perf_counter(), 0, 0, set()
        for number, part in enumerate(shards.parts):
            record = writer.run({"group": "", "part": part})
            made.add(number)
            rows, size = rows + record["rows"], size + record["bytes"]
            if name == KEPT:
                names = [array for array in record["arrays"] if array != DESCRIPTOR] or names
            if rows >= options.images:
                break
        seconds = time.perf_counter() - start
        table[name] = {"kB kept an image": size / rows / 1000, "prepared, images/s": rows / seconds}
        cached[name] = CachedFeatures(cache.uri, folder, parts)
    everything = TrainingImages.choose(shards, model.categories, None, method.batch_spec.labels)
    images = everything.of_parts(made)
    prepared, kept = PreparedImages(cached[ENCODED], images), PreparedFeatures(cached[KEPT], names, images)
    needs = method.batch_spec
    references = ReferenceSampler(images, False, None) if needs.prompts or needs.synthetic else None
    sources = {
        name: TrainingSet(
            images,
            model.categories,
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


def measure_inference(options: InferenceBenchmark) -> dict[str, Any]:
    """Images per second of both, and how far their scores and maps are apart."""
    trained, folded = (load_model(options.model, options.device) for _ in range(2))
    if not isinstance(trained.method, TrainedMethod):
        raise OptionError(f"{options.model} holds a {trained.method.name}; give a model of a trained method")
    folded.fold()
    side, count = trained.method.input.side, options.images
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator).to(options.device)

    def predict(model: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = [tuple(part.cpu() for part in model.method.predict(batch)) for batch in images.split(options.batch_size)]
        return [(anomaly_map, score) for anomaly_map, score in made]

    with fixed_threads(options.threads):
        sides = {
            "folded": clocked(count, lambda: predict(folded)),
            "as trained": clocked(count, lambda: predict(trained)),
        }
        measured = interleave(sides, options.rounds, warm_up=True)
    apart: dict[str, Any] = {}
    for place, name in enumerate(("map", "score")):
        one, other = (torch.cat([batch[place] for batch in measured.result(s)]) for s in ("folded", "as trained"))
        apart[f"largest difference, {name}"] = float((one - other).abs().max() / other.abs().max())
    ratios = {"folded ÷ as trained": measured.ratio("folded", "as trained")}
    return _report(options, "images", measured, ratios, tables={f"{trained.method.name}, relative": {"folded": apart}})


def measure_similarity(options: SimilarityBenchmark) -> dict[str, Any]:
    """Passes per second, memory at the peak beyond the maps themselves, and how far losses and gradients are apart."""
    steps = {
        name: partial(similarity_step, name, options.batch_size, options.channels, options.side, options.temperature)
        for name in (BLOCKS, WHOLE)
    }
    with fixed_threads(options.threads):
        sides = {name: clocked(1, partial(step, options.device)) for name, step in steps.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
    table: dict[str, dict[str, Any]] = {}
    for name in steps:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a process's peak only ever rises
            peak = pool.submit(similarity_peak, steps[name], options.device, options.threads).result()
        table[name] = {"MB at the peak": peak / 1e6}
    (loss, gradient), (other_loss, other_gradient) = (measured.result(name) for name in (BLOCKS, WHOLE))
    table[BLOCKS]["loss apart, relative"] = abs(loss - other_loss) / abs(other_loss)
    table[BLOCKS]["gradient apart, relative"] = float(
        (gradient - other_gradient).abs().max() / other_gradient.abs().max()
    )
    name = f"{options.batch_size} maps of {options.channels}×{options.side}×{options.side}"
    return _report(
        options, "passes", measured, {f"{BLOCKS} ÷ {WHOLE}": measured.ratio(BLOCKS, WHOLE)}, tables={name: table}
    )


def similarity_step(
    kind: str, count: int, channels: int, side: int, temperature: float, device: str
) -> tuple[float, torch.Tensor]:
    """One forward and backward pass; the loss, and the gradient of the student's maps."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, side, side)
    student, teacher = (torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(2))
    if kind == BLOCKS:
        logs = log_similarity(student, teacher, temperature)
    else:
        s, t = (torch.nn.functional.normalize(maps, dim=1).flatten(2).mT for maps in (student, teacher))
        similarity = (s @ t.mT / temperature).exp()
        logs = (similarity / (similarity.sum(2, keepdim=True) + EPSILON)).diagonal(dim1=1, dim2=2).log()
    loss = -logs.mean()
    loss.backward()
    assert student.grad is not None
    return float(loss.detach()), student.grad.cpu()


def similarity_peak(step: Callable[[str], Any], device: str, threads: int) -> float:
    """Bytes at the peak of a pass, of a process of its own on the CPU, beyond what it held before."""
    with fixed_threads(threads):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(device)
            return float(torch.cuda.max_memory_allocated())
        before = resident_peak()
        step(device)
        return float(resident_peak() - before)

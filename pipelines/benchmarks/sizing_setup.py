"""The images and the model of a sizing, ready to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.benchmarks.sizing_images import SizedImages, drawn_bank, make_method, sized_images
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.data.engine import REPAYS, choose_engine
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from unianom import files
from unianom.data.image import InputPolicy
from unianom.data.shards import Selection
from unianom.errors import OptionError
from unianom.execution import CPU, Execution
from unianom.methods import MemoryMethod
from unianom.model import Model
from unianom.options import from_plain, to_plain

CPU_SAMPLE, GPU_SAMPLE = 128, 2048
"""Images that are measured unless it is said how many."""


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        images, model_set, models: those that are scored, and by what.
        policy: how images become input.
        arguments: of `RangeScorer`, without "output" and "maps".
        model: what it is, in words.
    """

    images: SizedImages
    model_set: ModelSet
    models: Sequence[Mapping[str, Any]]
    policy: InputPolicy
    arguments: Mapping[str, Any]
    model: str


def prepare(options: SizingBenchmark, device: str, folder: str) -> Setup:
    """Choose the images, and open or make the model."""
    sample = options.sample or (CPU_SAMPLE if device == "cpu" else GPU_SAMPLE)
    if options.model is not None:
        model_set = ModelSet.open(options.model)
        if model_set.by_category:
            raise OptionError(f"{options.model} holds a model for each category; give the folder of one of them")
        images = sized_images(options, model_set, folder, sample)
        named = options.model
    else:
        model_set = ModelSet(files.join(folder, "model"), {})
        model = Model(make_method(options), ["any"])
        model.save(model_set.uri)
        images = sized_images(options, model_set, folder, sample)
        named = f"{options.method} with {options.backbone} of random weights"
        if isinstance(model.method, MemoryMethod):
            bank = drawn_bank(model.method, images, options.bank_rows, options.limits)
            model.method.bank = bank
            named += f" and a memory bank of {bank.rows:,} patches"
            model.save(model_set.uri)
    runtime = RuntimeOptions(engine=options.engine, gpus_per_worker=0 if device == "cpu" else 1)
    runtime = choose_engine(runtime, images.examples, REPAYS + 1, lambda: load_model(model_set.uri, CPU).method)
    models = model_set.descriptions()
    arguments = {
        "shards": images.rows,
        "selection": Selection(),
        "model_set": model_set,
        "digests": {model_set.uri: models[0]["digest"]},
        "plan": files.digest_of(to_plain(options)),
        "batch_size": options.batch_size,
        "limits": options.limits,
        "execution": Execution(device, runtime.execution.engine, options.search),
        "threads": 1,
        "fold": False,
    }
    policy = from_plain(InputPolicy, models[0]["config"]["input"])
    return Setup(images, model_set, models, policy, arguments, named)

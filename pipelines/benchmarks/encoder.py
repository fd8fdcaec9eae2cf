"""The frozen encoder of a model by each engine that this machine has, against PyTorch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from pipelines.benchmarks.harness import Side, clocked, fixed_threads, interleave
from pipelines.benchmarks.options import EncoderBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.runtime.models import load_model
from unianom.backbones import Backbone
from unianom.encoder_engine import CompiledEncoder, drawn_images, largest_difference
from unianom.errors import EngineError, OptionError
from unianom.execution import CPU, Engine

PYTORCH, CHANNELS_LAST = "pytorch", "pytorch, channels last"


def measure_encoder(options: EncoderBenchmark) -> dict[str, Any]:
    """Run the encoder by all engines in turns, in CPU seconds, and compare their features on drawn images.

    An engine that cannot be had here is left out, and the notes say why.
    """
    method = load_model(options.model, CPU).method
    frozen = [part for part in method.modules() if isinstance(part, Backbone) and not part.trainable]
    if not frozen:
        raise OptionError(f"{options.model} holds a {method.name}, which has no frozen encoder")
    backbone, side = frozen[0], method.input.side
    images = torch.randn(options.images, 3, side, side, generator=torch.Generator().manual_seed(0))
    notes = []
    with fixed_threads(options.threads), torch.inference_mode():
        engines: dict[str, Callable[[Tensor], list[Tensor]]] = {PYTORCH: backbone.tensors}
        engines[CHANNELS_LAST] = _channels_last(backbone)
        starts = {}
        for engine in get_args(Engine)[1:]:
            start = time.process_time()
            try:
                engines[engine] = CompiledEncoder(backbone, side, engine, options.threads)
            except EngineError as error:
                notes.append(str(error))
            else:
                starts[engine] = time.process_time() - start
        sides = {name: _side(run, images, options.batch_size) for name, run in engines.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
        pictures = drawn_images(method.input)
        wanted = backbone.tensors(pictures)
        apart = {name: largest_difference(run(pictures), wanted)[0] for name, run in engines.items()}
    figures = {
        name: {
            "CPU ms an image": 1000 * turns["seconds_median"] / options.images,
            "CPU seconds to convert": starts.get(name, 0.0),
            "largest difference": apart[name],
        }
        for name, turns in measured.summary().items()
    }
    others = [name for name in engines if name != PYTORCH]
    return write_report(
        options,
        "images",
        measured,
        {f"{name} ÷ {PYTORCH}": measured.ratio(name, PYTORCH) for name in others},
        tables={f"{backbone.config.name}, {side}², batches of {options.batch_size}": figures},
        notes=notes,
    )


def _side(run: Callable[[Tensor], list[Tensor]], images: Tensor, batch_size: int) -> Side:
    def work() -> None:
        for batch in images.split(batch_size):
            run(batch)

    return clocked(len(images), work, time.process_time)


def _channels_last(backbone: Backbone) -> Callable[[Tensor], list[Tensor]]:
    """Return what computes the same with images and convolutions in that memory format."""
    other = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    return lambda images: other.tensors(images.contiguous(memory_format=torch.channels_last))

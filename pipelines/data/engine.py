"""Which engine computes the frozen encoders of a job: chosen once, before its plan is made, for all workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from pipelines.data.image_source import ImageSource
from pipelines.runtime.console import console
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_clock import StageClock
from unianom.data.tensors import normalise
from unianom.encoder_engine import compile_encoders, drawn_images, openvino_is_installed
from unianom.errors import DataError, EngineError
from unianom.execution import Engine, Execution, precision_of
from unianom.methods import Method

REPAYS = 1000
"""Images that one model must run over for more than to repay, in every worker, that its encoder is converted."""

COMPARED = 8
"""Images on which an engine is compared with PyTorch."""


def choose_engine(
    runtime: RuntimeOptions, images: ImageSource, each: int, method: Callable[[], Method]
) -> RuntimeOptions:
    """Return the options with the engine that the job takes.

    "auto" takes OpenVINO where it is installed, there are no GPUs, each model runs over more than `REPAYS` images, and
    the features of some of them are as PyTorch has them; if they are not, that is said.

    Args:
        runtime: of the job.
        images: some that it runs over; the first of them are compared on, or drawn ones if these cannot be read.
        each: how many images each of its models runs over.
        method: makes or loads the method, or one of several with such an encoder.

    Raises:
        EngineError: the engine that was asked for by name cannot be taken.
    """
    asked = runtime.engine
    if asked == "pytorch" or (asked == "auto" and not _repays(runtime, each)):
        return replace(runtime, engine="pytorch")
    engine: Engine = "openvino" if asked == "auto" else asked
    try:
        made = method()
        compile_encoders(made, engine, _first_images(images, made))
    except EngineError as error:
        if asked != "auto":
            raise
        console.print(f"PyTorch runs the encoder: {error}")
        return replace(runtime, engine="pytorch")
    return replace(runtime, engine=engine)


def say_precision(models: Iterable[Mapping[str, Any]], execution: Execution) -> None:
    """Say if models were fitted with an encoder of another precision than the one that now runs: their thresholds are
    of other scores.

    Args:
        models: contents of `model.json`.
        execution: how they are run.
    """
    now = precision_of(execution.engine)
    fitted = {precision_of(model["provenance"].get("engine", "pytorch")) for model in models}
    if fitted - {now}:
        console.print(
            f"note: the encoder runs in {now}, but was run in {', '.join(sorted(fitted - {now}))} when the model was "
            f"fitted: its thresholds are of other scores; fit it again with this --runtime.engine, or choose "
            f"thresholds from these scores with jobs/decide.py"
        )


def _repays(runtime: RuntimeOptions, images: int) -> bool:
    return not runtime.gpus_per_worker and images > REPAYS and openvino_is_installed()


def _first_images(images: ImageSource, method: Method) -> torch.Tensor:
    """Return B×3×S×S normalised images, as many as are compared on or as the first range that has any gives."""
    read = images.open(COMPARED, 1)
    with suppress(DataError):  # the job itself tells of images that cannot be read
        for within in images.ranges():
            for samples in read(within, method.input, StageClock()):
                return normalise([sample.pixels for sample in samples], method.input)
    return drawn_images(method.input)

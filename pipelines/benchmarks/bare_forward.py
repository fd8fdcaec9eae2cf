"""The forward pass of a model's bare backbone, which scoring is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import timm
import torch
from timm.models import is_model_in_modules

from pipelines.runtime.models import load_model
from pipelines.runtime.task_worker import set_threads
from unianom.backbones import VIT_MODULES
from unianom.configs.backbone import BackboneConfig
from unianom.errors import DataError
from unianom.execution import CPU
from unianom.model import Model


def bare_network(model: Model) -> torch.nn.Module:
    """Return the whole timm network of a model's encoder, without a head, with the model's weights.

    Blocks behind the last tap, which the model does not keep, have random weights: they take the same time.
    """
    method: Any = model.method
    config: BackboneConfig = method.config.backbone
    arguments = {**config.options, "num_classes": 0}  # also where the options name a number of classes
    if is_model_in_modules(config.name, VIT_MODULES):
        arguments["img_size"] = method.input.side
    network = timm.create_model(config.name, pretrained=False, **arguments)
    # names in the encoder have its own prefix, and timm's feature lists join the names of stages by "_"
    names = {key.replace(".", "_"): key for key in network.state_dict()}
    state = {key.split(".", 1)[1].replace(".", "_"): value for key, value in method.encoder.state_dict().items()}
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise DataError(
            f"{config.name} of this timm has no weight {unknown[0]}; use the timm that the model was made with"
        )
    network.load_state_dict({names[key]: value for key, value in state.items()}, strict=False)
    return network.eval()


class BareForward:
    """Processes that do nothing but the forward pass of the bare backbone, each on one thread.

    Args:
        model: model folder.
        images: .npy file of N×3×S×S float32.
        batch_size: images in one pass.
        processes: at most so many at the same time.
    """

    def __init__(self, model: str, images: str, batch_size: int, processes: int) -> None:
        arguments = (model, images, batch_size)
        self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _prepare_forward, arguments)
        self._processes = processes

    def __enter__(self) -> BareForward:
        self.run(self._processes)  # every process loads its network
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, processes: int) -> tuple[int, float]:
        """Pass over the images once in each of so many processes at a time; return images passed, and seconds."""
        passes = [future.result() for future in [self._pool.submit(_forward) for _ in range(processes)]]
        start, end = min(p[0] for p in passes), max(p[1] for p in passes)
        return sum(p[2] for p in passes), end - start


_pass: Callable[[], tuple[float, float, int]]
"""One pass over the images, in a process of `BareForward`."""


def _prepare_forward(folder: str, images: str, batch_size: int) -> None:
    global _pass
    set_threads(1)
    model = load_model(folder, CPU)
    config: BackboneConfig = model.method.config.backbone
    network: Any = bare_network(model)
    batches = list(torch.from_numpy(np.load(images)).split(batch_size))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]

    @torch.inference_mode()
    def forward() -> tuple[float, float, int]:
        start = time.time()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            for batch in batches:
                network.forward_features(batch)
        return start, time.time(), sum(len(batch) for batch in batches)

    with torch.inference_mode():
        network.forward_features(batches[0])
    _pass = forward


def _forward() -> tuple[float, float, int]:
    return _pass()

"""How many machines a scoring needs: what its stages take is measured, the rest follows by the formulas of
`sizing_figures`.

    images, model ─▶ stages, workers, disk, in turns ─▶ medians ─▶ cores, bounds, cost, machines ─▶ advice
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.benchmarks.harness import fixed_threads
from pipelines.benchmarks.sizing_figures import Node
from pipelines.benchmarks.sizing_measured import measure_figures
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.benchmarks.sizing_report import metrics_of, sizing_report
from pipelines.benchmarks.sizing_setup import prepare
from pipelines.runtime.tracking import track
from unianom import files
from unianom.errors import OptionError
from unianom.options import flatten, to_plain


def measure_sizing(options: SizingBenchmark) -> dict[str, Any]:
    """Measure the stages of a scoring, and say how many machines it needs.

    Raises:
        OptionError: a node without a core beside those that drive its GPUs, or a GPU was asked for that is not there.
        DataError, ModelError: wrong inputs, or images that cannot be read.
    """
    load = os.getloadavg()[0]
    device = _device(options)
    node = _node(options, device)
    output = files.full_uri(options.output)
    plan = to_plain(replace(options, output=""))
    with (
        track(options.tracking, "benchmark", output, flatten(to_plain(options)), plan=files.digest_of(plan)) as run,
        TemporaryDirectory(prefix="unianom-sizing-", dir=_beside(options.output)) as folder,
        fixed_threads(1),
    ):
        setup = prepare(options, device, folder)
        measured, figures = measure_figures(options, setup, folder, load)
        content = sizing_report(options, node, setup, measured, figures)
        run.metrics(metrics_of(content))
        run.json("sizing.json", content)
    return content


def _device(options: SizingBenchmark) -> str:
    """Return the device that computes."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda, but PyTorch finds no GPU on this machine; leave it out, or take cpu")
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def _node(options: SizingBenchmark, device: str) -> Node:
    """Return the node that is asked about."""
    here = torch.cuda.device_count() if device == "cuda" else 0
    gpus = options.gpus if options.gpus is not None else max(here, 1 if options.gpu_rate else 0)
    node = Node(options.cores or os.cpu_count() or 1, gpus, options.price_per_hour)
    if node.gpus and not options.gpu_rate and not here:
        raise OptionError(f"--gpus {node.gpus}, but no GPU is here to be measured; say what one computes by --gpu_rate")
    if here and not node.gpus:
        raise OptionError("--gpus 0, but a GPU is measured; add --device cpu, to measure what CPUs compute")
    if node.cores <= node.gpus:
        raise OptionError(
            f"a node of {node.named()} has no core left to read and write, for each GPU takes one that drives it; "
            f"give more --cores or fewer --gpus"
        )
    return node


def _beside(output: str) -> str | None:
    """Return the folder that holds the output, made if need be; None for one on an object store."""
    if not files.is_local(output):
        return None
    folder = Path(files.full_uri(output).removeprefix("file://")).parent
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)

"""UniNet's similarities in blocks of rows, against whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from pipelines.benchmarks.harness import clocked, fixed_threads, interleave
from pipelines.benchmarks.memory_peak import resident_peak
from pipelines.benchmarks.options import SimilarityBenchmark
from pipelines.benchmarks.report import write_report
from unianom.methods.uninet import EPSILON, log_similarity

BLOCKS, WHOLE = "in blocks", "whole matrices"


def measure_similarity(options: SimilarityBenchmark) -> dict[str, Any]:
    """Run both ways in turns, and measure memory beyond the maps and how far losses and gradients differ."""
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
    return write_report(
        options, "passes", measured, {f"{BLOCKS} ÷ {WHOLE}": measured.ratio(BLOCKS, WHOLE)}, tables={name: table}
    )


def similarity_step(
    kind: str, count: int, channels: int, side: int, temperature: float, device: str
) -> tuple[float, torch.Tensor]:
    """Run a forward and a backward pass; return the loss, and the gradient of the student's maps."""
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
    gradient, _ = torch.autograd.grad(loss, (student, teacher))
    return float(loss.detach()), gradient.cpu()


def similarity_peak(step: Callable[[str], Any], device: str, threads: int) -> float:
    """Return bytes at the peak of a pass, in a process of its own on the CPU, beyond what it held before."""
    with fixed_threads(threads):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(device)
            return float(torch.cuda.max_memory_allocated())
        before = resident_peak()
        step(device)
        return float(resident_peak() - before)

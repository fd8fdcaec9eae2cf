"""What a sizing tells: what follows from what was measured, tables, notes, advice and MLflow's metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.benchmarks.harness import Measured
from pipelines.benchmarks.report import write_report
from pipelines.benchmarks.sizing_advice import Findings, advice
from pipelines.benchmarks.sizing_disk import FEW_FILES
from pipelines.benchmarks.sizing_figures import (
    COMPUTING,
    CPUS,
    DISK,
    FEEDING,
    GPU,
    PARTS,
    Capacity,
    Node,
    capacity,
    counted,
    disk_limit,
    seconds_of,
)
from pipelines.benchmarks.sizing_measured import Figures
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.benchmarks.sizing_setup import Setup
from unianom.encoder_engine import openvino_is_installed
from unianom.execution import CPU, Execution

SHORT_SECONDS = 1.0
"""Seconds of computing in a turn below which the rate of a GPU says little."""


def capacities(options: SizingBenchmark, node: Node, figures: Figures, read_bytes: float) -> list[Capacity]:
    """Return what a node does at each rate of its GPUs, or without any, by maps kept."""
    found = []
    given: Sequence[float | None] = options.gpu_rate or [None]
    for rate in given:
        for kind, milliseconds in figures.milliseconds.items():
            rates = figures.disk
            disk = disk_limit(read_bytes, rates.read, figures.written[kind], rates.write) if rates.enough else None
            found.append(
                capacity(
                    node,
                    kind,
                    milliseconds,
                    figures.slowdown,
                    disk,
                    figures.gpu_rates.get(kind) if rate is None else rate,
                    options.corpus,
                    options.hours,
                )
            )
    return found


def sizing_report(
    options: SizingBenchmark, node: Node, setup: Setup, measured: Measured, figures: Figures
) -> dict[str, Any]:
    """Write everything to the benchmark's output, and return it."""
    images, policy = setup.images, setup.policy
    nodes = capacities(options, node, figures, images.bytes)
    execution: Execution = setup.arguments["execution"]
    findings = Findings(
        node=node,
        capacities=nodes,
        milliseconds=figures.milliseconds,
        listed=options.shards is None,
        jpeg=images.jpeg,
        short_side=images.short_side / policy.size,
        scaled=policy.decode == "scaled",
        other_engine=execution == CPU and openvino_is_installed(),
        scaling=figures.of_perfect,
        load=figures.load,
        cores=os.cpu_count() or 1,
    )
    return write_report(
        options,
        "images",
        measured,
        {
            f"E({count}) = {counted(count, 'worker')} ÷ (2 × {counted(count // 2, 'worker')})": measured.ratio(
                counted(count, "worker"), counted(count // 2, "worker"), 2
            )
            for count in figures.efficiency
        },
        tables=sizing_tables(options, node, figures, nodes),
        stages=figures.milliseconds,
        scaling={
            "images_per_second": {str(count): rate for count, rate in figures.rates.items()},
            "efficiency": {str(count): value for count, value in figures.efficiency.items()},
            "slowdown": figures.slowdown,
        },
        disk={**asdict(figures.disk), "image_bytes": images.bytes, "written_bytes": figures.written},
        nodes=[{**asdict(one), "gpu_share": one.gpu_share} for one in nodes],
        notes=_notes(options, setup, figures),
        advice=advice(findings),
    )


def sizing_tables(options: SizingBenchmark, node: Node, figures: Figures, nodes: Sequence[Capacity]) -> dict[str, Any]:
    """Return the tables of what was measured and of what follows, by their titles."""
    kinds = {
        kind: f"maps {kind}" + (f" ({options.flagged:.0%})" * (kind == "flagged")) for kind in figures.milliseconds
    }
    parts: dict[str, dict[str, float]] = {
        part: {
            name: _short(figures.milliseconds[kind][part])
            for kind, name in kinds.items()
            if part in figures.milliseconds[kind]
        }
        for part in PARTS
        if any(part in own for own in figures.milliseconds.values())
    }
    for name, summed in ((f"feeding a GPU: {', '.join(FEEDING)}", FEEDING), ("everything", PARTS)):
        parts[name] = {
            column: _short(1000 * seconds_of(figures.milliseconds[kind], summed)) for kind, column in kinds.items()
        }
    unit = "CPU ms an image and core"
    if figures.gpu_rates:
        unit += f"; {', '.join(COMPUTING)}: ms of the GPU"
        del parts["everything"]
    asked = node.named() + ("" if node.price_per_hour is None else f", at {node.price_per_hour:g} an hour")
    if options.corpus is not None:
        asked += f"; machines for {options.corpus:,} images in {options.hours:g} hours"
    table = {f"measured: {unit}, median of {counted(options.rounds, 'round')}": parts}
    scaling = {
        counted(count, "worker"): {
            "images/s": _short(rate),
            "÷ (workers × one)": _short(figures.of_perfect[count]),
        }
        for count, rate in figures.rates.items()
    }
    doing = "reading, decoding and resizing" if figures.gpu_rates else "scoring, maps none"
    table[f"measured: workers of one thread each, {doing}"] = scaling
    table[f"derived: a node of {asked}; limits in images/s"] = {_row_name(node, one): _row(one) for one in nodes}
    return table


def _row_name(node: Node, one: Capacity) -> str:
    if one.gpu_rate is None:
        return f"CPUs alone, maps {one.maps}"
    return f"{node.gpus} × GPU of {one.gpu_rate:,.4g}/s, maps {one.maps}"


def _row(one: Capacity) -> dict[str, Any]:
    """Return the cells of a row; what does not apply is left out."""
    row: dict[str, Any] = {} if one.cores_needed is None else {"cores needed": one.cores_needed}
    row |= {f"{name} limit": _short(one.limits[name]) for name in (GPU, CPUS, DISK) if name in one.limits}
    row |= {"images/s": _short(one.rate), "bound by": one.bound}
    if one.gpu_share is not None:
        row["GPU busy"] = f"{one.gpu_share:.0%}"
    if one.cost is not None:
        row["cost of a million"] = f"{one.cost:,.2f}"
    if one.machines is not None:
        row["machines"] = one.machines
    return row


def _short(value: float) -> float:
    """Return a number in three digits, as many as its measurement has at best."""
    return float(f"{value:.3g}")


def _notes(options: SizingBenchmark, setup: Setup, figures: Figures) -> list[str]:
    """Return what was measured, and what makes figures less certain."""
    images, execution = setup.images, setup.arguments["execution"]
    kept = ", ".join(f"{size / 1000:.2g} kB ({kind})" for kind, size in figures.written.items())
    notes = [
        f"images: {images.named}; {images.bytes / 1000:.3g} kB each, the shorter side {images.short_side:g} pixels",
        f"model: {setup.model}, input {setup.policy.side} × {setup.policy.side}; computed on {execution.device} by "
        f"{execution.engine}, batches of {options.batch_size}",
        f"disk: {figures.disk.read / 1e6:,.3g} MB/s read in {counted(figures.disk.read_files, 'file')}, "
        f"{figures.disk.write / 1e6:,.3g} MB/s written; an image leaves {kept} of scores and maps",
        f"slowdown with all workers at work, by which CPU times are multiplied below: {figures.slowdown:.2f}",
    ]
    if figures.one_worker is not None:
        notes.append(f"a worker that does everything at once takes {figures.one_worker:.3g} CPU ms an image, maps none")
    if not figures.disk.enough:
        notes.append(
            f"disk: {figures.disk.read_bytes / 1e6:.2g} MB of {counted(figures.disk.read_files, 'file')} are too "
            f"little to tell what it allows; give {FEW_FILES} images that are listed, or a larger --sample of shards"
        )
    elif figures.disk.cached:
        notes.append("what the system keeps in memory could not be dropped: the disk may be slower than it seems")
    if figures.unread:
        notes.append(
            f"{counted(figures.unread, 'image')} of the sample could not be read, which makes figures too good"
        )
    if figures.gpu_seconds is not None and figures.gpu_seconds < SHORT_SECONDS:
        notes.append(
            f"the GPU computed for {figures.gpu_seconds:.2g} s in a turn, which is short; give more images by --sample"
        )
    return notes


def metrics_of(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that MLflow records, by name."""
    metrics: dict[str, float] = {
        "slowdown": content["scaling"]["slowdown"],
        "disk/read_bytes_per_second": content["disk"]["read"],
    }
    metrics["disk/write_bytes_per_second"] = content["disk"]["write"]
    for kind, parts in content["stages"].items():
        metrics |= {f"maps_{kind}/{part.replace(' ', '_')}_ms": value for part, value in parts.items()}
    for count, rate in content["scaling"]["images_per_second"].items():
        metrics[f"workers_{count}/images_per_second"] = rate
    metrics |= {f"workers_{count}/efficiency": value for count, value in content["scaling"]["efficiency"].items()}
    for one in content["nodes"]:
        group = f"node_maps_{one['maps']}" + ("" if one["gpu_rate"] is None else f"/gpu_{one['gpu_rate']:g}")
        names = ("cores_needed", "rate", "cost", "machines", "gpu_share")
        metrics |= {f"{group}/{name}": one[name] for name in names if one[name] is not None}
    return metrics

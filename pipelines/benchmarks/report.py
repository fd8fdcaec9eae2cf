"""What a benchmark writes: figures, ratios, and the machine they are from."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import Measured
from pipelines.benchmarks.options import Benchmark
from unianom import files
from unianom.options import to_plain

PEERS = ("anomalib", "adeval")
"""Packages that some benchmarks compare with where they are installed."""


def write_report(
    options: Benchmark, unit: str, measured: Measured, ratios: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Write everything as JSON to the benchmark's output and return it."""
    content = {
        "benchmark": type(options).__name__.removesuffix("Benchmark").lower(),
        "options": to_plain(options),
        "machine": machine_facts(),
        "unit": unit,
        "loads": measured.loads,
        "sides": measured.summary(),
        "ratios": ratios,
        "notes": [],
        **more,
    }
    files.write_json(options.output, content)
    return content


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = ("unianom", "torch", "timm", "ray", "faiss-cpu", "openvino", "numpy", "pillow", "simplejpeg", "pyarrow")
    found = {name: found for name in (*packages, *PEERS) if (found := _version(name)) is not None}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing_peers(peers: Sequence[str]) -> list[str]:
    """Return a note for each package that cannot be compared with."""
    return [f"{name}: not installed; pip install {name}" for name in peers if find_spec(name) is None]

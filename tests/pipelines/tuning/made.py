"""Settings and trials that are made up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LAYERS = (["layer2", "layer3"], ["layer1", "layer2", "layer3"], ["blocks.3", "blocks.6", "blocks.9", "blocks.11"])


def setting(number: int, values: dict[str, Any], objective: float | None, **more: Any) -> dict[str, Any]:
    metrics = {} if objective is None else {"image_auroc": objective}
    made = {"trial": f"trial-{number:04d}", "values": values, "objective": objective, "metrics": metrics}
    return {**made, "by_category": {}, **more}


def many_settings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of every kind of option; the objective hangs on the rate and the pooling."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        values = {
            "method.bank.fraction": float(10 ** generator.uniform(-3, -0.5)),
            "method.backbone.layers": LAYERS[generator.integers(3)],
            "method.k": int(generator.choice([1, 3, 5, 9])),
            "method.bank.normalise_embeddings_before_they_are_searched": bool(generator.integers(2)),
            "smoothing.sigma": float(generator.uniform(0, 8)),
            "top.fraction": None if generator.random() < 0.3 else float(10 ** generator.uniform(-4, -1)),
            "optimiser.rate": float(10 ** generator.uniform(-5, -2)),
            "pooling": str(generator.choice(["max", "mean", "top-$k$"])),
            "fixed": 3,
        }
        rate = math.log10(values["optimiser.rate"])
        objective = 0.98 - 0.02 * (rate + 3.5) ** 2 - 0.03 * (values["pooling"] == "mean")
        made.append(setting(number, values, objective + generator.normal(0, 0.002)))
    return made


def trial(number: int, status: str, objectives: list[float], objective: float | None, **more: Any) -> dict[str, Any]:
    reports = [{"progress": 10 * (place + 1), "objective": value} for place, value in enumerate(objectives)]
    made = {"trial": f"t{number}", "status": status, "error": None, "values": {"k": number}, "reports": reports}
    return {**made, "objective": objective, "seconds": 2.5, "latency_ms": None, "memory_mb": None, **more}

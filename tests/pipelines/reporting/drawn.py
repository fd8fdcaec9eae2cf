"""A small drawn corpus with scores, for tests of reports."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pipelines.reporting.options import ReportOptions
from pipelines.runtime.options import TrackingOptions
from tests.pipelines.evaluated import Scored
from unianom.data.image import InputPolicy

POLICY = InputPolicy("stretch", 64, None)
THRESHOLD = 5.0
HOSTILE = 'disc/test/<script>alert("x")</script>&amp;.png'

untracked = partial(ReportOptions, tracking=TrackingOptions(enabled=False))


def _disc(mask: np.ndarray, seed: int) -> np.ndarray:
    """A noisy image, bright where the mask is."""
    grey = np.random.default_rng(seed).integers(60, 120, mask.shape) + mask // 3
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def drawn_sample(category: str, number: int, label: int, score: float, maps: bool = True, **changes: Any) -> Scored:
    """A sample whose map is 1 on normal pixels and its score on masked ones, plus a ramp that differs by sample."""
    mask = np.zeros((64, 64), np.uint8)
    if label == 1:
        mask[20:30, 24:40] = 255
    anomaly_map = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    anomaly_map[mask > 0] = score
    defect = ("hole" if number % 2 else "scratch") if label else "good"
    sample = Scored(
        name=f"{category}/test/{defect}/{number:03d}.png",
        category=category,
        label=label,
        defect=defect,
        image=_disc(mask, number),
        score=score,
        mask=mask if label else None,
        anomaly_map=anomaly_map if maps else None,
    )
    return replace(sample, **changes)


def drawn_samples(maps: bool = True) -> list[Scored]:
    """Two categories with anomalies, one without, one rejected sample, one without a label, one with a bad name."""
    normal = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.5]
    anomalous = [3.25, 4.5, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0]
    samples = []
    for offset, category in ((0.0, "disc"), (0.25, "stripe")):
        samples += [drawn_sample(category, n, 0, score + offset, maps) for n, score in enumerate(normal)]
        samples += [drawn_sample(category, 50 + n, 1, score + offset, maps) for n, score in enumerate(anomalous)]
    samples += [drawn_sample("plain", n, 0, score, maps) for n, score in enumerate(normal[:4])]
    blank = np.zeros((64, 64, 3), np.uint8)
    samples.append(
        Scored(
            "disc/test/hole/broken.png", "disc", 1, "hole", blank, None, status="corrupt", error="cannot <decode> it"
        )
    )
    samples.append(replace(drawn_sample("disc", 99, 0, 99.0, maps), label=None, defect=None))
    samples.append(drawn_sample("disc", 77, 1, 2.0, maps, name=HOSTILE, mask=None))
    return samples

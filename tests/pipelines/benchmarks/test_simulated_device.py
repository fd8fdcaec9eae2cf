"""The simulated device: how long it takes, and that the real scoring runs its method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmarks import waiting_method
from pipelines.benchmarks.simulated_device import draw_files, link_files, save_model
from pipelines.benchmarks.waiting_method import SimulatedDevice, register
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from unianom.configs import CONFIGS
from unianom.methods import METHODS


class Clock:
    """Time that passes only where something waits; sleep takes a tenth of a second longer than it was asked to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 0.1 * (seconds > 0)


def test_it_takes_as_long_as_its_rate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each batch, from the end of the last where it was asked for before; what sleep adds does not
    add up."""
    clock = Clock()
    monkeypatch.setattr(waiting_method, "time", clock)
    device, ended = SimulatedDevice(100), []
    for asked in (0.0, 0.2, 0.4, 5.0):
        clock.now = max(clock.now, asked)
        device.compute(50, asked)
        ended.append(clock.now)
    np.testing.assert_allclose(ended, [0.6, 1.1, 1.6, 5.6])


def test_the_real_scoring_flags_the_share_that_was_drawn(tmp_path: Path) -> None:
    register()
    try:
        sources = tmp_path / "sources"
        sources.mkdir()
        draw_files(sources, 10, 224, flagged=0.2)
        link_files(sources, tmp_path / "images", 25)
        save_model(tmp_path / "model", 1e6, tmp_path / "log")
        scores = score(
            ScoreOptions(
                str(tmp_path / "model"),
                output=str(tmp_path / "scores"),
                images=(str(tmp_path / "images"),),
                maps="flagged",
                batch_size=4,
                runtime=RuntimeOptions(local=True, workers=1, engine="pytorch"),
            )
        ).scores
    finally:
        METHODS.pop("waiting", None)
        CONFIGS.pop("waiting", None)
    rows = [
        row
        for part in scores.parts
        for batch in scores.read(part, None, ["sample_id", "decision", "anomaly_map"])
        for row in batch.to_pylist()
    ]
    failed = {number for number in range(25) if number % 10 < 2}
    assert {int(row["sample_id"][-13:-4]) for row in rows if row["decision"] == "fail"} == failed
    assert {int(row["sample_id"][-13:-4]) for row in rows if row["anomaly_map"] is not None} == failed
    batches = [line.split() for path in (tmp_path / "log").iterdir() for line in path.read_text().splitlines()]
    assert len(batches) == 7
    assert all(float(began) <= float(ended) for began, ended in batches)

"""The simulated device: how long it takes, and that images go through the stages around it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.benchmarks import simulated_device
from pipelines.benchmarks.simulated_device import ReadFiles, SimulatedDevice, WriteScores, draw_files
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_steps import InOneProcess
from pipelines.runtime.stages import Stages
from unianom.data.image import InputPolicy, decode_prepared

POLICY = InputPolicy(resize="stretch", size=32, crop=None)


class Clock:
    """Time that passes only where something waits; sleep takes a tenth of a second longer than it was asked to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 0.1 * (seconds > 0)


class TurnAt:
    """A turn that another task has until some time."""

    def __init__(self, clock: Clock, time: float) -> None:
        self.clock, self.time = clock, time

    def __enter__(self) -> None:
        self.clock.now = max(self.clock.now, self.time)

    def __exit__(self, *_: object) -> None:
        pass


def test_it_takes_as_long_as_its_rate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each block, from the end of the last where there is one; what sleep adds does not add up."""
    clock = Clock()
    monkeypatch.setattr(simulated_device, "time", clock)
    device, ended = SimulatedDevice(rate=100, maps=0), []
    for asked in (0.0, 0.2, 0.4, 5.0):
        turn: Any = TurnAt(clock, clock.now)
        clock.now = asked
        device.compute(Block({"pixels": np.zeros((50, 8, 8, 3), np.uint8)}), StageClock(), turn)
        ended.append(clock.now)
    np.testing.assert_allclose(ended, [0.6, 1.1, 1.6, 5.6])


def test_images_go_through_all_stages(tmp_path: Path) -> None:
    sources, output = tmp_path / "sources", tmp_path / "output"
    sources.mkdir()
    output.mkdir()
    draw_files(sources, 3, 48)
    stages = Stages(
        partial(ReadFiles, str(sources), POLICY), partial(SimulatedDevice, 1e9, 0.5), partial(WriteScores, str(output))
    )
    result = InOneProcess(stages).run({"start": 2, "end": 6})
    assert result["images"] == 4
    table = pq.read_table(output / "000000002.parquet")
    assert table["sample_id"].to_pylist() == ["2", "3", "4", "5"]
    files = sorted(sources.iterdir())
    pixels = [decode_prepared(files[number % 3].read_bytes(), POLICY) for number in range(2, 6)]
    assert table["score"].to_pylist() == [int(image[0, 0, 0]) for image in pixels]
    assert table["map"].is_null().to_pylist() == [False, False, True, True]

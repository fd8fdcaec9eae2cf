"""Tasks in three stages on Ray: they do what one process does, overlap, stay bounded, and survive what dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipelines.runtime.device_turn import Turn
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_pipeline import pipeline, pool_size
from pipelines.runtime.stage_steps import InOneProcess
from pipelines.runtime.stage_times import STAGE_TIMES, StageTimes
from pipelines.runtime.stages import Stages, run_staged
from pipelines.runtime.task_worker import ENDED, STARTED
from unianom.errors import DataError, ModelError, OptionError

pytestmark = pytest.mark.ray

ONE = RuntimeOptions(workers=1)


def die_once(folder: str, stage: str, task: int) -> None:
    """Be killed, as by the kernel, in the middle of one task of each stage."""
    marker = Path(folder) / f"killed {stage}"
    if task == {"read": 2, "compute": 5, "write": 8}[stage] and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def in_shared_memory(array: np.ndarray) -> bool:
    """Return whether an array lies in memory that processes share, as Ray's object store is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access = line.split()[:2]
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= array.ctypes.data < end:
            return access.endswith("s")
    return False


class Draw:
    """Draws pixels, of no, one or two images; refuses what is damaged."""

    def __init__(self, side: int, deadly: str = "") -> None:
        self.side, self.deadly = side, deadly

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        number = task["number"]
        if self.deadly:
            die_once(self.deadly, "read", number)
        if task.get("damaged"):
            raise DataError(f"part {number} is damaged; make it again")
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (number % 3, self.side, self.side, 3), np.uint8)
        with clock.stage("draw"):
            rows = pa.table({"name": [f"{number}.{row}" for row in range(len(pixels))]})
        return Block(
            {"pixels": pixels}, rows, {"number": number, "wait": bool(task.get("wait")), "read by": os.getpid()}
        )


class Mean:
    """Computes means, and notes how many threads are at it."""

    def __init__(self, deadly: str = "", broken: bool = False) -> None:
        if broken:
            raise ModelError("the model is damaged; fit it again")
        self.deadly = deadly
        self.present = self.inside = self.most_present = self.most_inside = 0
        self.lock, self.two = threading.Lock(), threading.Event()

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        if self.deadly:
            die_once(self.deadly, "compute", block.plain["number"])
        with self.lock:
            self.present += 1
            self.most_present = max(self.most_present, self.present)
            if self.present == 2:
                self.two.set()
        with turn, clock.stage("mean"):
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            if block.plain["wait"]:
                self.two.wait(20)  # for another task that comes while this one has its turn
            means = block.arrays["pixels"].mean((1, 2, 3))
            self.inside -= 1
        with self.lock:
            self.present -= 1
        seen = {
            "present": self.most_present,
            "inside": self.most_inside,
            "computed by": os.getpid(),
            "shared": in_shared_memory(block.arrays["pixels"]),
        }
        return Block({"mean": means}, block.rows, {**block.plain, **seen})


class Save:
    """Writes them."""

    def __init__(self, folder: str, deadly: str = "") -> None:
        self.folder, self.deadly = Path(folder), deadly

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        if self.deadly:
            die_once(self.deadly, "write", task["number"])
        assert block.rows is not None
        part = self.folder / f"{task['number']}.part"
        part.write_text("\n".join(map(str, [*block.rows["name"].to_pylist(), *block.arrays["mean"].tolist()])))
        part.rename(part.with_suffix(".txt"))
        return {"number": task["number"], **block.plain}


SIDE = 256
"""Ray keeps what is below 100 kB out of its object store, and an image of this side in it."""


def stages(output: Path, deadly: str = "") -> Stages:
    output.mkdir()
    return Stages(partial(Draw, SIDE, deadly), partial(Mean, deadly), partial(Save, str(output), deadly))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_three_stages_do_what_one_process_does_and_overlap(tmp_path: Path) -> None:
    tasks: list[dict[str, Any]] = [{"number": number} for number in range(12)]
    one = InOneProcess(stages(tmp_path / "one"))
    for task in tasks:
        one.run(task)
    before = time.time()
    tasks[0]["wait"] = True
    results = list(run_staged(stages(tmp_path / "apart"), tasks, ONE))
    assert contents(tmp_path / "apart") == contents(tmp_path / "one")
    assert sorted(result["number"] for result in results) == list(range(12))
    assert all(before <= result[STARTED] <= result[ENDED] <= time.time() for result in results)
    readers, computers = ({result[by] for result in results} for by in ("read by", "computed by"))
    assert len(computers) == 1
    assert not readers & computers
    assert all(result["shared"] for result in results if result["number"] % 3)  # pixels are not copied once more
    assert max(result["present"] for result in results) == 2  # one computes, the other is fetched or handed on
    assert {result["inside"] for result in results} == {1}
    times = StageTimes()
    for result in results:
        times.add(result)
    assert {part for _, part in times.cpu} == {"draw", "mean"}
    assert times.busy > 0
    assert set(results[0][STAGE_TIMES]["wall"]) == {"read", "compute", "write"}
    assert list(run_staged(stages(tmp_path / "none"), [], ONE)) == []


def test_killed_processes_of_every_stage_lose_nothing(tmp_path: Path) -> None:
    tasks = [{"number": number} for number in range(12)]
    one = InOneProcess(stages(tmp_path / "one"))
    for task in tasks:
        one.run(task)
    deadly = tmp_path / "deadly"
    deadly.mkdir()
    results = list(run_staged(stages(tmp_path / "apart", str(deadly)), tasks, ONE))
    assert sorted(path.name for path in deadly.iterdir()) == ["killed compute", "killed read", "killed write"]
    assert sorted(result["number"] for result in results) == list(range(12))
    assert contents(tmp_path / "apart") == contents(tmp_path / "one")


def test_an_error_is_told_as_it_was_raised_and_ends_the_workers(tmp_path: Path) -> None:
    tasks = [{"number": number, "damaged": number == 6} for number in range(9)]
    with pytest.raises(DataError, match="part 6 is damaged; make it again"):
        list(run_staged(stages(tmp_path / "apart"), tasks, ONE))
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_error_in_making_a_stage_is_told_as_it_was_raised(tmp_path: Path) -> None:
    broken = Stages(partial(Draw, SIDE), partial(Mean, broken=True), partial(Save, str(tmp_path)))
    with pytest.raises(ModelError, match="the model is damaged; fit it again"):
        list(run_staged(broken, [{"number": 1}], ONE))


class Slow:
    """Writes slowly, and says how many blocks were read and not written."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        time.sleep(0.1)
        names = [path.name[0] for path in self.folder.iterdir()]
        (self.folder / f"written {task['number']}").touch()
        return {"held": names.count("r") - names.count("w")}


class Note:
    """Makes blocks of a megabyte, and notes each."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        (self.folder / f"read {task['number']}").touch()
        return Block({"pixels": np.zeros((1, 1 << 10, 1 << 10), np.uint8)})


class Pass:
    """Computes nothing."""

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        return block


def test_a_slow_writer_stops_the_stages_before_it(tmp_path: Path) -> None:
    """Blocks of 1 MiB, of which 8 may be held; without a bound there are ten and more."""
    bounded = Stages(partial(Note, str(tmp_path)), Pass, partial(Slow, str(tmp_path)))
    tasks = [{"number": number} for number in range(30)]
    held = [result["held"] for result in run_staged(bounded, tasks, ONE, held_bytes=8 << 20)]
    assert len(held) == 30
    assert max(held) <= 8


def test_a_cluster_that_is_too_small_is_told() -> None:
    assert pool_size(ONE, 9, 3) == 1
    assert pool_size(RuntimeOptions(), 9, 1) == 3  # of four CPUs, one reads and writes
    assert pool_size(RuntimeOptions(), 2, 1) == 2
    assert pool_size(RuntimeOptions(), 9, 0) == 1
    with pytest.raises(OptionError, match="for a worker that computes, 4 more and 0 GPUs; this Ray has 4 CPUs and 0 G"):
        pool_size(ONE, 9, 4)
    with pytest.raises(OptionError, match="0 more and 1 GPUs; this Ray has 4 CPUs and 0 GPUs"):
        pool_size(RuntimeOptions(gpus_per_worker=1), 9, 0)


def test_a_pipeline_for_gpus_can_be_made(tmp_path: Path) -> None:
    """Ray Data has demands of its own where there are GPUs, which it makes before anything runs."""
    options = RuntimeOptions(gpus_per_worker=0.5)
    made = pipeline(stages(tmp_path / "apart"), [{"number": 1}], options, compute_cpus=0, size=1, held_bytes=None)
    assert "MapBatches(_Compute)" in str(made)

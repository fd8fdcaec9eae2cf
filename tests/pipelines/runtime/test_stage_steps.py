"""Stages without Ray: what they hand to each other, whose turn it is, errors, times and what is made of them."""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.runtime import device_turn, stage_steps
from pipelines.runtime.device_turn import Device, Turn
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_blocks import Block, block_from_arrow, block_to_arrow
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_steps import InOneProcess, StageMaker, compute_step, read_step, write_step
from pipelines.runtime.stage_times import STAGE_TIMES, StageTimes, fused_sentence
from pipelines.runtime.stages import Stages
from pipelines.runtime.task_worker import ENDED, ERROR, STARTED, error_from_plain
from pipelines.runtime.threads import run_on_threads
from unianom.errors import DataError


# ------------------------------------------------------------------------------------------------------------- blocks
def test_a_block_comes_back_as_it_was() -> None:
    arrays = {
        "pixels": np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8),
        "score": np.array([0.5, np.nan, np.inf], np.float32),
        "places": np.array([7, 8, 9]),
        "none": np.empty((0, 4, 4), np.float32),
        "turned": np.arange(6).reshape(2, 3).T,
        "one": np.array(3.5),
    }
    rows = pa.table({"sample_id": ["a", "b", None], "label": pa.array([0, None, 1], pa.int8())})
    found = block_from_arrow(block_to_arrow(Block(arrays, rows, {"model": "m", "list": [1, None]})))
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert found.rows is not None
    assert found.rows.equals(rows)
    assert found.plain == {"model": "m", "list": [1, None]}


def test_a_block_of_nothing_comes_back() -> None:
    found = block_from_arrow(block_to_arrow(Block()))
    assert (found.arrays, found.rows, found.plain) == ({}, None, {})


def test_pixels_are_not_copied_and_cannot_be_changed() -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    table = block_to_arrow(Block({"pixels": pixels}))
    assert table.num_rows == 1  # which nobody splits
    found = block_from_arrow(table).arrays["pixels"]
    assert found.ctypes.data == pixels.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    again = block_from_arrow(table.slice(0, 1)).arrays["pixels"]
    assert again.ctypes.data == pixels.ctypes.data


def test_python_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="array names holds Python objects"):
        block_to_arrow(Block({"names": np.array(["a", None], object)}))


# -------------------------------------------------------------------------------------------------------------- turns
def test_busy_and_waiting_time_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task has the device from 10 to 13 and 14 to 16, another from 16.5 to 20."""
    now = iter([10.0, 13.0, 14.0, 16.0, 16.5, 20.0])
    monkeypatch.setattr(device_turn.time, "monotonic", lambda: next(now))
    device = Device()
    first, second = Turn(device), Turn(device)
    for turn in (first, first, second):
        with turn:
            pass
    assert (first.busy, first.waited) == (5.0, 1.0)
    assert (second.busy, second.waited) == (3.5, 0.5)


def test_one_thread_computes_while_another_prepares() -> None:
    """The second task is prepared while the first has its turn, and has its own when that ends, be it by an error."""
    device, inside, prepared = Device(), threading.Event(), threading.Event()
    order: list[str] = []

    def fail() -> None:
        with Turn(device):
            inside.set()
            assert prepared.wait(10)
            order.append("first")
            raise DataError("broken")

    def first() -> None:
        with pytest.raises(DataError):
            fail()

    def second() -> None:
        assert inside.wait(10)
        prepared.set()  # so it is not held up by the other's turn
        with Turn(device):
            order.append("second")

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize(("kind", "kept"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_a_task_keeps_a_device_between_batches_if_that_computes_by_itself(kind: str, kept: bool) -> None:
    device = Device()
    task, batch = device_turn.for_task_and_batch(Turn(device), kind)
    with task:
        with batch:
            assert device.lock.locked()
        assert device.lock.locked() is kept
    assert not device.lock.locked()


def test_a_stage_is_made_before_its_first_task_and_its_error_is_that_of_the_task(tmp_path: Path) -> None:
    marker = tmp_path / "there"
    maker = StageMaker(pickle.dumps(partial(_read_text, marker)), 1)
    maker.begin()  # fails, and says nothing
    with pytest.raises(FileNotFoundError):
        maker()
    marker.write_text("made")
    maker.begin()
    marker.unlink()
    assert maker() == "made"


def _read_text(path: Path) -> str:
    return path.read_text()


# -------------------------------------------------------------------------------------------------------------- steps
class Count:
    """Reads numbers."""

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        if task.get("broken") == "read":
            raise DataError("this part is damaged; make it again")
        with clock.stage("list"):
            numbers = np.arange(task["count"])
        return Block(
            {"numbers": numbers}, pa.table({"name": [str(n) for n in numbers]}), {"broken": task.get("broken")}
        )


class Square:
    """Squares them."""

    def __init__(self, power: int) -> None:
        self.power = power

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        if block.plain["broken"] == "compute":
            raise KeyError("no such thing")
        with turn, clock.stage("power"):
            return Block({"powers": block.arrays["numbers"] ** self.power}, block.rows, block.plain)


class Add:
    """Adds them up."""

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        if block.plain["broken"] == "write":
            raise OSError(28, "No space left on device", "/out/x")
        assert block.rows is not None
        with clock.stage("list"), clock.stage("sum"):
            return {"sum": int(block.arrays["powers"].sum()), "names": block.rows["name"].to_pylist(), **task}


STAGES = Stages(Count, partial(Square, 2), Add)


def makers(stages: Stages) -> list[StageMaker]:
    return [StageMaker(pickle.dumps(make), 1) for make in (stages.read, stages.compute, stages.write)]


def run_steps(task: dict[str, Any], stages: Stages = STAGES) -> dict[str, Any]:
    read, compute, write = makers(stages)
    return write_step(write, compute_step(compute, Device(), read_step(read, task)))


def test_three_steps_do_what_one_process_does() -> None:
    task = {"count": 4, "list": [1, 2]}
    apart, together = run_steps(task), InOneProcess(STAGES).run(task)
    for result in (apart, together):
        times = result.pop(STAGE_TIMES)
        assert {stage: set(parts) for stage, parts in times["cpu"].items()} == {
            "read": {"list"},
            "compute": {"power"},
            "write": {"list", "sum"},
        }
        assert set(times["wall"]) == {"read", "compute", "write"}
        assert 0 < times["busy"] <= times["wall"]["compute"]
        assert times["waited"] == 0
    assert apart.pop(STARTED) <= apart.pop(ENDED) <= time.time()
    assert apart == together == {"sum": 14, "names": ["0", "1", "2", "3"], **task}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("read", "DataError: this part is damaged; make it again"),
        ("compute", "WorkerError: KeyError: 'no such thing'"),
        ("write", "MachineError: the disk is full at /out/x"),
    ],
)
def test_an_error_of_any_step_is_the_result_of_its_task(broken: str, words: str) -> None:
    result = run_steps({"count": 4, "broken": broken})
    assert list(result) == [ERROR]
    error = error_from_plain(result[ERROR])
    assert f"{type(error).__name__}: {error.args[0]}".startswith(words)


class Alive:
    """Counts blocks that are in memory at the same time, of all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.made = 0

    def block(self, arrays: dict[str, np.ndarray]) -> Block:
        """Return a block that is counted until nobody has it any more."""
        block = Block(arrays)
        with self.lock:
            self.now, self.made = self.now + 1, self.made + 1
            self.most = max(self.most, self.now)
        weakref.finalize(block, self.gone)
        return block

    def gone(self) -> None:
        with self.lock:
            self.now -= 1


ALIVE = Alive()


class Slow:
    """All three stages, of which one takes longer than the others."""

    def __init__(self, slow: str) -> None:
        self.slow = slow

    def take_long(self, stage: str) -> None:
        if stage == self.slow:
            time.sleep(0.005)

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        block = ALIVE.block({"pixels": np.zeros(10)})
        self.take_long("read")
        return block

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        with turn:
            self.take_long("compute")
            return ALIVE.block({"score": block.arrays["pixels"] + 1})

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        self.take_long("write")
        return {"sum": float(block.arrays["score"].sum())}


@pytest.mark.parametrize("slow", ["read", "compute", "write"])
@pytest.mark.parametrize("workers", [1, 3])
def test_memory_is_bounded_whichever_stage_is_slow(slow: str, workers: int) -> None:
    """However many tasks there are, each worker holds what it reads, or what it computes on and what comes of it."""
    ALIVE.most = ALIVE.made = 0
    make = partial(Slow, slow)
    options = RuntimeOptions(local=True, workers=workers)
    tasks = [{"number": number} for number in range(40)]
    results = list(run_on_threads(InOneProcess, {"stages": Stages(make, make, make)}, tasks, options, 40))
    assert [result["sum"] for result in results] == [10.0] * 40
    assert ALIVE.made == 80
    assert 2 <= ALIVE.most <= 2 * workers
    gc.collect()
    assert ALIVE.now == 0


def refuse() -> Any:
    raise DataError("nothing to read here")


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_error_in_making_a_stage_is_the_result_of_its_task(stage: str) -> None:
    made = {"read": STAGES.read, "compute": STAGES.compute, "write": STAGES.write, stage: refuse}
    assert run_steps({"count": 4}, Stages(**made)) == {ERROR: ["DataError", "nothing to read here"]}


def make_slowly() -> object:
    time.sleep(0.01)
    return object()


def test_a_stage_is_made_once_and_threads_are_set_in_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    set_in: list[tuple[int, int]] = []
    monkeypatch.setattr(stage_steps, "set_threads", lambda count: set_in.append((threading.get_ident(), count)))
    maker = StageMaker(pickle.dumps(make_slowly), 3)
    made: list[object] = []
    together = threading.Barrier(3)

    def use() -> None:
        together.wait(10)
        made.extend([maker(), maker()])

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 6
    assert len(set(map(id, made))) == 1
    assert len(set_in) == len(set(set_in)) == 3
    assert {count for _, count in set_in} == {3}


# -------------------------------------------------------------------------------------------------------------- times
def times_of(busy: float, waited: float, read: float, write: float) -> StageTimes:
    """Of two tasks: CPU 2 s to read and 6 s to decode, 1 s to write; the processes took `read` and `write` seconds."""
    times = StageTimes()
    for _ in range(2):
        times.add(
            {
                STAGE_TIMES: {
                    "cpu": {
                        "read": {"read": 1.0, "decode": 3.0},
                        "compute": {"predict": 0.25},
                        "write": {"write": 0.5},
                    },
                    "wall": {"read": read / 2, "compute": 9.0, "write": write / 2},
                    "busy": busy / 2,
                    "waited": waited / 2,
                }
            }
        )
    return times


PARTS = "read 2, decode 6, predict 0.5, write 1 CPU ms an image; "


@pytest.mark.parametrize(
    ("busy", "waited", "read", "write", "words"),
    [
        (97.0, 3.0, 10.0, 2.0, "the device was busy 97% of the time: it is the bottleneck"),
        (9.0, 1.0, 10.0, 2.0, "the device was busy 90% of the time: it is the bottleneck"),
        (
            60.0,
            40.0,
            10.0,
            2.0,
            "the device was busy 60% of the time: it waited for reading, of which decode takes most; more CPUs help",
        ),
        (
            60.0,
            40.0,
            16.1,
            2.0,
            "the device was busy 60% of the time: it waited for reading, and that for where the images lie",
        ),
        (
            1.0,
            3.0,
            10.0,
            12.0,
            "the device was busy 25% of the time: it waited for writing, and that for where results are written to",
        ),
    ],
)
def test_the_bottleneck_is_named(busy: float, waited: float, read: float, write: float, words: str) -> None:
    assert times_of(busy, waited, read, write).sentence(1000) == PARTS + words


def test_a_job_that_computed_nothing_has_a_sentence() -> None:
    assert "busy 0% of the time" in StageTimes().sentence(0)


def test_what_fused_stages_took_is_told_by_part() -> None:
    assert fused_sentence({"read": 0.1, "decode": 0.5, "predict": 1.4}, 100) == (
        "read 1, decode 5, predict 14 CPU ms an image; predict takes 70% of that"
    )
    assert fused_sentence({}, 0) == ""

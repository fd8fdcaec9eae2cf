"""Where tasks run, and threads of this process: what they do, how they fail, and that they share nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.runtime import actors
from pipelines.runtime.errors import WorkerError, reason
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.task_worker import ENDED, STARTED, set_threads
from pipelines.runtime.tasks import SMALL, run_tasks, runs_here
from pipelines.runtime.threads import thread_count
from unianom.errors import DataError, OptionError

HERE = RuntimeOptions(local=True)


@pytest.mark.parametrize(
    ("local", "address", "joined", "images", "here"),
    [
        (None, "", False, SMALL, True),
        (None, "", False, SMALL + 1, False),
        (None, "10.0.0.1:6379", False, 1, False),
        (None, "", True, 1, False),
        (True, "10.0.0.1:6379", True, 10 * SMALL, True),
        (False, "", False, 1, False),
    ],
)
def test_where_tasks_run(
    monkeypatch: pytest.MonkeyPatch, local: bool | None, address: str, joined: bool, images: int, here: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: joined))
    assert runs_here(RuntimeOptions(local=local), images) is here


@pytest.mark.parametrize(
    ("options", "tasks", "images", "threads"),
    [
        (RuntimeOptions(local_cpus=8), 16, 1000, 8),
        (RuntimeOptions(local_cpus=8), 16, 100, 3),
        (RuntimeOptions(local_cpus=8), 16, 3, 1),
        (RuntimeOptions(local_cpus=8, cpus_per_worker=4), 16, 1000, 2),
        (RuntimeOptions(local_cpus=2, cpus_per_worker=4), 16, 1000, 1),
        (RuntimeOptions(local_cpus=8), 2, 1000, 2),
        (RuntimeOptions(local_cpus=8, workers=5), 16, 3, 5),
        (RuntimeOptions(local_cpus=8, gpus_per_worker=1), 16, 1000, 1),
        (RuntimeOptions(local_cpus=8, gpus_per_worker=0.5, workers=2), 16, 1000, 1),
    ],
)
def test_the_number_of_threads(options: RuntimeOptions, tasks: int, images: int, threads: int) -> None:
    assert thread_count(options, tasks, images) == threads


class Doubler:
    """Doubles numbers, and tells in which thread, of how many threads of PyTorch; refuses seven, fails at six."""

    def __init__(self, seen: list[int], wait: float = 0.0) -> None:
        self._seen, self._wait = seen, wait

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["number"] == 6:
            raise MemoryError("an array of 9 TB\ncannot be made")
        if task["number"] == 7:
            raise DataError("seven is damaged; make it again")
        time.sleep(self._wait)
        self._seen.append(task["number"])
        place = threading.get_ident()
        return {"double": 2 * task["number"], "seen": tuple(self._seen), "in": place, "torch": torch.get_num_threads()}


def test_every_task_is_done_once_by_workers_that_share_nothing() -> None:
    given: list[int] = []
    options = RuntimeOptions(local=True, workers=3, cpus_per_worker=2)
    set_threads(1)
    results = list(run_tasks(Doubler, {"seen": given, "wait": 0.01}, [{"number": n} for n in range(6)], options, 6))
    assert sorted(result["double"] for result in results) == [0, 2, 4, 6, 8, 10]
    assert given == [], "workers have copies"
    assert 2 <= len({result["in"] for result in results}) <= 3
    assert threading.get_ident() not in {result["in"] for result in results}
    for result in results:
        assert result["seen"][-1] == result["double"] // 2, "a list, as from Ray"
        assert isinstance(result["seen"], list)
        assert result["torch"] == 2
        assert result[STARTED] <= result[ENDED]
    own = {place: [r["double"] // 2 for r in results if r["in"] == place] for place in {r["in"] for r in results}}
    for place, numbers in own.items():
        longest = max((r["seen"] for r in results if r["in"] == place), key=len)
        assert sorted(longest) == sorted(numbers), "a worker has seen its own tasks only"
    assert torch.get_num_threads() == 1, "as before"


def test_errors_are_raised_as_on_ray() -> None:
    with pytest.raises(DataError, match="seven is damaged; make it again"):
        list(run_tasks(Doubler, {"seen": []}, [{"number": n} for n in (1, 7, 2)], HERE, 3))
    with pytest.raises(WorkerError) as raised:
        list(run_tasks(Doubler, {"seen": []}, [{"number": 6}], HERE, 1))
    assert reason(raised.value) == "MemoryError: an array of 9 TB cannot be made"
    assert "in run\n" in raised.value.trace


class Marker:
    """Leaves a file for each task that it has begun; refuses the first."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        (self._folder / str(task["number"])).touch()
        if task["number"] == 0:
            raise DataError("refused")
        return {}


def test_after_an_error_nothing_is_begun(tmp_path: Path) -> None:
    """Else a thread would go on writing into an output that the job has given up."""
    tasks = [{"number": number} for number in range(50)]
    with pytest.raises(DataError, match="refused"):
        list(run_tasks(Marker, {"folder": str(tmp_path)}, tasks, RuntimeOptions(local=True, workers=1), 50))
    begun = len(list(tmp_path.iterdir()))
    time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == begun < 50


def test_what_needs_ray_says_so_where_it_may_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(OptionError, match=r"this job needs Ray; leave out --runtime.local"):
        actors.connect(HERE)


SLOW = """
import time
from pipelines.runtime.cli import run
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.tasks import run_tasks

class Slow:
    def run(self, task):
        print("begun", flush=True)
        time.sleep(600)

def main(options):
    list(run_tasks(Slow, {}, [{}], RuntimeOptions(local=True), 1))

run(main, RuntimeOptions, [])
"""


def test_ctrl_c_does_not_wait_for_a_task() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said == "error: interrupted; the same command continues\n"


LOST = """
import signal, threading, time
from pipelines.runtime.cli import run
from pipelines.runtime.options import RuntimeOptions

def receive():
    time.sleep(1)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

def main(options):
    threading.Thread(target=receive, daemon=True).start()
    threading.Event().wait()

run(main, RuntimeOptions, [])
"""


def test_a_signal_that_does_not_wake_the_main_thread_ends_the_job() -> None:
    """As one does that another thread receives, or that comes just before the main thread waits."""
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: terminated; the same command continues\n")

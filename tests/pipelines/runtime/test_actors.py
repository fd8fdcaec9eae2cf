"""Units of work on a pool of actors: all are done, and what fails is told as it was raised."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.runtime import actors, stage_pipeline
from pipelines.runtime.actors import lost_error
from pipelines.runtime.errors import WorkerError, reason, user_error
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.task_worker import ENDED, STARTED, error_from_plain, error_to_plain
from pipelines.runtime.tasks import run_tasks
from unianom.errors import DataError, MachineError, ModelError, OptionError


class Doubler:
    """Doubles numbers; refuses seven, or to be made at all."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise ModelError("the model is damaged; fit it again")

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["number"] == 6:
            raise MemoryError("an array of 9 TB\ncannot be made")
        if task["number"] == 7:
            raise DataError("seven is damaged; make it again")
        return {"number": task["number"], "double": 2 * task["number"]}


@pytest.mark.ray
def test_every_unit_is_done_once_and_tells_when(ray_cluster: None) -> None:
    tasks = [{"number": number} for number in range(6)]
    before = time.time()
    results = list(run_tasks(Doubler, {}, tasks, RuntimeOptions(workers=3), 0))
    assert sorted((r["number"], r["double"]) for r in results) == [(number, 2 * number) for number in range(6)]
    assert all(before <= r[STARTED] <= r[ENDED] <= time.time() for r in results)
    assert list(run_tasks(Doubler, {}, [], RuntimeOptions(workers=3), 0)) == []


@pytest.mark.ray
def test_an_error_in_a_unit_is_told_as_it_was_raised(ray_cluster: None) -> None:
    tasks = [{"number": number} for number in range(9) if number != 6]
    with pytest.raises(DataError, match="seven is damaged; make it again"):
        list(run_tasks(Doubler, {}, tasks, RuntimeOptions(workers=2), 0))


@pytest.mark.ray
def test_an_error_in_making_a_worker_is_told_as_it_was_raised(ray_cluster: None) -> None:
    with pytest.raises(ModelError, match="the model is damaged; fit it again"):
        list(run_tasks(Doubler, {"broken": True}, [{"number": 1}], RuntimeOptions(workers=1), 0))


@pytest.mark.ray
def test_an_unexpected_error_in_a_unit_comes_with_its_reason_first(ray_cluster: None) -> None:
    """Ray Data's own exception ends in a hint about retries, and tells only of itself."""
    with pytest.raises(WorkerError) as raised:
        list(run_tasks(Doubler, {}, [{"number": 6}], RuntimeOptions(workers=1), 0))
    assert reason(raised.value) == "MemoryError: an array of 9 TB cannot be made"
    assert "in run\n" in raised.value.trace
    assert user_error(raised.value) is None


class DiesOnce:
    """A worker that is killed, as by the kernel, in the middle of its first task."""

    def __init__(self, marker: str) -> None:
        self._marker = Path(marker)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["number"] == 3 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": task["number"]}


@pytest.mark.ray
def test_a_killed_worker_loses_nothing(ray_cluster: None, tmp_path: Path) -> None:
    tasks = [{"number": number} for number in range(12)]
    arguments = {"marker": str(tmp_path / "died")}
    done = [r["number"] for r in run_tasks(DiesOnce, arguments, tasks, RuntimeOptions(workers=2), 0)]
    assert (tmp_path / "died").exists()
    assert sorted(done) == list(range(12))


def chain(outer: Exception, inner: BaseException) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("a"), DataError("a")),
        (chain(RuntimeError("wrapped"), ModelError("b")), ModelError("b")),
        (OSError(28, "No space left on device", "/out/x"), MachineError("the disk is full at /out/x; free space")),
        (KeyError("c"), WorkerError("KeyError: 'c'")),
        (chain(RuntimeError("the\n  first line\nthe hint"), KeyError("c")), WorkerError("RuntimeError: the first")),
    ],
)
def test_an_error_told_as_data_is_raised_as_it_was(error: Exception, expected: Exception) -> None:
    found = error_from_plain(error_to_plain(error))
    assert type(found) is type(expected)
    assert found.args[0].startswith(expected.args[0])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.OutOfDiskError("spilled"), "the disk is full where Ray keeps what does not fit in memory"),
        (ray.exceptions.OutOfMemoryError("x"), "a machine ran out of memory"),
        (ray.exceptions.ActorDiedError(), "a worker was lost"),
    ],
)
def test_what_ray_loses_is_a_fault_of_the_machine(error: Exception, words: str) -> None:
    found = lost_error(chain(RuntimeError("outer"), error))
    assert isinstance(found, MachineError)
    assert str(found).startswith(words)


def failing_init(error: Exception, said: bytes = b"") -> Any:
    def init(**_: Any) -> None:
        os.write(2, said)  # as native code does
        raise error

    return init


@pytest.mark.parametrize(
    ("error", "address", "words"),
    [
        (
            ray.exceptions.AuthenticationError("InvalidAuthToken"),
            "10.0.0.1:6379",
            "the Ray at 10.0.0.1:6379 refuses this process's token; give the cluster's own by RAY_AUTH_TOKEN",
        ),
        (
            chain(RuntimeError("Failed to connect"), ray.exceptions.AuthenticationError("InvalidAuthToken")),
            "10.0.0.1:6379",
            "the Ray at 10.0.0.1:6379 refuses this process's token",
        ),
        (
            ConnectionError("no\nanswer"),
            "10.0.0.1:6379",
            "no Ray can be joined at RAY_ADDRESS=10.0.0.1:6379 (ConnectionError: no answer); check that the cluster",
        ),
        (
            RuntimeError("too few files"),
            "",
            "no Ray can be started on this machine (RuntimeError: too few files); free",
        ),
        (OSError(28, "No space left on device", "/tmp/ray/s"), "", "the disk is full at /tmp/ray/s; free space"),
    ],
)
def test_a_ray_that_cannot_be_had_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str, words: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", failing_init(error))
    monkeypatch.setattr(actors, "_knock", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MachineError) as raised:
        actors.connect(RuntimeOptions())
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_a_refused_token_is_known_by_what_native_code_says(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = b"gcs_client.cc:210: Failed to get cluster ID: Unauthenticated: RPC error: InvalidAuthToken\n"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", failing_init(ConnectionError("Failed to connect"), said))
    monkeypatch.setattr(actors, "_knock", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(MachineError, match=r"the Ray at 10.0.0.1:6379 refuses this process's token; .*RAY_AUTH_TOKEN"):
        actors.connect(RuntimeOptions())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Ray itself would try for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", failing_init(AssertionError("not to be called")))
    monkeypatch.setattr(actors, "KNOCKING", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MachineError, match=rf"no Ray can be joined at RAY_ADDRESS={address} \(ConnectionRefusedError"):
        actors.connect(RuntimeOptions())


@pytest.mark.parametrize("address", ["auto", "local", "here"])
def test_an_address_without_a_port_is_left_to_ray(address: str) -> None:
    actors._knock(address)


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A cluster of four CPUs, without an autoscaler."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    for module in (actors, stage_pipeline):
        monkeypatch.setattr(module, "grows", lambda: False)
    return monkeypatch


def test_workers_are_those_that_fit(four_cpus: pytest.MonkeyPatch) -> None:
    assert actors.pool_size(RuntimeOptions(), 9) == 4
    assert actors.pool_size(RuntimeOptions(workers=6), 9) == 4
    assert actors.pool_size(RuntimeOptions(cpus_per_worker=2), 9, least=8) == 2
    with pytest.raises(OptionError, match="a worker needs 5 CPUs and 0 GPUs; this Ray has 4 CPUs and 0 GPUs"):
        actors.pool_size(RuntimeOptions(cpus_per_worker=5), 9)


def test_a_cluster_that_grows_is_asked_for_the_workers_that_are_named(four_cpus: pytest.MonkeyPatch) -> None:
    for module in (actors, stage_pipeline):
        four_cpus.setattr(module, "grows", lambda: True)
    gpus = RuntimeOptions(gpus_per_worker=1)
    assert actors.pool_size(RuntimeOptions(workers=6), 9) == 6
    assert actors.pool_size(RuntimeOptions(workers=6), 5) == 5
    assert actors.pool_size(RuntimeOptions(), 9) == 4
    assert actors.pool_size(gpus, 9) == 1  # there is none yet
    assert actors.pool_size(gpus, 9, least=3) == 3
    assert stage_pipeline.pool_size(gpus, 9, 0) == 1
    assert stage_pipeline.pool_size(RuntimeOptions(workers=6, gpus_per_worker=1), 9, 0) == 6
    assert stage_pipeline.pool_size(RuntimeOptions(), 9, 1) == 3
    assert stage_pipeline.pool_size(RuntimeOptions(), 9, 8) == 1

"""Locks between processes: real ones on disk, and holders written by hand for other machines."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pipelines.runtime import locks
from pipelines.runtime.locks import BusyError, Holder, exclusive
from unianom import files
from unianom.errors import DataError

HOLD = """
import sys, time
from pipelines.runtime.locks import exclusive
with exclusive(sys.argv[1], "it"):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.fixture(params=["local", "memory"])
def lock(request, tmp_path):
    """Path or URI of a lock that nobody holds."""
    if request.param == "local":
        yield str(tmp_path / "folder" / "_lock.json")
    else:
        root = f"memory://test-{uuid.uuid4().hex}"
        yield f"{root}/_lock.json"
        files.remove(root)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "SETTLE", 0.0)
    monkeypatch.setattr(locks, "POLL", 0.05)


def hold(path):
    """Another process that holds a lock until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_goes_with_the_block(lock):
    with exclusive(lock, "it"):
        holder = Holder.parse(files.read_bytes(lock))
        assert holder.process == os.getpid()
        assert not holder.is_dead(holder.seen)
    assert not files.exists(lock)


def test_a_full_disk_is_named_and_keeps_no_lock(tmp_path, monkeypatch):
    path = str(tmp_path / "_lock.json")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError) as raised, exclusive(path, "it"):
            pass
    assert raised.value.filename == path
    assert not files.exists(path)
    with exclusive(path, "it"):
        pass


def test_a_process_may_take_its_own_lock_again(lock):
    with exclusive(lock, "it"):
        with exclusive(lock, "it"):
            pass
        assert files.exists(lock)
    assert not files.exists(lock)


def test_another_process_is_told_who_is_at_work(tmp_path):
    path = str(tmp_path / "_lock.json")
    process = hold(path)
    sentence = rf"process {process.pid} on \S+ has been at work on it since \d{{4}}-.* UTC"
    with pytest.raises(BusyError, match=sentence), exclusive(path, "it"):
        pass
    process.communicate("\n")
    with exclusive(path, "it"):
        pass
    assert not os.path.exists(path)  # noqa: PTH110


def test_a_holder_that_has_not_written_yet_who_it_is_is_waited_for(tmp_path, monkeypatch):
    path = str(tmp_path / "_lock.json")
    process = hold(path)
    content = files.read_bytes(path)
    os.truncate(path, 0)
    looks = iter([lambda: None, lambda: Path(path).write_bytes(content)])
    monkeypatch.setattr(locks, "SETTLE", 60.0)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: next(looks)())
    with pytest.raises(BusyError, match=f"process {process.pid} on "), exclusive(path, "it"):
        pass
    process.communicate("\n")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, capfd):
    path = str(tmp_path / "_lock.json")
    process = hold(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.path.exists(path)  # noqa: PTH110
    with exclusive(path, "it"):
        assert Holder.parse(files.read_bytes(path)).process == os.getpid()
    assert f"process {process.pid} on " in capfd.readouterr().err
    process.stdin.close()
    process.stdout.close()


def test_waiting_takes_the_lock_once_it_is_free(tmp_path, capfd):
    path = str(tmp_path / "_lock.json")
    process = hold(path)
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace('"it")', '"it", wait=True)'), path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr.readline().startswith(f"waiting for process {process.pid} on ")
    assert process.communicate("\n")[0] == "left\n"
    assert waiting.communicate("\n")[0] == "held\nleft\n"


def foreign(**changes):
    values = {"boot": "another", "host": "far", "seen": time.time(), **changes}
    return dataclasses.replace(Holder.this_process(), **values)


def test_a_holder_on_another_machine_counts_by_its_sign_of_life(lock):
    files.write_bytes(lock, foreign().content())
    sentence = r"on far .*if it is dead, run the same command again in 3 minutes"
    with pytest.raises(BusyError, match=sentence), exclusive(lock, "it"):
        pass
    files.write_bytes(lock, foreign(seen=time.time() - locks.PATIENCE - 1).content())
    if "://" not in lock:
        os.utime(lock, (time.time(), time.time() - locks.PATIENCE - 1))
    with exclusive(lock, "it"):
        assert Holder.parse(files.read_bytes(lock)).process == os.getpid()


def test_a_dead_process_of_this_machine_counts_for_nothing_on_a_store(monkeypatch):
    uri = f"memory://test-{uuid.uuid4().hex}/_lock.json"
    reused = dataclasses.replace(Holder.this_process(), started="1", seen=time.time())
    files.write_bytes(uri, reused.content())  # its number is another process's by now
    with exclusive(uri, "it"):
        pass
    alive = dataclasses.replace(Holder.this_process(), seen=0.0)  # silent, but there
    files.write_bytes(uri, alive.content())
    with pytest.raises(BusyError), exclusive(uri, "it"):
        pass
    files.remove(uri)


def test_of_two_that_take_over_one_wins(monkeypatch):
    uri = f"memory://test-{uuid.uuid4().hex}/_lock.json"
    files.write_bytes(uri, foreign(seen=0.0).content())
    rival = foreign()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: files.write_bytes(uri, rival.content()))
    with pytest.raises(BusyError), exclusive(uri, "it"):
        pass
    assert Holder.parse(files.read_bytes(uri)).token == rival.token
    files.remove(uri)


def test_a_beat_is_a_sign_of_life_and_a_lost_lock_is_left_to_its_new_holder(lock):
    with exclusive(lock, "it"):
        held = locks._held[files.full_uri(lock)]
        if "://" not in lock:
            os.utime(lock, (0, 0))
        before = files.read_bytes(lock)
        time.sleep(0.01)
        assert held.beat()
        assert files.read_bytes(lock) != before or os.stat(lock).st_mtime > 0  # noqa: PTH116
        rival = foreign().content()
        if "://" not in lock:
            os.remove(lock)  # noqa: PTH107
        files.write_bytes(lock, rival)
        assert not held.beat()
    assert files.read_bytes(lock) == rival


def test_a_disk_without_locks_of_the_kernel_goes_by_the_process(tmp_path, monkeypatch):
    path = str(tmp_path / "_lock.json")
    monkeypatch.setattr(locks, "_flock", lambda descriptor: (False, False))
    process = hold(path)
    with pytest.raises(BusyError), exclusive(path, "it"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with exclusive(path, "it"):
        pass


def test_a_file_that_is_no_lock_stays(tmp_path):
    path = tmp_path / "_lock.json"
    path.write_text("mine")
    with pytest.raises(DataError, match="is no lock that a job wrote"), exclusive(str(path), "it"):
        pass
    assert path.read_text() == "mine"

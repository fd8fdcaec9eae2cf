"""Databases on disk that are gone afterwards, however the process ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unianom.errors import MachineError
from unianom.temporary_database import CACHE, temporary_database

FILL = """
import os, signal
from unianom.temporary_database import CACHE, temporary_database
with temporary_database() as database:
    database.execute("create table blobs (content)")
    for _ in range(3 * CACHE >> 20):
        database.execute("insert into blobs values (zeroblob(1 << 20))")
    print(*(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if
            os.path.islink(f"/proc/self/fd/{name}")), sep="\\n", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells by /proc which files are open")
def test_a_killed_process_leaves_nothing(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("SQLITE_TMPDIR", None)
    done = subprocess.run([sys.executable, "-c", FILL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(line.startswith(str(tmp_path)) for line in done.stdout.splitlines()), "it was on disk"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told():
    message = r"cannot be kept on disk \(database or disk is full\); free space .* TMPDIR"
    with pytest.raises(MachineError, match=message):
        fill_a_small_disk()


def fill_a_small_disk():
    with temporary_database() as database:
        database.execute("create table blobs (content)")
        database.execute("pragma max_page_count = 10")
        database.execute("insert into blobs values (zeroblob(1000000))")


def test_each_is_empty_and_holds_a_bounded_amount_in_memory():
    for _ in range(2):
        with temporary_database() as database:
            database.execute("create table names (name)")
            assert database.execute("select count(*) from names").fetchone() == (0,)
            assert database.execute("pragma cache_size").fetchone() == (-CACHE // 1024,)
            assert database.execute("pragma temp_store").fetchone() == (1,), "sorts are on disk, too"

"""Jobs submitted to a running Ray that asks for a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.conftest import Small
from unianom.data.shards import ShardSet

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(token: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of the dashboard of a head node of its own, and its token."""
    token, dashboard = secrets.token_hex(16), free_port()
    temporary = tempfile.mkdtemp(prefix="head-", dir="/tmp")  # Ray's sockets need a short path
    # the port of the job agent is a fixed one, which the Ray of the other tests holds already
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--temp-dir={temporary}", *(f"--{name}={port}" for name, port in ports.items())]
    with (tmp_path_factory.mktemp("head") / "head.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment(token), start_new_session=True, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            deadline = time.monotonic() + 180
            # the job agent is ready some time after the port is open
            while (attempt := submit(address, token, "--version")).returncode != 0:
                assert process.poll() is None, f"the head node ended early: {Path(log.name).read_text()[-2000:]}"
                assert time.monotonic() < deadline, f"the head node takes no jobs: {attempt.stderr[-2000:]}"
                time.sleep(1)
            yield address, token
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # asked to end, it takes half a minute
            process.wait(60)
            shutil.rmtree(temporary, ignore_errors=True)


def submit(address: str, token: str, *command: str) -> subprocess.CompletedProcess[str]:
    line = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", "python", *command]
    return subprocess.run(
        line, cwd=REPOSITORY, env=environment(token), capture_output=True, text=True, timeout=240, check=False
    )


def test_a_submitted_job_runs_on_the_cluster(head: tuple[str, str], small: Small, tmp_path: Path) -> None:
    address, token = head
    arguments = ["--layout", "mvtec", "--source", str(small.corpus), "--output", str(tmp_path / "shards")]
    done = submit(address, token, "jobs/ingest.py", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "shard set written" in done.stdout + done.stderr
    assert ShardSet.open(tmp_path / "shards").digest == ShardSet.open(small.shards).digest


def test_a_wrong_token_is_refused(head: tuple[str, str]) -> None:
    refused = submit(head[0], secrets.token_hex(16), "jobs/ingest.py", "--help")
    assert refused.returncode != 0
    assert "authentication" in (refused.stdout + refused.stderr).lower()


def test_a_failing_job_fails_its_submission(head: tuple[str, str], tmp_path: Path) -> None:
    arguments = ["--layout", "mvtek", "--source", str(tmp_path), "--output", str(tmp_path / "shards")]
    failed = submit(*head, "jobs/ingest.py", *arguments)
    assert failed.returncode != 0
    assert "did you mean 'mvtec'" in failed.stdout + failed.stderr

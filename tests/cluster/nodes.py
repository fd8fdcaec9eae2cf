"""A Ray of several nodes on this machine: a head and workers as processes of their own, with a token."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.cluster.manifests import ROOT

STORE = 100 << 20
"""Bytes of each node's object store, which lies in this machine's memory."""

IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of processes that are in every node."""


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """A process of `ray start` and all that it starts.

    Args:
        arguments: of `ray start`.
        environment: of the process.
        log: file that its output is added to.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        # Ray's sockets need a short path; with one folder for all, a node would remove what others still use
        self._folder = tempfile.mkdtemp(prefix="node-", dir="/tmp")
        command = ["ray", "start", "--block", "--disable-usage-stats", f"--object-store-memory={STORE}"]
        command += [f"--temp-dir={self._folder}", f"--dashboard-agent-listen-port={free_port()}", *arguments]
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=stream, stderr=stream
            )

    def ended(self) -> bool:
        """Return whether the node is no more."""
        return self._process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return what the node has started."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def works(self) -> bool:
        """Return whether one of its workers has something to do, as its title says."""
        titles = map(_title, self.processes())
        return any(title.startswith("ray::") and not title.startswith(IDLE) for title in titles)

    def kill(self) -> None:
        """kill -9 of all its processes at once."""
        processes = self.processes()
        for process in processes:  # none does anything between the first and the last
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
        return process.cmdline()[0]
    return ""


@dataclass
class Cluster:
    """A head without CPUs of its own, and worker nodes of one CPU.

    Attributes:
        workers: worker nodes that live.
        jobs: the head's job API.
    """

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    workers: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {
            **kept,
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # a node that is dead is known to be so after seconds
            "RAY_health_check_period_ms": "1000",
            # a checkpoint waits until Ray Train asks for it
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }
        self._headers = {"Authorization": f"Bearer {self.token}"}
        self._port, self._dashboard = free_port(), free_port()
        self.start_head()

    @property
    def address(self) -> str:
        """URL of the dashboard."""
        return f"http://127.0.0.1:{self._dashboard}"

    def start_head(self) -> None:
        """Start the head, and wait until it takes jobs."""
        arguments = ["--head", "--num-cpus=0", f"--port={self._port}"]
        arguments += [f"--dashboard-port={self._dashboard}"]
        self.head = Node(arguments, self._environment, self.folder / "head.log")
        deadline = time.monotonic() + 120
        while True:
            with suppress(requests.ConnectionError, ConnectionError, RuntimeError):
                self.jobs = JobSubmissionClient(self.address, headers=self._headers)
                return
            assert not self.head.ended(), (self.folder / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the head takes no jobs"
            time.sleep(0.5)

    def have_workers(self, count: int) -> None:
        """Start worker nodes in place of those that are no more, and wait until all have joined."""
        self.workers = [node for node in self.workers if not node.ended()]
        deadline = time.monotonic() + 300
        while self._alive() > 1 + len(self.workers):  # one that was killed is missed after some seconds
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while len(self.workers) < count:
            assert time.monotonic() < deadline, (self.folder / "workers.log").read_text()[-2000:]
            arguments = [f"--address=127.0.0.1:{self._port}", "--num-cpus=1"]
            node = Node(arguments, self._environment, self.folder / "workers.log")
            if self._joins(node):
                self.workers.append(node)
            else:  # Ray gives a node 30 s to start, which a busy machine may not manage
                node.kill()

    def _joins(self, node: Node) -> bool:
        """Wait until the head knows of a node more; return whether it does."""
        deadline = time.monotonic() + 60
        while self._alive() < 2 + len(self.workers):
            if node.ended() or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def _alive(self) -> int:
        """Return how many nodes the head knows that live, itself among them."""
        answer = requests.get(f"{self.address}/nodes?view=summary", headers=self._headers, timeout=30)
        nodes = answer.json()["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def submit(self, *arguments: str) -> str:
        """Submit `python …` with this repository as its working folder; return the job's name."""
        command = " ".join(["python", *arguments])
        return self.jobs.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "excludes": ["/tests"]})

    def running(self, job: str) -> bool:
        """Return whether a job has not ended."""
        return not self.jobs.get_job_status(job).is_terminal()

    def finish(self, job: str) -> str:
        """Wait for a job's success; return its output."""
        deadline = time.monotonic() + 240
        while self.running(job):
            assert time.monotonic() < deadline, self.jobs.get_job_logs(job)[-2000:]
            time.sleep(0.2)
        output = self.jobs.get_job_logs(job)
        assert self.jobs.get_job_status(job) == JobStatus.SUCCEEDED, output[-3000:]
        return output

    def stop(self) -> None:
        """Kill all that lives."""
        for node in [*self.workers, self.head]:
            if not node.ended():
                node.kill()


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a head and two worker nodes."""
    made = Cluster(folder)
    try:
        made.have_workers(2)
        yield made
    finally:
        made.stop()

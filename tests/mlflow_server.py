"""MLflow's own server, as a process of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.postgresql import free_port


class Server:
    """A server that can be stopped, and started again at the same address.

    Args:
        database: URI of its database.
        artifacts: URI below which it stores the artifacts that clients send to it.
        environment: variables by which it finds that store.
        folder: where it runs and keeps its log.
    """

    def __init__(self, database: str, artifacts: str, environment: Mapping[str, str], folder: Path) -> None:
        self._port = free_port()
        self._options = ["--backend-store-uri", database, "--artifacts-destination", artifacts, "--workers", "1"]
        self._environment = {**os.environ, **environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        given = [*self._options, "--host", "127.0.0.1", "--port", str(self._port), *options]
        log = self._folder / "mlflow.log"
        with log.open("ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *given],
                env=self._environment,
                cwd=self._folder,
                stdout=said,
                stderr=said,
                start_new_session=True,  # the process that answers is a child of it
            )
        self._process = process
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with suppress(OSError):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.uri}/health").close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"MLflow's server did not start: {log.read_text()}")

    def stop(self) -> None:
        """Kill it: asked to end, it takes five seconds."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def serving(database: str, artifacts: str, environment: Mapping[str, str], folder: Path) -> Iterator[Server]:
    """Start a server, and stop it with the block; arguments are those of `Server`."""
    server = Server(database, artifacts, environment, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()

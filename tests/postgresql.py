"""PostgreSQL as Debian installs it: a server of its own in a temporary folder, never run by root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def missing() -> str | None:
    """Return what is missing to start PostgreSQL here; None if nothing is."""
    if _programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and not _user():
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def serving() -> Iterator[str]:
    """Start a server, and end it with the block; yields the URI of an empty database."""
    programs, user, port = _programs(), _user(), free_port()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # not pytest's, which no other user may enter
    data, log = folder / "data", folder / "log"
    try:
        if user:
            shutil.chown(folder, **user)
        options = ["-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run([programs / "initdb", "-D", data, *options], check=True, capture_output=True, cwd=folder, **user)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        given = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with log.open("wb") as said:
            process = subprocess.Popen([programs / "postgres", "-D", data, *given], stderr=said, cwd=folder, **user)
        try:
            _await(process, port, log)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown, which waits for no client
            process.wait()
    finally:
        shutil.rmtree(folder)


def _programs() -> Path | None:
    """Return the folder of the newest installed version's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


def _user() -> dict[str, Any]:
    """Return whom to run PostgreSQL as: where root runs the tests its own user, else who runs them."""
    if os.geteuid() != 0:
        return {}
    try:
        found = pwd.getpwnam("postgres")
    except KeyError:
        return {}
    return {"user": found.pw_uid, "group": found.pw_gid}


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}")

"""What the tests of the command line share: the checkout and its command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def unianom() -> Run:
    """Run the console command of this checkout."""

    def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
        command = [sys.executable, "-m", "jobs", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def command_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH, in which the command lies as if it were installed."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "unianom"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m jobs "$@"\n'
    )
    script.chmod(0o755)
    return folder

"""Memory of a process at its peak."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from unianom.errors import OptionError


def added_peak(work: Callable[[], float]) -> float:
    """Return the MB that a piece of work adds to the peak of a process of its own, which only ever rises."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result() / 1e6


def resident_peak() -> int:
    """Return the bytes of memory that this process ever held; getrusage would count its parent's, too."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError as error:
        raise OptionError("memory on the CPU is measured on Linux alone; take --device cuda") from error
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> None:
    """Let the peak of this process begin anew at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")

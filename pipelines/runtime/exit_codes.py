"""Exit codes of jobs, and the end of one that was only asked something."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

DONE, FAILED, WRONG_OPTIONS = 0, 1, 2


def show(text: str) -> NoReturn:
    """Print what was asked for in place of work, and end; whoever reads it, such as `head`, may have had enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes at its end
    sys.exit(DONE)

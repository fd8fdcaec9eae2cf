"""What is printed of a fitted model."""

from __future__ import annotations

from pipelines.runtime.cli import console
from pipelines.training.per_category import FitResult


def print_fit(result: FitResult) -> None:
    """Print where the model lies, what it was made of, and its thresholds with what they promise."""
    done = "fitted" if result.fresh else "was fitted already"
    console.print(f"model {done}: {result.folder} ({', '.join(result.categories)}: {result.summary})")
    for line in result.threshold_lines():
        console.print(line)
    if result.notice:
        console.print(result.notice)

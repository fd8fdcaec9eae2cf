"""What jobs/tune.py prints of campaigns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.runtime.cli import console, print_table
from pipelines.tuning.statuses import STATUSES
from pipelines.tuning.summary import GAIN_COLUMNS, TOP, gain_table, left_undone, setting_table
from pipelines.tuning.wording import UNDEFINED, duration


def print_campaign(content: Mapping[str, Any]) -> None:
    """Print the best settings, how the trials ended, what categories would gain, and what was left undone."""
    columns, rows = setting_table(content)
    if rows:
        print_table("best settings", columns, rows)
    counts = content["counts"]
    columns = ["trials", *STATUSES, "settings", "time"]
    row = [f"{counts.get(key, 0):,}" for key in columns[:-1]]
    print_table("trials", columns, [[*row, duration(content["seconds"])]])
    gain = gain_table(content)
    if gain:
        print_table("gain of a setting for each category", GAIN_COLUMNS, gain, footer=1)
    for sentence in left_undone(content):
        console.print(f"note: {sentence}")
    for error in content["errors"][:TOP]:
        console.print(f"  {error['trial']}: {error['error']}")
    if len(content["errors"]) > TOP:
        console.print(f"  and {len(content['errors']) - TOP} more")


def print_diagnosis(diagnosis: Mapping[str, Any]) -> None:
    """Print how validation and test images agree."""
    rows = []
    for name, found in diagnosis["campaigns"].items():
        settings, test = found["settings"], found["test"]
        reached = [test[key] for key in ("default", "chosen", "best_on_test")]
        numbers = [settings["spearman"], found["trials"]["spearman"], *reached]
        rows.append([name, str(settings["n"]), *(UNDEFINED if value is None else f"{value:.4f}" for value in numbers)])
    columns = [
        "diagnosis on the test split",
        "settings",
        "rank correlation",
        "of trials",
        "default",
        "chosen",
        "best there",
    ]
    print_table("", columns, rows)
    console.print(diagnosis["about"])

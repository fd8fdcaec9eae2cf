"""What jobs/benchmark.py prints."""

from __future__ import annotations

from typing import Any

from pipelines.runtime.cli import console, print_table


def print_report(content: dict[str, Any]) -> None:
    """Print sides, ratios and what else a benchmark found, as tables."""
    unit = content["unit"]
    rows = [
        [name, f"{s['seconds_min']:.3f}", f"{s['seconds_median']:.3f}", f"{s['rate_median']:.5g}"]
        for name, s in content["sides"].items()
    ]
    print_table(f"{content['benchmark']}: turns", ["side", "min s", "median s", f"{unit}/s (median)"], rows)
    rows = [[name, *(f"{r[key]:.3f}" for key in ("median", "min", "max"))] for name, r in content["ratios"].items()]
    if rows:
        print_table("ratios, round by round", ["ratio", "median", "min", "max"], rows)
    for title, table in content.get("tables", {}).items():
        columns = list(dict.fromkeys(key for row in table.values() for key in row))
        rows = [[name, *(_cell(row.get(key)) for key in columns)] for name, row in table.items()]
        print_table(title, ["", *columns], rows)
    for note in content["notes"]:
        console.print(note)
    machine = content["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; load average {min(content['loads']):.2f} to "
        f"{max(content['loads']):.2f}; Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    )
    for sentence in content.get("advice", []):
        console.print(f"→ {sentence}")


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

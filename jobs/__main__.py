"""The console command `unianom`: list the jobs, or run one of them."""

from pathlib import Path

from pipelines.runtime.command import run_command

GROUPS = {
    "First steps": ("inspect", "demo", "weights"),
    "From images to a report": ("ingest", "train", "score", "evaluate", "decide", "report"),
    "Better models": ("tune", "calibrate", "compare"),
    "In production": ("serve", "export"),
    "Studies": ("low_shot", "semantic", "cluster_anomalies", "benchmark"),
}
"""Headings of the list, and the order below each. Jobs are found by their files: one not named here comes last."""


def main() -> None:
    """Run the command with this process's arguments."""
    run_command(Path(__file__).parent, GROUPS)


if __name__ == "__main__":
    main()

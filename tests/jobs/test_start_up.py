"""The command line of every job: help and wrong options answer before anything heavy is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FIRST_WORD = {
    "train": "uniad",
    "tune": "patchcore",
    "weights": "patchcore",
    "semantic": "patchcore",
    "low_shot": "patchcore",
    "benchmark": "pipe",
}
"""Jobs whose first argument chooses the options, and one choice."""

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.name.startswith("_"))

HEAVY = ["torch", "timm", "ray", "mlflow", "scipy.stats", "sklearn", "matplotlib", "pandas"]

SCRIPT = """
import json, runpy, sys
path, heavy, calls = json.loads(sys.argv.pop())
for arguments, code in calls:
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
        ended = None
    except SystemExit as error:
        ended = error.code
    assert ended == code, (arguments, ended)
    found = [name for name in heavy if name in sys.modules]
    assert not found, (arguments, found)
"""


@pytest.mark.parametrize("job", JOBS)
def test_help_and_wrong_options_load_nothing_heavy(job):
    first = [FIRST_WORD[job]] if job in FIRST_WORD else []
    calls = [
        ([*first, "--help"], 0),
        ([*first, "--help-all"], 0),
        (["--complete", *first, "--"], 0),
        ([*first, "--print_config"], 0),
        ([*first, "--no_such_option", "1"], 2),
        ([*first, "--runtime.workers", "0"], 2),
    ]
    if first:
        calls += [(["--help"], 0), ([], 2), (["no_such_choice"], 2)]
    argument = json.dumps([str(ROOT / "jobs" / f"{job}.py"), HEAVY, calls])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--help" in done.stdout
    assert "no_such_option" in done.stderr


def test_workers_of_an_ingest_load_no_network():
    """Neither the job's own process nor a worker that reads parts needs PyTorch."""
    heavy = ["torch", "timm", "mlflow", "scipy.stats", "sklearn", "matplotlib", "pandas"]
    script = (
        "import json, sys\n"
        "import pipelines.data.ingest, pipelines.data.ingest_part, pipelines.data.ingest_summary\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"

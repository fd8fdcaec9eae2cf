"""The console command: every job by its name, and the list of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from jobs.__main__ import GROUPS
from pipelines.runtime.command import find_jobs, listed
from tests.jobs.conftest import ROOT, Run

JOBS = find_jobs(ROOT / "jobs")


def test_it_lists_every_job_once_with_the_first_line_of_its_docstring(unianom: Run) -> None:
    done = unianom()
    assert done.returncode == 0
    assert done.stdout == unianom("--help").stdout
    lines = done.stdout.splitlines()
    for name, path in JOBS.items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:19}{first}"]
    assert max(map(len, lines)) <= 90


def test_the_chain_stands_in_its_order() -> None:
    text = listed(JOBS, GROUPS)
    chain = [name for name in ("inspect", "ingest", "train", "score", "evaluate", "decide", "report") if name in JOBS]
    places = [text.index(f"\n  {name} ") for name in chain]
    assert places == sorted(places)
    assert "Others:" not in text  # every job of this package has its place


def test_the_list_imports_nothing_but_what_python_brings() -> None:
    code = (
        "import sys; sys.argv = ['unianom']\n"
        "try:\n    from jobs.__main__ import main; main()\nexcept SystemExit: pass\n"
        "print([n for n in ('numpy', 'yaml', 'rich', 'fsspec', 'pyarrow', 'torch', 'ray') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_job_hides_a_module_of_python() -> None:
    """`python jobs/NAME.py` looks for every import in jobs/ first, and so do its workers."""
    assert not {path.stem for path in JOBS.values()} & sys.stdlib_module_names


def test_a_job_may_have_the_name_of_a_module_of_python(tmp_path) -> None:
    (tmp_path / "inspect_.py").write_text('"""Look."""')
    (tmp_path / "__main__.py").write_text('"""Not a job."""')
    assert find_jobs(tmp_path) == {"inspect": tmp_path / "inspect_.py"}


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["trian"], 2, "error: unknown job 'trian'; did you mean 'train'?\n"),
        (["cluster-anomaly"], 2, "error: unknown job 'cluster-anomaly'; did you mean 'cluster_anomalies'?\n"),
        (["zzz"], 2, "error: unknown job 'zzz'; unianom lists the jobs\n"),
        (["completion", "tcsh"], 2, "error: name one shell, such as unianom completion bash; known: bash, zsh, fish\n"),
        (["train", "patchcor"], 2, "error: unknown 'patchcor'; did you mean 'patchcore'?\n"),
        (["score", "--modle", "m"], 2, "error: unrecognized arguments: --modle m; did you mean --model?\n"),
        (["report", "--evaluation", "nowhere", "--output", "x.html"], 1, "error: "),
    ],
)
def test_exit_codes_and_errors_are_those_of_the_jobs(unianom: Run, tmp_path, arguments, code, error) -> None:
    done = unianom(*[str(tmp_path / a) if a in ("nowhere", "x.html") else a for a in arguments])
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_it_runs_the_jobs_own_file(unianom: Run) -> None:
    done = unianom(
        "cluster-anomalies", "--model", "m", "--shards", "s", "--output", "o", "--seed", "7", "--print-config"
    )
    assert done.returncode == 0
    file = subprocess.run(
        [
            sys.executable,
            "jobs/cluster_anomalies.py",
            "--print_config",
            "--model=m",
            "--shards=s",
            "--output=o",
            "--seed=7",
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == file.stdout
    assert "seed: 7" in done.stdout


def test_it_says_its_version(unianom: Run) -> None:
    import unianom as package

    assert unianom("--version").stdout == f"unianom {package.__version__}\n"


def test_help_names_the_command_as_it_was_called(unianom: Run) -> None:
    assert unianom("train", "patchcore", "--help").stdout.startswith("usage: unianom train patchcore --output VALUE ")
    assert json.dumps(unianom("train", "--help").stdout).count("unianom train NAME") == 2


def test_who_has_read_enough_may_go(command_folder) -> None:
    for arguments in ("", "train patchcore --help-all", "train patchcore --print_config"):
        code = f"{command_folder}/unianom {arguments} | true"
        done = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""

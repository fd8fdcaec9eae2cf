"""What the shells offer to complete."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.runtime.command import SHELLS, find_jobs
from pipelines.runtime.completion import candidates, script
from pipelines.training.options import train_options
from tests.jobs.conftest import ROOT, Run

TRAIN = train_options()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["uni"], ["uniad", "unias", "uniformaly", "uninet"]),
        (["patchcore", "--per"], ["--per_category"]),
        (["patchcore", "--per-c"], ["--per-category"]),
        (["patchcore", "--me"], ["--method."]),
        (["patchcore", "--method.pre"], ["--method.preset"]),
        (["patchcore", "--method.bank.n"], ["--method.bank.nlist", "--method.bank.nprobe"]),
        (["patchcore", "--method.preset", ""], ["paper", "reference"]),
        (["patchcore", "--method.preset", "=", "ref"], ["reference"]),
        (["patchcore", "--method.preset", "="], ["paper", "reference"]),
        (["patchcore", "--method.preset=ref"], ["--method.preset=reference"]),
        (["patchcore", "--overwrite", ""], ["true", "false"]),
        (["patchcore", "--overwrite", "--see"], ["--seed"]),
        (["patchcore", "--calibrate", ""], ["cada", "classifier", "labels", "null"]),
        (["patchcore", "--method.backbone.precision", "b"], ["bf16"]),
        (["patchcore", "--config", "patchcore_"], ["patchcore_mvtec"]),
        (["patchcore", "--config", "calibration/u"], ["calibration/uniad"]),
        (["patchcore", "--help"], ["--help", "--help-all"]),
        (["patchcore", "--shards", ""], []),
        (["patchcore", ""], []),
        (["nothing", "--"], []),
    ],
)
def test_names_and_values_of_options(words, found) -> None:
    assert candidates(TRAIN, words) == found


def test_of_the_first_level_every_option_or_its_group_is_offered() -> None:
    found = candidates(TRAIN["uninet"], ["--"])
    assert {"--shards", "--method.", "--runtime.", "--config", "--help-all"} <= set(found)
    assert not [name for name in found if "." in name.removesuffix(".")]


def test_layouts_are_offered(unianom: Run) -> None:
    assert unianom("complete", "ingest", "--layout", "mvtec").stdout.split() == ["mvtec", "mvtec3d"]


def test_jobs_and_shells_are_offered(unianom: Run) -> None:
    offered = unianom("complete", "").stdout.split()
    assert set(offered) == {*find_jobs(ROOT / "jobs"), "completion", "--help", "--version"}
    assert unianom("complete", "cluster-").stdout.split() == ["cluster_anomalies"]
    assert unianom("complete", "completion", "f").stdout.split() == ["fish"]
    assert unianom("complete", "nothing", "--x").stdout.split() == []
    for shell in SHELLS:
        assert unianom("completion", shell).stdout == script(shell)


def _in_shell(command_folder: Path, tmp_path: Path, *command: str) -> list[str]:
    (tmp_path / "shards_here").mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{command_folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["unianom", "cal"], ["calibrate"]),
        (["unianom", "train", "patch"], ["patchcore"]),
        (["unianom", "train", "patchcore", "--method.bank.cor"], ["--method.bank.coreset_ratio"]),
        (["unianom", "train", "patchcore", "--method.preset", "="], ["paper", "reference"]),
        (["unianom", "train", "patchcore", "--shards", "shards_"], []),
    ],
)
def test_bash_completes(command_folder: Path, tmp_path: Path, words, found) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f'eval "$(unianom completion bash)"; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; '
        '_unianom; printf "%s\\n" "${COMPREPLY[@]}"; complete -p unianom'
    )
    *offered, spec = _in_shell(command_folder, tmp_path, "bash", "--norc", "-c", code)
    assert [word for word in offered if word] == found
    assert spec == "complete -o default -F _unianom unianom"  # where nothing is offered, files are


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes(command_folder: Path, tmp_path: Path) -> None:
    def offered(line: str) -> list[str]:
        code = f"unianom completion fish | source; complete -C '{line}'"
        return _in_shell(command_folder, tmp_path, "fish", "--no-config", "-c", code)

    assert offered("unianom cal") == ["calibrate"]
    assert offered("unianom train patchcore --method.preset ref") == ["reference"]
    assert offered("unianom train patchcore --shards shards_") == ["shards_here/"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes(command_folder: Path, tmp_path: Path) -> None:
    """With what completion is made of replaced by prints: it runs in an interactive shell only."""
    code = """
    compdef() { print "compdef $@" }; compadd() { print "add $@" }; _files() { print files }
    eval "$(unianom completion zsh)"
    words=(unianom train patchcore --me); CURRENT=4; _unianom
    words=(unianom train patchcore --method.preset ''); CURRENT=5; _unianom
    words=(unianom train patchcore --shards ''); CURRENT=5; _unianom
    """
    assert _in_shell(command_folder, tmp_path, "zsh", "-f", "-c", code) == [
        "compdef _unianom unianom",
        "add --",
        "add -S  -- --method.",
        "add -- paper reference",
        "add -S  --",
        "files",
    ]

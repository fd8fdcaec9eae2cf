"""The wheel holds all that the jobs need: built from a copy of the tree, installed, and used outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.runtime.recipes import recipe_names
from tests.jobs.conftest import ROOT
from unianom.data.drawing import draw_corpus

PACKAGES = ("jobs", "pipelines", "unianom")

NOT_PACKED = (".md", ".jpg")
"""Ends of names of files that lie in the packages for those who read them, and are needed by none."""


def _tracked(*folders: str) -> list[str]:
    """Return the files of the tree that Git knows or would take, or without Git all of them."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return sorted({name for name in listed if (ROOT / name).exists()})
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.is_file() and path.suffix != ".pyc")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without a network and without a trace of earlier builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (*_tracked(*PACKAGES), "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("unianom-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment of its own, with the wheel and, from this one, what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    programs = Path(sysconfig.get_path("scripts", "venv", paths))
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    # a path in a .pth file brings packages, but not what the .pth files there bring, such as the checkout itself
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of that environment in an empty folder."""

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [installed / program, *arguments],
            cwd=tmp_path,
            env={**environment, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_every_file_of_the_packages_is_packed(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in _tracked(*PACKAGES) if not name.endswith(NOT_PACKED)}


def test_what_is_installed_is_what_runs(run, installed: Path) -> None:
    code = "import jobs, pipelines, unianom; print(*(module.__file__ for module in (jobs, pipelines, unianom)))"
    for name in run("python", "-c", code).stdout.split():
        assert Path(name).is_relative_to(installed.parent)


def test_the_command_works_outside_the_checkout(run) -> None:
    listed = run("unianom")
    assert listed.returncode == 0, listed.stderr
    assert "\n  train " in listed.stdout
    helped = run("unianom", "train", "patchcore", "--help")
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: unianom train patchcore --output VALUE [options]\n")
    wrong = run("unianom", "train", "patchcore", "--shard", "s")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "did you mean --shards?" in wrong.stderr


def test_recipes_are_found_by_name_outside_the_checkout(run) -> None:
    assert "patchcore_mvtec" in recipe_names()
    printed = run("unianom", "train", "patchcore", "--config", "patchcore_mvtec", "--print_config")
    assert printed.returncode == 0, printed.stderr
    assert "coreset_ratio: " in printed.stdout
    wrong = run("unianom", "train", "patchcore", "--config", "patchcore_mvtek")
    assert wrong.returncode == 2
    assert "no file patchcore_mvtek, and no recipe of that name; did you mean patchcore_mvtec" in wrong.stderr


def test_a_folder_is_inspected_outside_the_checkout(run, tmp_path: Path) -> None:
    """With the weights that a package carries, and without Ray: from good and bad pictures to a report."""
    draw_corpus(tmp_path / "drawn", ("grain",), train=8, good=2, per_defect=1, size=64)
    (tmp_path / "my parts").mkdir()
    (tmp_path / "drawn/grain/train/good").rename(tmp_path / "my parts/good")
    (tmp_path / "my parts/scratched").mkdir()
    defects = (path for path in (tmp_path / "drawn/grain/test").glob("*/*.png") if path.parent.name != "good")
    for number, image in enumerate(sorted(defects)):
        image.rename(tmp_path / f"my parts/scratched/{number}.png")
    done = run("unianom", "inspect", "my parts", "--runtime.local", "true")
    assert done.returncode == 0, done.stderr
    (output,) = (tmp_path / "inspected").iterdir()
    assert (output / "report.html").stat().st_size > 20_000
    assert f"{output}/report.html" in done.stdout.replace("\n", "")
    lines = (output / "patchcore/decisions.csv").read_text().splitlines()
    assert lines[0].startswith("sample_id,category,split,label,defect,score,decision")
    scored = [line.split(",")[3] for line in lines[1:]]
    assert sorted(scored) == ["0", "0", "1", "1", "1"]
    assert scored[:3] == ["1", "1", "1"], "every defect scores higher than any normal picture"

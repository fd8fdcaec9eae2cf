"""What READMEs show is tried: every command is parsed by its job, every link leads somewhere, the snippet runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.runtime import cli
from pipelines.runtime.recipes import find_recipe
from tests.methods.conftest import tiny_method
from unianom.model import Model

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "jobs", "notebooks", "pipelines", "tests", "unianom")
"""Those of the repository; jobs may have written others beside them, with copies of its pages in logged models."""

KINDS = ("*.md", "*.ipynb")

PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"),
        *(page for folder in FOLDERS for kind in KINDS for page in (ROOT / folder).rglob(kind)),
    )
    if ".ipynb_checkpoints" not in page.parts
)


def _text(page: Path) -> str:
    """Return the text of a page; of a notebook that between its code."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", _text(page), flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[tuple[str, str]]:
    """Every `python jobs/NAME.py …` and `unianom NAME …` of a code block, continued lines joined, as the former."""
    found = []
    for page in PAGES:
        for block in _blocks(page):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                command = re.search(r"python jobs/(\w+)\.py(.*)|(?:^|-- )unianom ([a-z][\w-]*)(.*)", line)
                if command and "…" not in command[0] and command[3] != "completion":
                    name, rest = (command[1] or command[3]).replace("-", "_"), command[2] or command[4] or ""
                    found.append((str(page.relative_to(ROOT)), f"jobs/{name}.py{rest}"))
    return found


COMMANDS = _commands()


def test_there_are_commands_and_pages() -> None:
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md"} <= set(PAGES)
    assert len(COMMANDS) > 30
    rooms = {path.parent for path in (ROOT / "pipelines").glob("*/__init__.py")}
    assert {room / "README.md" for room in rooms} <= set(PAGES)


@pytest.fixture(scope="module")
def options_of() -> dict[str, Any]:
    """What each job takes, as it tells the command line."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for job in sorted((ROOT / "jobs").glob("*.py")):
            if not job.name.startswith("_"):
                patch.setattr(
                    cli,
                    "run",
                    lambda main, options, job=job: found.setdefault(f"jobs/{job.stem.rstrip('_')}.py", options),
                )
                runpy.run_path(str(job), run_name="__main__")
    return found


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_one_of_its_job(
    page: str, command: str, options_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    job, *arguments = shlex.split(command, comments=True)
    if "--config" in arguments and find_recipe(arguments[arguments.index("--config") + 1]) is None:
        place = arguments.index("--config")
        del arguments[place : place + 2]  # what an earlier command would have written
    cli.parse(options_of[job], [argument for argument in arguments if argument != "&&"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", _text(page)):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_python_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and images where it looks for them."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    Model(tiny_method("patchcore"), ["all"]).save(tmp_path / "runs" / "model")
    for name in ("a.png", "b.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        score, decision, *shape = line.split(" ", 2)
        assert float(score) > 0
        assert decision == "None"  # a model without a threshold
        assert re.fullmatch(r"\(\d+, \d+\)", shape[0])

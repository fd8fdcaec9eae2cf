"""The pages of the jobs are those that their options make, and errors on the page of troubleshooting are real ones."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime import cli
from pipelines.runtime.command import find_jobs
from pipelines.runtime.given_options import option_fields
from pipelines.runtime.reference import reference_page

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "jobs" / "reference"
JOBS = find_jobs(ROOT / "jobs")
TROUBLESHOOTING = (REFERENCE / "troubleshooting.md").read_text()


def page_and_options(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """Return the page that a job's options make, and its options."""
    found: list[Any] = []
    monkeypatch.setattr(cli, "run", lambda main, options: found.extend([main, options]))
    runpy.run_path(str(JOBS[name]), run_name="__main__")
    main, options = found
    return reference_page(options, name, main.__globals__["__doc__"]), options


@pytest.mark.parametrize("name", JOBS)
def test_pages_are_those_of_the_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = page_and_options(name, monkeypatch)
    assert (REFERENCE / f"{name}.md").read_text() == page, "run: make reference"


def test_a_page_has_every_option_once(monkeypatch: pytest.MonkeyPatch) -> None:
    page, options = page_and_options("score", monkeypatch)
    shown = re.findall(r"^\| `--([\w.]+)`", page, re.MULTILINE)
    assert sorted(shown) == sorted(name for name, _ in option_fields(options))


def test_the_page_of_training_has_every_option_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    page, methods = page_and_options("train", monkeypatch)
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for method, options in methods.items():
        heads = [head for head in sections if {"all", method} & set(head.removeprefix("Options of ").split(", "))]
        told = [sections[head] for head in heads]
        shown = set(re.findall(r"^\| `--([\w.]+)`", "\n".join(told), re.MULTILINE))
        assert shown == {name for name, _ in option_fields(options)}, method


def test_the_index_links_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+)\.md\)", (REFERENCE / "README.md").read_text()))
    assert linked == {*JOBS, "troubleshooting"}
    assert {page.stem for page in REFERENCE.glob("*.md")} == {*linked, "README"}


def texts() -> str:
    """Return all strings of the code, those within f-strings too."""
    found = []
    for folder in ("unianom", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_errors_that_are_explained_are_those_that_are_raised() -> None:
    phrases = [
        phrase
        for line in re.findall(r"^\*\*.*?\*\* ", TROUBLESHOOTING, re.MULTILINE)
        for phrase in re.findall(r"`(.*?)`", line)
    ]
    assert len(phrases) > 35
    said = texts()
    assert [phrase for phrase in phrases if phrase not in said] == []

"""The help of every job: short, complete where it must be, and all of it on request."""

from __future__ import annotations

import dataclasses
import runpy
from typing import Any

import pytest

from pipelines.runtime import cli
from pipelines.runtime.command import find_jobs
from pipelines.runtime.given_options import default_of, option_fields
from pipelines.runtime.help import choices_text, help_text
from tests.jobs.conftest import ROOT
from unianom.options import hints_of


def _options() -> dict[str, type]:
    """Return what every job takes, by the job and, where it has one, its first argument."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in find_jobs(ROOT / "jobs").items():
            patch.setattr(cli, "run", lambda main, options, name=name: found.setdefault(name, options))
            runpy.run_path(str(path), run_name="__main__")
    flat: dict[str, type] = {}
    for name, options in found.items():
        flat |= {f"{name} {c}": cls for c, cls in options.items()} if isinstance(options, dict) else {name: options}
    return flat


OPTIONS = _options()


def _required(options: type) -> list[str]:
    return [f.name for f in dataclasses.fields(options) if default_of(f) is dataclasses.MISSING]


def _shown(text: str) -> list[str]:
    words = (line.split()[0] for line in text.splitlines() if line.startswith("  --"))
    return [word.removeprefix("--") for word in words]


@pytest.mark.parametrize("job", OPTIONS)
def test_short_help_is_short_and_shows_what_is_required(job, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(OPTIONS[job], f"unianom {job}", everything=False)
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert "--help-all" in lines[-1]
    shown = _shown(text)
    assert set(_required(OPTIONS[job])) <= set(shown)
    assert len(shown) == len(set(shown)) <= 26
    assert "config" in shown
    for name in _required(OPTIONS[job]):
        assert f"--{name} VALUE" in " ".join(text.split("\n\n")[0].split()) or name in OPTIONS[job].positional


@pytest.mark.parametrize("job", OPTIONS)
def test_all_help_shows_every_option_with_a_text_of_its_own(job, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(OPTIONS[job], job, everything=True)
    names = [name for name, _ in option_fields(OPTIONS[job])]
    assert sorted(_shown(text)) == sorted([*names, "config", "print_config", "debug"])
    joined = " ".join(text.split())
    for name in names:
        assert f"--{name} (" not in joined, f"{name} has no text"


def _classes(options: type) -> list[type]:
    inside = [hint for hint in hints_of(options).values() if dataclasses.is_dataclass(hint)]
    return [options, *(cls for hint in inside for cls in _classes(hint))]


@pytest.mark.parametrize("job", OPTIONS)
def test_usual_options_are_options(job) -> None:
    for cls in _classes(OPTIONS[job]):
        for names in (getattr(cls, "usual", None) or (), getattr(cls, "positional", ())):
            assert set(names) <= {field.name for field in dataclasses.fields(cls)}, cls
            assert len(set(names)) == len(names), cls


def test_what_a_first_argument_may_be_is_told_line_by_line(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    train = {job.split()[1]: cls for job, cls in OPTIONS.items() if job.startswith("train ")}
    lines = choices_text(train, "unianom train").splitlines()
    assert "  patchcore   A memory bank of CNN features of normal patches (PatchCore)" in lines
    assert len([line for line in lines if line.split()[:1] and line.split()[0] in train]) == len(train)

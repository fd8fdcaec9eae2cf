"""Every notebook runs, and its file holds the outputs of the code that stands in it."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from PIL import Image

from notebooks.execute import PARAMETERS, code_digest, execute, kernel, notebooks, shown
from unianom.data.drawing import draw_sample
from unianom.weights import PACKAGES, locate_package

ROOT = Path(__file__).parents[2]

LARGEST = 600_000
"""Bytes of a notebook's file."""

FEW = {"train": 8, "good": 3, "per_defect": 1}
"""Pictures of each category: enough for every step, too few for figures that mean anything."""

SPACE = {
    "bank.coreset_ratio": [0.02],
    "patch_size": None,
    "taps": None,
    "neighbours": [1, 2],
    "reweight": [True, False],
}

SMALL: dict[str, dict[str, Any]] = {
    "1_quick_start": {"pictures": FEW},
    "2_compare_methods": {"pictures": FEW, "steps": 1},
    "3_memory_bank": {"pictures": FEW},
    "4_campaign": {"pictures": FEW, "space": {**SPACE, "reweight_neighbours": None, "blur_sigma": None}},
    "5_mixed_line": {"pictures": FEW, "steps": 20},
}
"""What takes the place of the parameters of each notebook."""

TRANSFORMER = ("2_compare_methods", "3_memory_bank")
"""Notebooks that need the package without which the set-up goes on."""

MACHINE = re.compile(r"(?<![\w./…-])/(?:home|root|tmp|usr|opt|var|srv|mnt|work|Users)/|[A-Z]:\\\\")
"""Paths that are those of some machine."""

NAMES = [
    pytest.param(name, marks=pytest.mark.ray) if name == "4_campaign" else name  # searches always run on Ray
    for name in SMALL
]


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """A kernel that all notebooks share, since importing PyTorch takes longer than most of them do here."""
    with kernel(tmp_path_factory.mktemp("kernel")) as manager:
        yield manager


def kinds_of_outputs(cell: nbformat.NotebookNode) -> list[str]:
    """Return what a cell shows, in words: text, tables and pictures, by their types."""
    return [output.get("name") or "+".join(sorted(output.data)) for output in shown(cell)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_its_file_holds(name: str, running: KernelManager, tmp_path: Path) -> None:
    for package in PACKAGES if name in TRANSFORMER else ():
        if locate_package(package) is None and not package.dependencies:
            pytest.skip(f"{package.distribution} is not installed: {' && '.join(package.commands)}")
    committed = code_cells(nbformat.read(path_of(name), 4))
    executed = code_cells(execute(path_of(name), running, tmp_path, SMALL[name]))
    del executed[1]  # the parameters of this test
    assert [cell.source for cell in executed] == [cell.source for cell in committed]
    assert [kinds_of_outputs(cell) for cell in executed] == [kinds_of_outputs(cell) for cell in committed]


def test_the_quick_start_takes_a_folder_of_ones_own(running: KernelManager, tmp_path: Path) -> None:
    """Photographs in folders good and bad, of one kind of product, by changing the one cell."""
    for kind, defect, count in (("good", None, 12), ("bad", "crack", 3)):
        (tmp_path / "parts" / kind).mkdir(parents=True)
        for number in range(count):
            picture, _ = draw_sample("cog", number, defect, seed=1, size=96)
            Image.fromarray(picture).save(tmp_path / "parts" / kind / f"{number}.jpg")
    executed = execute(path_of("1_quick_start"), running, tmp_path, {"folder": str(tmp_path / "parts")})
    printed = "".join(output.text for cell in code_cells(executed) for output in shown(cell) if "text" in output)
    assert "layout: folder" in printed
    assert not (tmp_path / "work" / "drawn").exists()


def test_all_notebooks_are_tried_and_named_in_the_readme() -> None:
    assert [path.stem for path in notebooks()] == list(SMALL)
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text(), re.MULTILINE)
    assert listed == list(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_the_outputs_in_a_file_are_those_of_its_code(name: str) -> None:
    notebook = nbformat.read(path_of(name), 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert notebook.metadata["unianom"]["code_sha256"] == code_digest(notebook), "run make notebooks"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not {"error", "stderr"} & {output.get("name", output.output_type) for output in outputs}
    assert {"image/jpeg", "image/png"} & {kind for output in outputs for kind in output.get("data", ())}
    assert [n for n, cell in enumerate(cells) if PARAMETERS in cell.metadata.get("tags", ())] == [0]
    assert cells[0].source.startswith("folder = None")


@pytest.mark.parametrize("name", SMALL)
def test_a_file_is_small_and_tells_nothing_of_a_machine(name: str) -> None:
    assert path_of(name).stat().st_size <= LARGEST
    notebook = nbformat.read(path_of(name), 4)
    texts = [
        value if isinstance(value, str) else "".join(value)
        for cell in code_cells(notebook)
        for output in cell.outputs
        for value in (output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/")))
    ]
    for text in texts:
        assert not MACHINE.search(text), text
        assert not any(
            place in text for place in (str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()) if place != "/"
        )
    assert set(notebook.metadata) == {"kernelspec", "language_info", "unianom"}
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}

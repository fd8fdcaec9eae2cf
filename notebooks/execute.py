"""Run the notebooks and keep what they print and draw.

python notebooks/execute.py                          # all of them, as `make notebooks` does
python notebooks/execute.py 1_quick_start.ipynb      # some of them
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent

PARAMETERS = "parameters"
"""Tag of the one cell that a reader changes; values that are given go into a cell after it."""

SECONDS = 1800
"""Time that one cell may take."""


def notebooks() -> list[Path]:
    """Return the files of all notebooks, in the order they are read."""
    return sorted(FOLDER.glob("*.ipynb"))


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of the code of all cells, by which a notebook knows that its outputs are of this code."""
    code = "\n\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


@contextmanager
def kernel(work: Path) -> Iterator[KernelManager]:
    """Start a kernel that works in a folder, for one notebook after another; it ends with the block."""
    with tempfile.TemporaryDirectory() as sockets:  # files, since others on this machine could reach ports
        place = Path(sockets)
        manager = KernelManager(
            kernel_name="python3",
            transport="ipc",
            ip=str(place / "kernel"),
            connection_file=str(place / "kernel.json"),
        )
        own = {"PYTHONPATH": str(FOLDER.parent), "PYTHONWARNINGS": "ignore:IProgress not found"}
        manager.start_kernel(cwd=str(work), env={**os.environ, **own})
        try:
            yield manager
        finally:
            manager.shutdown_kernel(now=True)


def execute(
    path: Path, manager: KernelManager, work: Path, values: Mapping[str, Any] | None = None
) -> nbformat.NotebookNode:
    """Run a notebook in an empty name space of a kernel, and return it with its outputs; the file stays as it is.

    Args:
        path: of the notebook.
        manager: its kernel.
        work: folder that its relative paths begin at.
        values: in place of those of the cell `PARAMETERS`, by name.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if values:
        (place,) = [n for n, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ())]
        given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    client = NotebookClient(notebook, km=manager, timeout=SECONDS, record_timing=False, coalesce_streams=True)
    reader = manager.client()
    reader.start_channels()
    try:
        reader.wait_for_ready(timeout=60)
        reader.execute_interactive(f"%reset -f\nimport os\nos.chdir({str(work)!r})\ndel os", output_hook=lambda _: None)
    finally:
        reader.stop_channels()
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    return notebook


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed notebook as it is committed: cells numbered from 1, without progress lines and what else tells
    of the machine it ran on."""
    number = 0
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = shown(cell)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "unianom": {"code_sha256": code_digest(notebook)},
        }
    )
    return notebook


def shown(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the outputs of a cell that are kept: no progress lines, and no empty table of Ray Tune; figures small."""
    kept = [
        output
        for output in cell.outputs
        if output.get("name") != "stderr" and output.get("data", {}).get("text/html") != ""
    ]
    for output in kept:
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = in_few_colours(output.data["image/png"])
    return kept


def in_few_colours(picture: str) -> str:
    """Return a PNG of at most 128 colours, which is enough for curves and points; both in base64."""
    found = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(found, "PNG", optimize=True)
    return base64.b64encode(found.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="file names; all notebooks if none is given")
    names = parser.parse_args().names
    for path in [FOLDER / Path(name).name for name in names] or notebooks():
        with tempfile.TemporaryDirectory() as work, kernel(Path(work)) as manager:
            notebook = tidied(execute(path, manager, Path(work)))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size // 1024} kB", flush=True)


if __name__ == "__main__":
    main()

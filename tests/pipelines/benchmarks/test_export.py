"""The benchmark of exported models, with what takes seconds left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.benchmarks import export
from pipelines.serving.export_graph import MAP, SCORE, ModelGraph
from tests.methods.conftest import tiny_method
from unianom.methods import Method


class Session:
    """Runs the graph by PyTorch, with scores that are 1 % too high."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        assert names == [SCORE, MAP]
        with torch.no_grad():
            score, anomaly_map = self.graph(torch.from_numpy(inputs["images"]))
        return [1.01 * score.numpy(), anomaly_map.numpy()]


class Made:
    """Stands for the file: its path is the graph."""

    def __init__(self, graph: ModelGraph) -> None:
        self.path = graph


def test_a_row_has_errors_and_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, rows: int) -> Method[Any]:
        return tiny_method(name)

    monkeypatch.setattr(export, "make_method", tiny)
    monkeypatch.setattr(export, "write_onnx", lambda graph, path, opset: Made(graph))
    monkeypatch.setattr(export, "open_session", lambda path, threads: Session(path))
    output = tmp_path / "rows.json"
    [row] = export.main(["--methods", "patchcore", "--images", "2", "--rounds", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == [row]
    assert row["score_error"] == pytest.approx(0.01, rel=1e-3)
    assert row["map_error"] < 1e-5
    assert row["ratio"] == pytest.approx(row["onnxruntime_images_per_second"] / row["pytorch_images_per_second"])


def test_methods_are_made_whole() -> None:
    method = export.make_method("uniformaly", 200)
    assert method.require_bank().rows == 200
    assert export.drawn_images(method, 2).shape == (2, 224, 224, 3)

"""The job: what it writes runs where neither PyTorch nor unianom can be imported, and what does not agree with the
model is not written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.ingest import ingest
from pipelines.data.options import IngestOptions
from pipelines.serving import export as exporting
from pipelines.serving.export import export
from pipelines.serving.export_graph import ModelGraph, OnnxGraph, save_onnx
from pipelines.serving.gate import compare
from pipelines.serving.gate_images import GateImages, choose_calibration_images, choose_gate_images
from pipelines.serving.options import ExportOptions, GateOptions
from pipelines.serving.precision import half_precision
from tests.methods.conftest import tiny_method as method_of
from tests.pipelines.conftest import HERE, Small
from unianom.data.drawing import draw_corpus
from unianom.data.image import ImageLimits, InputPolicy
from unianom.data.shards import ShardSet
from unianom.errors import DataError, ModelError, OptionError
from unianom.model import Model, load
from unianom.thresholds import Threshold

GATE = GateOptions(images=4, calibration_images=8)


def options(small: Small, model: Path, output: Path, **more) -> ExportOptions:
    return ExportOptions(str(model), str(small.shards), str(output), **{"gate": GATE, **more})


@dataclass(frozen=True)
class Exported:
    """The tiny UniFormaly, exported, and its ONNX file as it was made."""

    folder: Path
    made: OnnxGraph

    def write_onnx(self, graph: ModelGraph, path: Path, opset: int) -> OnnxGraph:
        """Do what takes seconds, by a copy."""
        shutil.copy(self.made.path, path)
        return dataclasses.replace(self.made, path=path)


@pytest.fixture(scope="module")
def exported(small: Small, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, made = tmp_path_factory.mktemp("exported") / "model", []
    write = exporting.write_onnx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "write_onnx", lambda *given: made.append(write(*given)) or made[0])
        assert export(options(small, tiny_model, folder)).fresh
    return Exported(folder, dataclasses.replace(made[0], path=folder / "model.onnx"))


ALONE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "unianom", "pipelines", "torchvision", "timm", "scipy"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run its `predict.py` in a process that can import neither PyTorch nor unianom."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(folder / "predict.py"), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent, check=False)


def test_it_runs_without_pytorch_and_unianom(
    exported: Exported, small: Small, tiny_model: Path, tmp_path: Path
) -> None:
    images = sorted(str(path) for path in small.corpus.glob("*/test/*/*.png"))[:7]
    done = run_alone(exported.folder, *images, "--json", "--maps", str(tmp_path / "maps"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = load(tiny_model).predict(images)
    assert [row["image"] for row in rows] == images
    np.testing.assert_allclose([row["score"] for row in rows], [one.score for one in expected], rtol=1e-5)
    assert [row["decision"] for row in rows] == [one.decision for one in expected]
    for row, one in zip(rows, expected):
        np.testing.assert_allclose(np.load(row["map"]), one.anomaly_map, atol=1e-5 * one.anomaly_map.max())
    assert len({row["score"] for row in rows}) == len(rows)


def test_an_image_that_cannot_be_read_does_not_stop_the_others(
    exported: Exported, small: Small, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = next(small.corpus.glob("*/test/*/*.png"))
    done = run_alone(exported.folder, str(tmp_path / "broken.png"), str(good), "--json")
    assert done.returncode == 1
    broken, fine = (json.loads(line) for line in done.stdout.splitlines())
    assert "cannot read" in broken["error"]
    assert fine["score"] > 0


def test_what_is_written_beside_it(exported: Exported, small: Small, tiny_model: Path) -> None:
    content, model = json.loads((exported.folder / "export.json").read_text()), load(tiny_model)
    assert content["model"]["digest"] == model.digest
    assert content["model"]["categories"] == ["cog", "weave"]
    assert content["decision"]["threshold"]["value"] == model.threshold.value
    assert content["preprocessing"]["size"] == 64
    gate = content["gate"]
    assert (gate["normal_images"], gate["anomalous_images"]) == (4, 4)
    assert (gate["normal_images_are"], gate["anomalous_images_are"]) == ("held-out", "labelled")
    assert gate["score_error"] <= 1e-5 >= gate["map_error"]
    assert gate["auroc"]["model"] == gate["auroc"]["file"]
    assert {path.name for path in exported.folder.iterdir()} == {
        "_plan.json", "README.md", "export.json", "model.onnx", "predict.py"
    }  # fmt: skip
    result = export(options(small, tiny_model, exported.folder))
    assert not result.fresh
    assert result.agreement == gate["words"]


def test_int8_is_written_with_its_figures(
    exported: Exported, small: Small, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "write_onnx", exported.write_onnx)
    loose = dataclasses.replace(GATE, score_bound=0.5, map_bound=0.5)
    export(options(small, tiny_model, tmp_path / "int8", precision="int8", gate=loose))
    content = json.loads((tmp_path / "int8" / "export.json").read_text())
    assert 1e-4 < content["gate"]["score_error"] <= 0.5
    assert content["gate"]["bounds"] == {"score": 0.5, "map": 0.5}
    assert (tmp_path / "int8" / "model.onnx").stat().st_size < 0.5 * exported.made.path.stat().st_size


def test_a_file_that_does_not_agree_is_not_written(
    exported: Exported, small: Small, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would not of which a weight is another."""
    import onnx

    def another(graph: ModelGraph, path: Path, opset: int) -> OnnxGraph:
        made = exported.write_onnx(graph, path, opset)
        model = onnx.load(str(path))
        weight = next(one for one in model.graph.initializer if one.name.endswith("patch_embed.proj.weight"))
        weight.raw_data = (1.01 * np.frombuffer(weight.raw_data, np.float32)).astype(np.float32).tobytes()
        onnx.save_model(model, str(path))
        return made

    monkeypatch.setattr(exporting, "write_onnx", another)
    with pytest.raises(
        ModelError, match=r"nothing was written: on 4 held-out normal .* scores differ by \d.*--gate\.s"
    ):
        export(options(small, tiny_model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_told_at_once(
    small: Small, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "models.json").write_text('{"cog": "cog"}')
    with pytest.raises(OptionError, match=r"one by one, such as --model .*cog"):
        export(options(small, tmp_path / "models", tmp_path / "out"))
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(OptionError, match=r"needs onnxscript, .* pip install '\.\[export\]'"):
        export(options(small, tiny_model, tmp_path / "out"))


def test_half_precision_spares_search_and_scores(tmp_path: Path) -> None:
    """Of a graph of two products, the network's becomes float16 and the other does not."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(np.eye(3, dtype=np.float32) * 2.1, name) for name in ("inner", "outer")]
    nodes = [
        helper.make_node("MatMul", ["x", "inner"], ["between"], name="of the network"),
        helper.make_node("MatMul", ["between", "outer"], ["y"], name="of the search"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "products", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 20)]
    )
    made = half_precision(
        save_onnx(model, tmp_path / "whole.onnx", frozenset({"of the network"})), tmp_path / "half.onnx"
    )
    kinds = {weight.name: weight.data_type for weight in onnx.load(str(made.path)).graph.initializer}
    assert kinds["outer"] == TensorProto.FLOAT
    assert TensorProto.FLOAT16 in kinds.values()


# ----------------------------------------------------------------------------------------------------------------- gate
def test_errors_are_those_of_the_definition() -> None:
    """Scores 1, 2 and 4, median 2: a difference of 0.1 at the first is 0.1 / 2, of 0.4 at the last 0.4 / 4."""
    images = GateImages(
        np.zeros((3, 2, 2, 3), np.uint8), np.array([0, 0, 1], np.int8), ["a"] * 3, "held-out", "labelled"
    )
    model = Model(method_of("revdist"), threshold=Threshold(3.7, 0.05, 0.95, 100, 100, 0.0))
    maps = np.ones((3, 2, 2), np.float32) * np.array([1, 2, 4], np.float32)[:, None, None]
    one = {"score": np.array([1, 2, 4], np.float32), "anomaly_map": maps}
    other = {"score": np.array([1.1, 2, 3.6], np.float32), "anomaly_map": maps.copy()}
    other["anomaly_map"][0, 0, 1] += 0.5  # of a largest value of 1, less than the median of 2
    found = compare(model, images, [one], iter([other]))
    assert found.score_error == pytest.approx(0.1, rel=1e-5)
    assert found.map_error == pytest.approx(0.25)
    assert found.mean_map_error == pytest.approx(0.25 / 12)
    assert found.decisions_changed == 1  # 4 fails and 3.6 passes
    assert found.auroc == (1.0, 1.0)
    other["score"][1] = np.nan
    broken = compare(model, images, [one], iter([other]))
    assert broken.score_error == np.inf
    assert broken.auroc is None


def test_images_of_the_gate_are_unseen(small: Small, tiny_model: Path) -> None:
    model = load(tiny_model)
    description = {"categories": model.categories, "provenance": model.provenance}
    shards, limits, policy = ShardSet.open(str(small.shards)), ImageLimits(), model.method.input
    images = choose_gate_images(shards, description, policy, GateOptions(images=100), limits)
    assert (images.normals, images.anomalies) == ("held-out", "labelled")
    held_out = model.provenance["held_out_normals"]
    assert (images.label == 0).sum() == held_out + 8  # 4 good ones of the test split of either category
    assert set(images.category) == {"cog", "weave"}
    batches = [images.pixels[batch] for batch in images.batches(5)]
    assert [len(batch) for batch in batches[:2]] == [1, 5]
    np.testing.assert_array_equal(np.concatenate(batches), images.pixels)
    learned, names = choose_calibration_images(shards, description, policy, GateOptions(calibration_images=6), limits)
    assert len(learned) == len(names) == 6
    with pytest.raises(DataError, match="no normal image of spoon"):
        choose_gate_images(shards, {**description, "categories": ["spoon"]}, policy, GateOptions(), limits)


def test_without_labels_anomalies_are_made(tmp_path: Path) -> None:
    draw_corpus(tmp_path / "corpus", ("weave",), train=4, good=2, per_defect=0, size=64)
    ingest(IngestOptions("mvtec", str(tmp_path / "corpus"), str(tmp_path / "shards"), runtime=HERE))
    shards = ShardSet.open(str(tmp_path / "shards"))
    description = {"categories": ["weave"], "provenance": {}}
    policy = InputPolicy("stretch", 64, None)
    images = choose_gate_images(shards, description, policy, GateOptions(images=3), ImageLimits())
    assert (images.normals, images.anomalies) == ("held-out", "synthetic")
    assert images.label.tolist() == [0, 0, 1, 1]
    assert (images.pixels[:2] != images.pixels[2:]).any((1, 2, 3)).all()

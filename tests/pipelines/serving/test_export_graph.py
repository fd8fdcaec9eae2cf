"""Models as graphs: every method's graph says what the method says. PyTorch takes 3 to 11 seconds of one CPU to write a
tiny method as ONNX, so all are run as graphs, two are traced, and one is written; `python -m
pipelines.benchmarks.export` writes all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.serving.export_graph import (
    CALIBRATED_MAP,
    CALIBRATED_SCORE,
    CATEGORY,
    IMAGES,
    MAP,
    SCORE,
    ModelGraph,
    OnnxGraph,
    check_bank,
    trace,
    write_onnx,
)
from pipelines.serving.gate import open_session
from tests.methods.conftest import SIDE, fit, tiny_method
from unianom.calibration import MapStatistics, fit_calibrator
from unianom.configs.calibration import CalibrationConfig, HeadConfig
from unianom.data.tensors import normalise
from unianom.errors import OptionError
from unianom.memory import graph_search
from unianom.memory.graph_search import GraphBank
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod
from unianom.model import Model

NAMES = ["cup", "dish", "cup"]


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """B×S×S×3 uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def calibrated(method: str, variant: str) -> Model:
    model = Model(tiny_method(method), ["cup", "dish"])
    prediction = model.method.predict(normalise(list(drawn(6, seed=5)), model.method.input))
    config = CalibrationConfig(variant=variant, iterations=3, batch_size=4, head=HeadConfig(convolutions=1, hidden=8))  # type: ignore[arg-type]
    statistics = MapStatistics.of(prediction.raw_map)
    model.calibrator = fit_calibrator(
        config, model.categories, prediction.embedding.numpy(), statistics, np.array([0, 1, 0, 1, 0, 1])
    )
    return model


def wanted(model: Model, images: np.ndarray, names: list[str] | None = None) -> list[np.ndarray]:
    prediction, calibration = model.examine(normalise(list(images), model.method.input), names)
    tensors = [prediction.score, prediction.anomaly_map]
    if calibration is not None:
        tensors += [calibration.score, calibration.maps(prediction.anomaly_map)]
    return [tensor.numpy() for tensor in tensors]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_says_what_its_method_says(name: str) -> None:
    model, images = Model(tiny_method(name), ["cup"]), drawn(3)
    expected = wanted(model, images)
    with torch.no_grad():
        found = ModelGraph(model)(torch.from_numpy(images))
    assert_equal([tensor.numpy() for tensor in found], expected)
    assert np.ptp(expected[0]) > 0  # images that all score the same would show nothing


@pytest.mark.parametrize("variant", ["cada", "classifier", "labels", "none"])
def test_a_graph_calibrates(variant: str) -> None:
    model, images = calibrated("patchcore", variant), drawn(3)
    expected = wanted(model, images, NAMES)
    graph = ModelGraph(model)
    assert graph.takes_category == (variant == "labels")
    category = (torch.tensor([0, 1, 0]),) if graph.takes_category else ()
    with torch.no_grad():
        assert_equal([tensor.numpy() for tensor in graph(torch.from_numpy(images), *category)], expected)


@pytest.mark.parametrize("name", ["recontrast", "onenip"])
def test_methods_are_traced_for_any_batch(name: str) -> None:
    model, images = Model(tiny_method(name), ["cup"]), drawn(3)
    expected = wanted(model, images)
    program = trace(ModelGraph(model)).module()
    with torch.no_grad():
        for count in (3, 1):
            found = program(torch.from_numpy(images[:count]))
            assert_equal([tensor.numpy() for tensor in found], [value[:count] for value in expected])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxGraph, list[np.ndarray]]:
    """PatchCore with a calibrator that goes by category, and its outputs of three images."""
    model = calibrated("patchcore", "labels")
    expected = wanted(model, drawn(3), NAMES)
    return write_onnx(ModelGraph(model), tmp_path_factory.mktemp("onnx") / "model.onnx", opset=20), expected


def test_an_onnx_file_says_what_the_model_says(written: tuple[OnnxGraph, list[np.ndarray]]) -> None:
    """By ONNX Runtime and by OpenVINO, in batches of three and of one; nothing in it tells of this machine."""
    made, expected = written
    session = open_session(made.path, threads=1)
    inputs = {IMAGES: drawn(3), CATEGORY: np.array([0, 1, 0])}
    outputs = [SCORE, MAP, CALIBRATED_SCORE, CALIBRATED_MAP]
    assert [value.name for value in session.get_inputs()] == list(inputs)
    assert [value.name for value in session.get_outputs()] == outputs
    for count in (3, 1):
        found = session.run(outputs, {name: value[:count] for name, value in inputs.items()})
        assert_equal(found, [value[:count] for value in expected])
    content = made.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b"patchcore.py" not in content

    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(str(made.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(inputs)
    assert_equal([result[name] for name in outputs], expected)


def test_operators_of_the_network_are_told_from_others(written: tuple[OnnxGraph, list[np.ndarray]]) -> None:
    import onnx

    made, _ = written
    nodes = onnx.load(str(made.path)).graph.node
    inside = {node.op_type for node in nodes if node.name in made.network}
    outside = {node.op_type for node in nodes if node.name not in made.network}
    assert inside >= {"Conv", "Relu"}
    assert not inside & {"TopK", "Gemm", "Cast", "GatherND"}  # of normalisation and search
    assert outside >= {"Cast", "Gemm", "TopK"}


# ----------------------------------------------------------------------------------------------------------------- bank
@pytest.mark.parametrize("rows_at_once", [7, 1000])
def test_a_bank_in_a_graph_finds_what_the_exact_search_finds(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_search, "ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(3)
    vectors = (rng.normal(size=(60, 12)) + 100).astype(np.float32)  # far from the origin
    queries = np.concatenate([vectors[:5], (rng.normal(size=(20, 12)) + 100).astype(np.float32)])
    distances, rows = GraphBank(vectors).search(torch.from_numpy(queries), 3)
    exact_distances, exact_rows = MemoryBank.build(vectors).search(queries, 3)
    np.testing.assert_array_equal(rows.numpy(), exact_rows)
    np.testing.assert_allclose(distances.numpy(), exact_distances, rtol=1e-6)
    assert (distances[:5, 0] == 0).all()


def test_a_bank_that_does_not_fit_is_refused() -> None:
    method = tiny_method("patchcore")
    assert isinstance(method, MemoryMethod)
    vectors = np.random.default_rng(0).normal(size=(4000, 96)).astype(np.float32)  # 1.5 MB
    method.bank = MemoryBank.build(vectors)
    check_bank(method, 2)
    with pytest.raises(OptionError, match=r"4000 vectors of 96 values takes 2 MB .* --max_bank_mb 3"):
        check_bank(method, 1)
    method.bank = MemoryBank.build(vectors[:100], kind="ivf_flat")
    with pytest.raises(OptionError, match=r"bank\.index=flat"):
        check_bank(method, 2)
    check_bank(fit(tiny_method("revdist")), 1)  # which has none

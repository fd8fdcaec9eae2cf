"""The arithmetic of benchmarks, and that their other sides compute what they claim to."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unianom
from pipelines.benchmarks.bare_forward import bare_network
from pipelines.benchmarks.harness import Measured, Timing, interleave
from pipelines.benchmarks.host import OWN
from pipelines.benchmarks.memory_bank import cover_radius
from pipelines.benchmarks.memory_peak import reset_peak
from pipelines.benchmarks.options import (
    BENCHMARKS,
    CoresetBenchmark,
    EncoderBenchmark,
    HostBenchmark,
    InferenceBenchmark,
    MetricsBenchmark,
    PipeBenchmark,
    PixelsBenchmark,
    ScoresBenchmark,
    SimilarityBenchmark,
)
from pipelines.benchmarks.printing import print_report
from pipelines.benchmarks.references import nearest_distances, plain_coreset, scikit_learn_metrics, swept_aupro
from pipelines.benchmarks.registry import measure
from pipelines.benchmarks.scoring import StagedScorer, scorer_arguments, span
from pipelines.inference.range_scorer import RangeScorer
from pipelines.runtime.task_worker import ENDED, STARTED
from tests.methods.conftest import TINY
from tests.pipelines.conftest import tiny_method
from tests.pipelines.evaluated import Scored
from tests.pipelines.evaluated import _write_shards as write_shards
from unianom.configs.backbone import BackboneConfig
from unianom.data.maps import MapsKept
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.memory.coreset import farthest_points
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS
from unianom.methods.uniformaly import UniFormaly
from unianom.metrics.pixel import pixel_metrics
from unianom.model import Model
from unianom.options import to_plain

NEEDS_PEAK = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux alone")


def test_ratios_are_taken_round_by_round() -> None:
    turns = {"a": [Timing(10, 1), Timing(10, 4)], "b": [Timing(5, 1), Timing(5, 1)]}
    ratio = Measured(turns, [0.0, 0.0]).ratio("a", "b", times=2)
    assert ratio["rounds"] == [1.0, 0.25]
    assert (ratio["median"], ratio["min"], ratio["max"]) == (0.625, 0.25, 1.0)


def test_sides_take_turns() -> None:
    seen: list[str] = []

    def side(name: str) -> Timing:
        seen.append(name)
        return Timing(1, 1, name)

    measured = interleave({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2, warm_up=True)
    assert seen == ["a", "b"] * 3
    assert len(measured.turns["a"]) == 2
    assert measured.result("b") == "b"


def test_a_throughput_lasts_from_the_first_start_to_the_last_end() -> None:
    assert span([{STARTED: 5.0, ENDED: 7.0}, {STARTED: 4.0, ENDED: 6.0}, {STARTED: 6.5, ENDED: 9.0}]) == 5.0


def test_the_swept_aupro_is_near_the_exact_one() -> None:
    generator = np.random.default_rng(0)
    masks = np.zeros((6, 40, 40), bool)
    masks[:3, 5:15, 8:20] = True
    masks[1, 25:30, 25:35] = True
    maps = (generator.random(masks.shape) + masks * generator.random((6, 1, 1))).astype(np.float32)
    assert swept_aupro(maps, masks) == pytest.approx(pixel_metrics(maps, masks).aupro, abs=0.02)
    published = pixel_metrics(maps, masks, aupro_variant="legacy_global_200").aupro
    assert swept_aupro(maps, masks) == pytest.approx(published, abs=1e-9)


def test_the_plain_metrics_are_the_exact_ones() -> None:
    generator = np.random.default_rng(0)
    masks = np.zeros((4, 30, 30), bool)
    masks[0, 5:15, 8:20] = masks[1, 20:24, 3:9] = masks[1, 2:5, 2:4] = True
    for levels in (12, 10**6):  # with many ties, with few
        maps = (generator.integers(0, levels, masks.shape) + masks * levels // 4).astype(np.float32)
        found, exact = scikit_learn_metrics(maps, masks), pixel_metrics(maps, masks)
        assert found == pytest.approx({"aupro": exact.aupro, "auroc": exact.auroc, "ap": exact.ap}, abs=1e-9)


@NEEDS_PEAK
def test_benchmarks_of_metrics_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since starting others takes longer than all the rest."""
    for module in ("memory_peak", "pixels"):
        monkeypatch.setattr(
            f"pipelines.benchmarks.{module}.ProcessPoolExecutor", lambda size, mp_context: ThreadPoolExecutor(size)
        )
    content = measure(MetricsBenchmark(str(tmp_path / "metrics.json"), maps=4, size=32, rounds=1))
    (table,) = content["tables"].values()
    ours, plain = table["unianom"], table["scikit-learn, plain AUPRO"]
    assert [ours[key] for key in ("aupro", "auroc", "ap")] == pytest.approx(
        [plain[key] for key in ("aupro", "auroc", "ap")], abs=1e-9
    )
    assert all(row["MB at the peak"] >= 0 for row in table.values())
    options = PixelsBenchmark(str(tmp_path / "pixels.json"), pixels=20_000, size=32, drawn=3, exact_maps=4)
    content = measure(options)
    print_report(content)
    assert content["sides"]["binned, all"]["amount"] == 20 * 32 * 32
    for row in content["tables"]["accuracy"].values():
        assert row["off by"] <= row["at most"]


def test_the_plain_coreset_makes_the_same_picks() -> None:
    features = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    starts = np.array([3, 50, 200])
    differences = features[:, None].astype(np.float64) - features[starts]
    initial = np.sqrt((differences**2).sum(-1)).mean(1)
    assert plain_coreset(features, starts, 40) == farthest_points(features, initial, 40).indices.tolist()


def test_the_cover_radius_is_the_largest_distance_to_a_pick() -> None:
    features = np.array([[0, 0], [3, 4], [3, 5], [10, 0]], np.float32)
    assert cover_radius(features, np.array([0, 2])) == pytest.approx(np.sqrt(49 + 25))
    assert cover_radius(features, np.arange(4)) == 0


def test_a_coreset_benchmark_end_to_end(tmp_path: Path) -> None:
    features, output = tmp_path / "features.npy", tmp_path / "coreset.json"
    np.save(features, np.random.default_rng(2).normal(size=(500, 12)).astype(np.float32))
    options = CoresetBenchmark(str(output), features=str(features), rows=400, count=40, projection=6, rounds=2)
    content = measure(options)
    assert json.loads(output.read_text()) == content
    (table,) = content["tables"].values()
    assert table["plain"]["picks we share by its start rule"] == "40/40"
    assert table["plain"]["cover radius"] == table["unianom"]["cover radius"]
    print_report(content)


@pytest.mark.parametrize(
    "given",
    [{}, {"model": "m"}, {"features": "f", "model": "m", "shards": "s"}, {"features": "f", "rows": 3, "count": 4}],
)
def test_coreset_options_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"give either|count <= rows"):
        CoresetBenchmark("output.json", **given)


@pytest.fixture(scope="module")
def model_and_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ShardSet]:
    """A tiny model with a bank, and a few images to score."""
    folder = tmp_path_factory.mktemp("benchmark")
    generator = np.random.default_rng(3)
    samples = [
        Scored(f"{number}.png", "disc", 0, "good", generator.integers(0, 256, (70, 80, 3), dtype=np.uint8), None)
        for number in range(5)
    ]
    method = UniFormaly(tiny_method())
    method.bank = MemoryBank.build(generator.normal(size=(50, method.encoder.dimension)).astype(np.float32))
    Model(method, ["disc"]).save(folder / "model")
    return str(folder / "model"), write_shards(folder / "shards", samples, 2)


def test_an_encoder_benchmark_end_to_end(model_and_shards: tuple[str, ShardSet], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    output = tmp_path / "encoder.json"
    content = measure(EncoderBenchmark(model_and_shards[0], str(output), images=3, batch_size=2, rounds=1))
    assert json.loads(output.read_text()) == content
    (figures,) = content["tables"].values()
    assert figures["pytorch"]["largest difference"] == 0
    assert figures["openvino"]["largest difference"] <= 1e-5
    assert figures["openvino"]["CPU seconds to convert"] > 0
    assert set(figures) - set(content["sides"]) == set()


def test_the_bare_network_of_a_model_whose_options_name_classes() -> None:
    """Its head is left out, whatever the options of the backbone say."""
    backbone = BackboneConfig("vit_tiny_patch16_224", "random", {"num_classes": 10})
    network: Any = bare_network(Model(UniFormaly(tiny_method(backbone=backbone))))
    assert network.num_classes == 0


def test_the_bare_network_is_whole_and_has_the_weights_of_the_model(model_and_shards: tuple[str, ShardSet]) -> None:
    method: Any = unianom.load(model_and_shards[0]).method
    network: Any = bare_network(unianom.load(model_and_shards[0]))
    assert (len(method.encoder.vit.blocks), len(network.blocks)) == (3, 12)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        tokens = network.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
        torch.testing.assert_close(method.encoder(images).tokens[1], tokens)
        assert network.forward_features(images).shape == (2, 17, 192)


@pytest.mark.parametrize("maps", ["none", "all"])
def test_measuring_the_stages_changes_nothing(
    model_and_shards: tuple[str, ShardSet], tmp_path: Path, maps: MapsKept
) -> None:
    model, shards = model_and_shards
    options = PipeBenchmark(model, shards.uri, "pipe.json", maps=maps, batch_size=2)
    folders = {RangeScorer: tmp_path / "plain", StagedScorer: tmp_path / "staged"}
    records = {}
    for worker, folder in folders.items():
        task = to_plain(shards.ranges(Selection())[0])
        records[worker] = worker(**scorer_arguments(options, shards, str(folder))).run(task)
    stages, own = (records[worker].pop("stages") for worker in (StagedScorer, RangeScorer))
    assert records[StagedScorer] == records[RangeScorer]
    name = records[RangeScorer]["name"]
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "staged" / name).read_bytes()
    assert set(own) >= {"read", "decode", "resize", "normalise", "predict", "rows", "write"}
    assert set(stages) == set(own) | {"forward", "search, map", "rest"}
    assert stages["decode"] > 0
    assert stages["forward"] > 0


@NEEDS_PEAK
def test_a_similarity_benchmark_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process too; its peak begins anew instead."""

    def anew(size: int, mp_context: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(size, initializer=reset_peak)

    monkeypatch.setattr("pipelines.benchmarks.similarity.ProcessPoolExecutor", anew)
    output = tmp_path / "similarity.json"
    content = measure(SimilarityBenchmark(str(output), batch_size=2, channels=4, side=48, rounds=1))
    assert json.loads(output.read_text()) == content
    (table,) = content["tables"].values()
    assert table["in blocks"]["loss apart, relative"] < 1e-5
    assert table["in blocks"]["gradient apart, relative"] < 1e-4
    assert table["whole matrices"]["MB at the peak"] > 2 * 48**4 * 4 / 1e6, "a matrix for each image at least"


def test_an_inference_benchmark_end_to_end(tmp_path: Path, model_and_shards: tuple[str, ShardSet]) -> None:
    method = METHODS["revdist"](TINY["revdist"].config).eval()
    Model(method, ["a"]).save(tmp_path / "model")
    options = InferenceBenchmark(str(tmp_path / "model"), str(tmp_path / "inference.json"), images=3, rounds=1)
    (table,) = measure(options)["tables"].values()
    assert 0 < table["folded"]["largest difference, map"] < 1e-3
    with pytest.raises(OptionError, match="give a model of a trained method"):
        measure(InferenceBenchmark(model_and_shards[0], str(tmp_path / "another.json")))
    before = (tmp_path / "inference.json").read_bytes()
    with pytest.raises(DataError, match=r"inference.json is there already; choose another output"):
        measure(options)
    assert (tmp_path / "inference.json").read_bytes() == before


def test_a_scores_benchmark_end_to_end(tmp_path: Path, model_and_shards: tuple[str, ShardSet]) -> None:
    method: Any = unianom.load(model_and_shards[0]).method
    vectors = np.random.default_rng(4).normal(size=(2400, method.encoder.dimension)).astype(np.float32)
    method.bank = MemoryBank.build(vectors)
    Model(method, ["disc"]).save(tmp_path / "model")
    _, shards = model_and_shards
    options = ScoresBenchmark(
        str(tmp_path / "model"), shards.uri, str(tmp_path / "scores.json"), images=4, batch_size=2, rounds=1
    )
    table = measure(options)["tables"]["bounded search"]
    assert len(table) == 2
    for row in table.values():
        assert row["scores equal to the bit"]
        assert 0 < row["patches searched in full"] <= 1
    few = dataclasses.replace(options, model=model_and_shards[0], output=str(tmp_path / "few.json"))
    with pytest.raises(DataError, match="a bank of 50 rows has no proposals"):
        measure(few)
    many = dataclasses.replace(options, bank_rows=10**6, output=str(tmp_path / "many.json"))
    with pytest.raises(DataError, match="has no normal training images to take patches of"):
        measure(many)


def test_the_search_of_anomalib_finds_the_nearest() -> None:
    generator = np.random.default_rng(5)
    patches, vectors = generator.normal(size=(20, 6)), generator.normal(size=(30, 6))
    expected = np.sqrt(((patches[:, None] - vectors[None]) ** 2).sum(2)).min(1)
    assert np.allclose(nearest_distances(torch.from_numpy(patches), torch.from_numpy(vectors)), expected)


def test_what_the_host_does_end_to_end(model_and_shards: tuple[str, ShardSet], tmp_path: Path) -> None:
    options = HostBenchmark(model_and_shards[1].uri, str(tmp_path / "host.json"), rounds=1, batch_size=2)
    (table,) = measure(options)["tables"].values()
    kinds = {"maps none", "maps flagged", "maps all"}
    for stage in ("read", "decode", "resize", "normalise", "write", "all threads"):
        assert set(table[stage]) == kinds
        assert min(table[stage].values()) > 0
    assert set(table["encode maps"]) - {"maps none"} == {"maps flagged", "maps all"}
    assert table["encode maps"]["maps all"] > table["encode maps"]["maps flagged"] > 0
    for kind in kinds:
        stages = sum(own.get(kind, 0) for stage, own in table.items() if stage not in ("all threads", OWN))
        assert stages == pytest.approx(table["all threads"][kind], abs=0.05)


def test_every_benchmark_documents_its_options() -> None:
    for options in BENCHMARKS.values():
        assert options.__doc__ is not None
        for name in options.__dataclass_fields__:  # type: ignore[attr-defined]
            assert f"{name}:" in options.__doc__

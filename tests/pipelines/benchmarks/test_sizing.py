"""Sizing: what is derived by hand, that clocks change nothing, and that what is measured adds up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unianom
from pipelines.benchmarks.harness import Measured, Timing
from pipelines.benchmarks.options import SizingBenchmark
from pipelines.benchmarks.printing import print_report
from pipelines.benchmarks.registry import measure
from pipelines.benchmarks.simulated_device import draw_files
from pipelines.benchmarks.sizing_advice import Findings, advice
from pipelines.benchmarks.sizing_disk import DiskRates, disk_rates
from pipelines.benchmarks.sizing_figures import (
    COMPUTING,
    CPUS,
    DISK,
    FEEDING,
    GPU,
    PARTS,
    Capacity,
    Node,
    capacity,
    disk_limit,
    machines_needed,
    worker_counts,
)
from pipelines.benchmarks.sizing_images import cut_ranges, encoded, sized_images, spread_ranges
from pipelines.benchmarks.sizing_measured import READING, figures_of, side_of
from pipelines.benchmarks.sizing_report import capacities, metrics_of, sizing_tables
from pipelines.benchmarks.sizing_setup import prepare
from pipelines.benchmarks.sizing_stages import MeasuredPredictor, MeasuredStages, PartClock, Pass, SharePredictor
from pipelines.benchmarks.sizing_workers import Workers
from pipelines.inference.range_predictor import RangePredictor
from pipelines.inference.staged_scorer import scoring_stages
from pipelines.runtime.device_turn import Device, Turn
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.stage_clock import StageClock
from tests.pipelines.conftest import tiny_method
from tests.pipelines.evaluated import Scored
from tests.pipelines.evaluated import _write_shards as write_shards
from unianom.data.image import ImageLimits
from unianom.data.maps import MapsKept
from unianom.data.row_ranges import RowRange
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU, Execution
from unianom.memory.index import MemoryBank
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model
from unianom.options import to_plain

MS = {"read": 0.1, "decode": 1.0, "resize": 0.2, "forward": 30.0, "search": 8.0, "encode maps": 0.2, "write": 0.1}
"""Milliseconds of an image: 1.6 to feed a GPU, 39.6 in all."""


# ------------------------------------------------------------------------------------------------------------ derived
def test_a_gpu_that_waits_for_cpus() -> None:
    """2,500 images/s × 1.6 ms are four cores, and one drives the GPU; two cores feed 1,250 images/s."""
    found = capacity(Node(3, 1, 1.8), "none", MS, 1.0, 2000.0, gpu_rate=2500.0, corpus=9_000_000, hours=1.0)
    assert found.cores_needed == 5
    assert found.limits == pytest.approx({GPU: 2500, CPUS: 1250, DISK: 2000})
    assert (found.bound, found.rate, found.gpu_share) == (CPUS, pytest.approx(1250), pytest.approx(0.5))
    assert found.cost == pytest.approx(0.4)  # 1.8 for the 4.5 million of an hour
    assert found.machines == 2


def test_cores_that_hold_each_other_up_count_for_less() -> None:
    found = capacity(Node(3, 1), "none", MS, 1.25, 2000.0, gpu_rate=2500.0)
    assert found.cores_needed == 6  # 2,500 × 2 ms, and one
    assert found.limits[CPUS] == pytest.approx(1000)
    assert found.cost is None
    assert found.machines is None


def test_what_bounds_a_node() -> None:
    assert capacity(Node(9, 2), "all", MS, 1.0, 9e9, gpu_rate=500.0).bound == GPU
    two = capacity(Node(9, 2), "all", MS, 1.0, 300.0, gpu_rate=500.0)
    assert two.limits == pytest.approx({GPU: 1000, CPUS: 7 / 0.0016, DISK: 300})
    assert (two.bound, two.rate, two.gpu_share, two.cores_needed) == (DISK, 300.0, 0.3, 4)  # 1.6 for both, and two


def test_a_disk_that_is_not_known_bounds_nothing() -> None:
    found = capacity(Node(3, 1), "none", MS, 1.0, None, gpu_rate=2500.0)
    assert found.limits == pytest.approx({GPU: 2500, CPUS: 1250})


def test_cpus_alone_do_everything() -> None:
    found = capacity(Node(4, 0, 0.36), "none", MS, 1.0, 1e6)
    assert found.limits == pytest.approx({CPUS: 4 / 0.0396, DISK: 1e6})
    assert (found.cores_needed, found.gpu_share, found.bound) == (None, None, CPUS)
    assert found.cost == pytest.approx(0.36e6 / 3600 * 0.0396 / 4)


def test_a_disk_reads_and_writes_each_image() -> None:
    assert disk_limit(10_000, 100e6, 5_000, 50e6) == pytest.approx(5000)  # 0.1 ms each
    assert disk_limit(10_000, 100e6, 0, 50e6) == pytest.approx(10_000)


def test_machines_are_whole() -> None:
    assert machines_needed(36_000_000, 10, 1000) == 1  # exactly, and floating point adds none
    assert machines_needed(36_000_001, 10, 1000) == 2
    assert machines_needed(1, 10, 1000) == 1


def test_workers_are_doubled_up_to_all() -> None:
    assert [worker_counts(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


DISK_RATES = DiskRates(read=100e6, write=50e6, read_bytes=1 << 30, read_files=10, cached=False)


def measured_by_hand(busy: float | None) -> Measured:
    """Three rounds of ten images; two and three workers do 0.8 and 0.75 of what they could, three of them in a quarter
    more CPU time an image."""

    def turns(*passes: Any, amount: float = 10) -> list[Timing]:
        return [Timing(amount, 2.0, own) for own in passes]

    sides = {READING: turns(*(Pass({"read": 0.01 * n, "decode": 0.1, "resize": 0.02}) for n in (1, 3, 2)))}
    for kind, written in (("none", 1_000), ("flagged", 2_000), ("all", 50_000)):
        seconds = {"forward": 0.3, "write": 0.05} | ({"encode maps": 0.04} if kind == "all" else {})
        sides[side_of(kind)] = turns(*(Pass(seconds, busy and busy * n, written) for n in (3, 1, 2)))
    sides["1 worker"] = turns(0.020, 0.016, 0.020)
    sides["2 workers"] = turns(0.022, 0.022, 0.022, amount=16)
    sides["3 workers"] = turns(0.025, 0.020, 0.040, amount=22.5)
    return Measured(sides, [0.5] * 3)


def test_figures_are_medians_of_the_rounds() -> None:
    kinds = ("none", "flagged", "all")
    found = figures_of(measured_by_hand(None), kinds, [1, 2, 3], DISK_RATES, load=0.5, unread=2)
    none = {"read": 2.0, "decode": 10.0, "resize": 2.0, "forward": 30.0, "write": 5.0}
    assert found.milliseconds["none"] == pytest.approx(none)
    assert found.milliseconds["all"] == pytest.approx({**none, "encode maps": 4.0})
    assert found.written == {"none": 100, "flagged": 200, "all": 5000}
    assert found.rates == {1: 5.0, 2: 8.0, 3: 11.25}
    assert found.efficiency == pytest.approx({2: 0.8})
    assert found.of_perfect == pytest.approx({1: 1.0, 2: 0.8, 3: 0.75})
    assert found.slowdown == pytest.approx(1.25)
    assert found.one_worker == pytest.approx(20)
    assert (found.gpu_rates, found.gpu_seconds, found.unread) == ({}, None, 2)


def test_a_gpu_that_is_here_is_taken_at_what_it_computes() -> None:
    kinds = ("none", "flagged", "all")
    found = figures_of(measured_by_hand(0.01), kinds, [1, 2, 3], DISK_RATES, load=0.5, unread=0)
    assert found.gpu_rates == pytest.approx(dict.fromkeys(kinds, 500.0))  # ten images in 0.02 s
    assert found.gpu_seconds == pytest.approx(0.02)
    assert found.one_worker is None
    node, options = Node(11, 1), SizingBenchmark("o.json", model="m")
    nodes = capacities(options, node, found, read_bytes=10_000)
    assert [one.gpu_rate for one in nodes] == pytest.approx([500.0] * 3)
    assert nodes[0].cores_needed == 13  # 500 × 19 ms × 1.25 are 11.9
    assert nodes[0].limits == pytest.approx({GPU: 500, CPUS: 10 / 0.02375, DISK: 1 / (1e-4 + 2e-6)})
    assert nodes[2].limits[DISK] == pytest.approx(1 / (1e-4 + 1e-4))
    given = capacities(replace(options, gpu_rate=(100.0, 200.0)), node, found, read_bytes=10_000)
    assert [(one.gpu_rate, one.maps) for one in given] == [(rate, kind) for rate in (100.0, 200.0) for kind in kinds]
    measured, _, derived = sizing_tables(options, node, found, nodes)
    assert measured.endswith("copy, forward, search, map, other: ms of the GPU, median of 3 rounds")
    assert derived == "derived: a node of 11 cores, 1 GPU; limits in images/s"
    assert "everything" not in sizing_tables(options, node, found, nodes)[measured]


# ------------------------------------------------------------------------------------------------------------- advice
def findings(capacities: list[Capacity], **changes: Any) -> Findings:
    given: dict[str, Any] = {
        "node": Node(2, 1),
        "capacities": capacities,
        "milliseconds": {"none": MS},
        "listed": False,
        "jpeg": True,
        "short_side": 1.0,
        "scaled": False,
        "other_engine": False,
        "scaling": {2: 0.95},
        "load": 0.1,
        "cores": 2,
    }
    return Findings(**{**given, **changes})


def at(cores: int, gpus: int, disk: float = 9e9, rate: float | None = 2500.0, maps: str = "none") -> Capacity:
    return capacity(Node(cores, gpus), maps, MS, 1.0, disk, gpu_rate=rate)


def test_a_gpu_that_waits_is_told_what_it_needs() -> None:
    needs = (
        "One GPU at 2,500 images/s needs 5 cores: 4 for reading, decoding and writing, 1 to drive it; this node has 2, "
        "so the GPU is busy 25% of the time. Decoding takes 62% of what CPUs do. "
    )
    more = "Add CPUs: those of any machine of the cluster feed the GPUs."
    large = (
        "Images are 3.0 times as large as the network needs: fit the model with --method.input.decode scaled, or store "
        "them smaller with jobs/ingest.py --resize. "
    )
    smaller = "Images are 3.0 times as large as the network needs: store them smaller with jobs/ingest.py --resize. "
    assert advice(findings([at(2, 1)])) == [needs + more]
    assert advice(findings([at(2, 1)], short_side=3.0)) == [needs + large + more]
    assert advice(findings([at(2, 1)], short_side=3.0, scaled=True)) == [needs + smaller + more]
    assert advice(findings([at(2, 1)], short_side=3.0, jpeg=False)) == [needs + smaller + more]
    slow = {"none": {**MS, "read": 5.0}}
    told = advice(findings([at(2, 1)], milliseconds=slow, listed=True))[0]
    assert told.endswith(f"Put the images into shards with jobs/ingest.py, which are read at once. {more}")
    assert "jobs/ingest.py" not in advice(findings([at(2, 1)], milliseconds=slow))[0]


def test_a_gpu_that_is_the_bottleneck_and_a_disk_that_is() -> None:
    assert advice(findings([at(8, 2, rate=500.0)], node=Node(8, 2))) == [
        "2 GPUs at 500 images/s each need 4 cores: 2 for reading, decoding and writing, 2 to drive them; this node has "
        "8. The GPU is the bottleneck, as it should be."
    ]
    assert advice(findings([at(8, 1, disk=250.0)], node=Node(8, 1))) == [
        "One GPU at 2,500 images/s needs 5 cores: 4 for reading, decoding and writing, 1 to drive it; this node has 8. "
        "The disk is the bottleneck: the GPU is busy 10% of the time. It allows 250 images/s: put images and scores on "
        "different or faster disks, or store smaller images with jobs/ingest.py --resize."
    ]


def test_cpus_alone_are_told_what_takes_most() -> None:
    alone, node = at(2, 0, rate=None), Node(2, 0)
    told = "2 cores without a GPU score 50.5 images/s; the network takes 76% of their time. "
    more = "Add machines: the rate grows with the cores."
    assert advice(findings([alone], node=node)) == [f"{told}A GPU takes that over. {more}"]
    assert advice(findings([alone], node=node, other_engine=True)) == [
        f"{told}Try --runtime.engine openvino, whose speed jobs/benchmark.py encoder tells. {more}"
    ]


def test_dear_maps_poor_scaling_and_a_busy_machine_are_told() -> None:
    rates = {"none": 1000.0, "flagged": 950.0, "all": 400.0}
    kinds = [replace(at(8, 1), maps=kind, rate=rate, bound=GPU) for kind, rate in rates.items()]
    assert advice(findings(kinds, node=Node(8, 1)))[1:] == [
        "Keeping the maps of all images lowers the rate beside a GPU at 2,500 images/s by 60%, of flagged ones by 5%: "
        "take --maps flagged, or none, unless each map is needed."
    ]
    slower = [replace(one, gpu_rate=500.0, rate=0.5 * one.rate + 100) for one in kinds]
    assert advice(findings([*slower, *kinds], node=Node(8, 1)))[2:] == advice(findings(kinds, node=Node(8, 1)))[1:]
    assert len(advice(findings([kinds[0], kinds[1], replace(kinds[2], rate=901.0)], node=Node(8, 1)))) == 1
    poor = {"scaling": {2: 0.6}, "node": Node(8, 1)}
    assert advice(findings([kinds[0]], **poor))[1:] == [
        "2 workers do 60% of 2 times what one does: cores share memory, caches and, with hyper-threading, each other; "
        "count on that rate."
    ]
    assert advice(findings([kinds[0]], load=1.5, **poor))[1:] == [
        "2 workers do 60% of 2 times what one does: other work ran beside them.",
        "The machine was busy before anything was measured (load 1.5 on 2 cores): measure again when it is idle; CPU "
        "times suffer less than rates.",
    ]


# ----------------------------------------------------------------------------------------------------------- measured
def test_time_inside_a_part_counts_once() -> None:
    """The outer part lasts from 0 to 10, one inside from 2 to 7, of which 3 to 4 are of a third."""
    now: Iterator[float] = iter([0.0, 2.0, 3.0, 4.0, 7.0, 10.0])
    clock = PartClock(lambda: next(now))
    add_one = clock.clocked("inner", lambda value: value + 1)
    with clock.part("outer"), clock.part("middle"):
        assert add_one(1) == 2
    assert clock.seconds == {"outer": 5.0, "middle": 4.0, "inner": 1.0}


def test_a_sample_is_spread_over_all_ranges() -> None:
    ranges = [RowRange("a", 100 * number, 100, number == 0) for number in range(10)]
    whole = spread_ranges(ranges, 300)
    assert [within.first for within in whole] == [0, 300, 600]
    assert [within.rows for within in cut_ranges(whole, 100)] == [34, 34, 34]
    assert [within.first for within in spread_ranges(ranges, 20)] == [0]
    assert [within.rows for within in cut_ranges(spread_ranges(ranges, 20), 20)] == [20]
    assert spread_ranges(ranges, 5000) == [replace(within, opens=False) for within in ranges]


def test_a_disk_is_read_and_written(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}").write_bytes(bytes(1000 * (number + 1)))
    stored = [str(tmp_path / f"{number}") for number in range(4)]  # the last one is not there
    rates = disk_rates(stored, str(tmp_path), rounds=1)
    assert (rates.read_bytes, rates.read_files, rates.enough) == (6000, 4, False)
    assert 0 < rates.read < 1e12
    assert 0 < rates.write < 1e12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


@pytest.fixture(scope="module")
def model_and_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ShardSet]:
    """A tiny model with a bank, and a few images to score."""
    folder = tmp_path_factory.mktemp("sizing")
    generator = np.random.default_rng(3)
    samples = [
        Scored(f"{number}.png", "disc", 0, "good", generator.integers(0, 256, (70, 80, 3), dtype=np.uint8), None)
        for number in range(20)
    ]
    method = UniFormaly(tiny_method())
    method.bank = MemoryBank.build(generator.normal(size=(50, method.encoder.dimension)).astype(np.float32))
    Model(method, ["disc"]).save(folder / "model")
    return str(folder / "model"), write_shards(folder / "shards", samples, 2)


def arguments(model: str, shards: ShardSet) -> dict[str, Any]:
    models = ModelSet.open(model)
    return {
        "shards": shards,
        "selection": Selection(),
        "model_set": models,
        "digests": {models.uri: "d" * 64},
        "plan": "0" * 64,
        "batch_size": 3,
        "limits": ImageLimits(),
        "execution": CPU,
        "threads": 1,
        "fold": False,
    }


@pytest.mark.parametrize("maps", ["none", "flagged", "all"])
def test_clocks_change_nothing(model_and_shards: tuple[str, ShardSet], maps: MapsKept) -> None:
    """Scores and maps are those of the stages of jobs/score.py, and one image of four is flagged."""
    model, shards = model_and_shards
    given = arguments(model, shards)
    stages = scoring_stages({**given, "output": "", "maps": maps}, ModelSet.open(model).descriptions())
    reader = stages.read()
    named = {"execution": CPU, "batch_size": 3, "maps": maps, "fold": False}
    calls = count()
    clock = PartClock(lambda: float(next(calls)))
    predictors: list[RangePredictor] = [RangePredictor(**named), MeasuredPredictor(clock, flagged=0.25, **named)]
    flagged = kept = 0
    for within in shards.ranges(Selection()):
        block = reader.read(to_plain(within), StageClock())
        plain, measured = (one.compute(block, StageClock(), Turn(Device())) for one in predictors)
        np.testing.assert_array_equal(measured.arrays["0/values"], plain.arrays["0/values"])
        if maps == "all":
            np.testing.assert_array_equal(measured.arrays["0/maps"], plain.arrays["0/maps"])
        flagged += measured.plain["runs"][0]["decisions"].count("fail")
        kept += len(measured.plain["runs"][0]["kept"])
    assert flagged == 5
    assert kept == {"none": 0, "flagged": 5, "all": 20}[maps]
    assert set(clock.seconds) >= {"copy", "forward", "search", "other"}
    assert set(clock.seconds) <= set(COMPUTING)
    assert min(clock.seconds.values()) > 0
    # between its first look at the clock and its last each of two tasks has one part after another, and no time else
    assert sum(clock.seconds.values()) == next(calls) - 2


def test_flagged_images_are_spread_evenly() -> None:
    predictor = SharePredictor(0.1, execution=CPU, batch_size=1, maps="flagged", fold=False)
    decided = [bool(flag) for size in (7, 8, 5, 80) for flag in predictor._decide(np.zeros(size)) == "fail"]
    places = np.flatnonzero(decided)
    assert len(places) == 10
    assert set(np.diff(places)) == {10}


def test_the_parts_of_a_stage_are_its_whole(
    model_and_shards: tuple[str, ShardSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the process that goes on by a second each time that it is looked at."""
    seconds = count()
    monkeypatch.setattr("pipelines.benchmarks.sizing_stages.time.process_time", lambda: float(next(seconds)))
    model, shards = model_and_shards
    ranges = shards.ranges(Selection())
    stages = MeasuredStages(arguments(model, shards), ModelSet.open(model).descriptions(), ranges, ranges[:1], 0.25)
    read = stages.read()
    assert read.amount == 20
    assert stages.images == 10
    passed: Pass = read.result
    assert set(passed.seconds) == {"read", "decode", "resize"}
    assert min(passed.seconds.values()) > 0
    assert sum(passed.seconds.values()) == pytest.approx(2)  # two tasks
    written = {}
    for maps in ("none", "flagged", "all"):
        timing = stages.compute_and_write(maps, str(tmp_path))
        own: Pass = timing.result
        assert timing.amount == 10
        assert set(own.seconds) <= set(PARTS) - {"read", "decode", "resize"}
        assert ("encode maps" in own.seconds) == (maps != "none")
        assert min(own.seconds.values()) > 0
        assert own.busy is None
        assert own.seconds["write"] + own.seconds.get("encode maps", 0) == pytest.approx(1)
        written[maps] = own.written
    assert written["none"] < written["flagged"] < written["all"]
    assert list(tmp_path.iterdir()) == []


def test_images_of_which_none_can_be_read_are_refused(model_and_shards: tuple[str, ShardSet]) -> None:
    model, shards = model_and_shards
    given = {**arguments(model, shards), "limits": ImageLimits(max_bytes=10)}
    with pytest.raises(DataError, match="none of 10 images can be read; the first one: "):
        MeasuredStages(given, ModelSet.open(model).descriptions(), [], shards.ranges(Selection())[:1], 0.25)


@pytest.fixture
def threads_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting others takes longer than all the rest."""
    monkeypatch.setattr(
        "pipelines.benchmarks.sizing_workers.ProcessPoolExecutor",
        lambda size, mp_context, initializer: ThreadPoolExecutor(size, initializer=initializer),
    )
    monkeypatch.setattr("pipelines.benchmarks.sizing_disk.WRITTEN_BYTES", 1 << 20)
    monkeypatch.setattr("pipelines.benchmarks.sizing_disk.CHUNK", 1 << 19)


@pytest.mark.usefixtures("threads_for_processes")
def test_workers_beside_a_gpu_read_only(model_and_shards: tuple[str, ShardSet], tmp_path: Path) -> None:
    model, shards = model_and_shards
    given = {**arguments(model, shards), "maps": "none"}
    models, ranges = ModelSet.open(model).descriptions(), shards.ranges(Selection())
    for device, written in (("cuda", False), ("cpu", True)):
        with Workers({**given, "execution": Execution(device)}, models, ranges, str(tmp_path), 1) as workers:
            timing = workers.run(1)
        assert timing.amount == 20
        assert timing.result > 0
        assert any(tmp_path.iterdir()) == written


UNTRACKED = TrackingOptions(enabled=False)


@pytest.mark.usefixtures("threads_for_processes")
def test_a_sizing_benchmark_end_to_end(model_and_shards: tuple[str, ShardSet], tmp_path: Path) -> None:
    model, shards = model_and_shards
    output = tmp_path / "new" / "sizing.json"
    options = SizingBenchmark(
        str(output),
        model=model,
        shards=shards.uri,
        sample=8,
        engine="pytorch",
        flagged=0.25,
        gpu_rate=(100.0, 1e6),
        cores=4,
        price_per_hour=2.0,
        corpus=10**9,
        workers=1,
        rounds=2,
        tracking=UNTRACKED,
    )
    content = measure(options)
    assert json.loads(output.read_text()) == content
    assert [path.name for path in output.parent.iterdir()] == ["sizing.json"]
    stages = content["stages"]
    assert list(stages) == ["none", "flagged", "all"]
    for kind, parts in stages.items():
        assert set(parts) <= set(PARTS)
        assert set(parts) >= set(FEEDING) - ({"encode maps"} if kind == "none" else set())
        assert min(parts.values()) > 0
    assert len({tuple(parts[name] for name in ("read", "decode", "resize")) for parts in stages.values()}) == 1
    assert len(content["nodes"]) == 6
    for one in content["nodes"]:
        assert one["rate"] == min(one["limits"].values()) == one["limits"][one["bound"]]
        assert one["cores_needed"] >= 2
        assert 0 < one["gpu_share"] <= 1
        assert one["cost"] == pytest.approx(2e6 / 3600 / one["rate"])
        assert one["machines"] == machines_needed(10**9, 24.0, one["rate"])
    assert content["nodes"][3]["cores_needed"] > content["nodes"][0]["cores_needed"]
    assert content["scaling"]["efficiency"] == {}
    assert content["scaling"]["slowdown"] == 1
    written = content["disk"]["written_bytes"]
    assert 0 < written["none"] < written["flagged"] < written["all"]
    assert content["advice"][0].startswith("One GPU at 100 images/s needs")
    assert "measured" in next(iter(content["tables"]))
    assert "derived" in list(content["tables"])[-1]
    print_report(content)
    metrics = metrics_of(content)
    assert metrics["maps_none/decode_ms"] == stages["none"]["decode"]
    assert metrics["node_maps_all/gpu_100/cost"] == content["nodes"][2]["cost"]
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_a_model_and_images_are_made_where_none_are_given(tmp_path: Path) -> None:
    options = SizingBenchmark("o.json", backbone="resnet10t", bank_rows=30, sample=2, engine="pytorch")
    setup = prepare(options, "cpu", str(tmp_path))
    assert setup.images.named == "drawn JPEG files of 224 × 224"
    assert (setup.images.short_side, setup.images.jpeg) == (224, True)
    assert setup.images.bytes == pytest.approx(np.mean([Path(file).stat().st_size for file in setup.images.stored]))
    assert [within.rows for within in setup.images.ranges] == [2]
    assert setup.model == "patchcore with resnet10t of random weights and a memory bank of 30 patches"
    method: Any = unianom.load(setup.model_set.uri).method
    assert method.bank.rows == 30


def test_listed_images_are_spread_over_the_listing(model_and_shards: tuple[str, ShardSet], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    draw_files(folder, 6, 32)
    options = SizingBenchmark("o.json", model=model_and_shards[0], images=(str(folder),), sample=3)
    images = sized_images(options, ModelSet.open(model_and_shards[0]), str(tmp_path), 3)
    assert len(images.stored) == 6
    assert sum(within.rows for within in images.ranges) == 3
    found = list(encoded(images.rows, images.ranges))
    assert found == [(folder / f"0000{number}.jpg").read_bytes() for number in (0, 2, 4)]
    assert images.short_side == 32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give either --model, a model folder, or --backbone"),
        ({"model": "m", "backbone": "resnet18"}, "give either --model, a model folder, or --backbone"),
        ({"model": "m", "images": ("a",), "shards": "s"}, "give either --images or --shards"),
        ({"model": "m", "method": "nothing"}, "no method 'nothing'; known: onenip"),
        ({"model": "m", "gpu_rate": (10.0,), "gpus": 0}, "--gpu_rate is that of a GPU of a node"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        SizingBenchmark("o.json", **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu_rate": (10.0,), "cores": 1}, "a node of 1 core, 1 GPU has no core left to read and write"),
        ({"gpus": 1}, "--gpus 1, but no GPU is here to be measured; say what one computes by --gpu_rate"),
        ({"device": "cuda"}, "--device cuda, but PyTorch finds no GPU"),
    ],
)
def test_nodes_that_cannot_be_are_refused(given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match=words):
        measure(SizingBenchmark("o.json", model="m", tracking=UNTRACKED, **given))

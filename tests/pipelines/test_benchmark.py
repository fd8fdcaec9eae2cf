"""The arithmetic of benchmarks, and that their other sides compute what they claim to."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.benchmark import BENCHMARKS, Measured, Turn, interleave, span
from pipelines.peers import plain_coreset, swept_aupro
from pipelines.runtime import ENDED, STARTED
from unianom.memory.coreset import farthest_points
from unianom.metrics.pixel import pixel_metrics


def test_ratios_are_taken_round_by_round() -> None:
    turns = {"a": [Turn(10, 1), Turn(10, 4)], "b": [Turn(5, 1), Turn(5, 1)]}
    ratio = Measured(turns, [0.0, 0.0]).ratio("a", "b", times=2)
    assert ratio["rounds"] == [1.0, 0.25]
    assert (ratio["median"], ratio["min"], ratio["max"]) == (0.625, 0.25, 1.0)


def test_sides_take_turns() -> None:
    seen: list[str] = []

    def side(name: str) -> Turn:
        seen.append(name)
        return Turn(1, 1, name)

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


def test_the_plain_coreset_makes_the_same_picks() -> None:
    features = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    starts = np.array([3, 50, 200])
    differences = features[:, None].astype(np.float64) - features[starts]
    initial = np.sqrt((differences**2).sum(-1)).mean(1)
    assert plain_coreset(features, starts, 40) == farthest_points(features, initial, 40).indices.tolist()


def test_every_benchmark_documents_its_options() -> None:
    for options, _ in BENCHMARKS.values():
        assert options.__doc__ is not None
        for name in options.__dataclass_fields__:  # type: ignore[attr-defined]
            assert f"{name}:" in options.__doc__

"""Units of work on a pool of actors: all are done, and what fails is told as it was raised."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime import ENDED, STARTED, RuntimeOptions, run_units
from unianom.errors import DataError, ModelError

pytestmark = pytest.mark.ray


class Doubler:
    """Doubles numbers; refuses seven, or to be made at all."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise ModelError("the model is damaged; fit it again")

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        if unit["number"] == 7:
            raise DataError("seven is damaged; make it again")
        return {"number": unit["number"], "double": 2 * unit["number"]}


def test_every_unit_is_done_once_and_tells_when(ray_cluster: None) -> None:
    units = [{"number": number} for number in range(7)]
    before = time.time()
    results = list(run_units(Doubler, {}, units, RuntimeOptions(workers=3)))
    assert sorted((r["number"], r["double"]) for r in results) == [(number, 2 * number) for number in range(7)]
    assert all(before <= r[STARTED] <= r[ENDED] <= time.time() for r in results)
    assert list(run_units(Doubler, {}, [], RuntimeOptions(workers=3))) == []


def test_an_error_in_a_unit_is_told_as_it_was_raised(ray_cluster: None) -> None:
    units = [{"number": number} for number in range(9)]
    with pytest.raises(DataError, match="seven is damaged; make it again"):
        list(run_units(Doubler, {}, units, RuntimeOptions(workers=2)))


def test_an_error_in_making_a_worker_is_told_as_it_was_raised(ray_cluster: None) -> None:
    with pytest.raises(ModelError, match="the model is damaged; fit it again"):
        list(run_units(Doubler, {"broken": True}, [{"number": 1}], RuntimeOptions(workers=1)))


class DiesOnce:
    """A worker that is killed, as by the kernel, in the middle of its first unit."""

    def __init__(self, marker: str) -> None:
        self._marker = Path(marker)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        if unit["number"] == 3 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": unit["number"]}


def test_a_killed_worker_loses_nothing(ray_cluster: None, tmp_path: Path) -> None:
    units = [{"number": number} for number in range(12)]
    arguments = {"marker": str(tmp_path / "died")}
    done = [r["number"] for r in run_units(DiesOnce, arguments, units, RuntimeOptions(workers=2))]
    assert (tmp_path / "died").exists()
    assert sorted(done) == list(range(12))

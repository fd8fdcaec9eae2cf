"""Units of work on a pool of actors: all are done, and what fails is told as it was raised."""

from __future__ import annotations

import time
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


@pytest.mark.parametrize("workers", [1, 3])
def test_every_unit_is_done_once_and_tells_when(ray_cluster: None, workers: int) -> None:
    units = [{"number": number} for number in range(7)]
    before = time.time()
    results = list(run_units(Doubler, {}, units, RuntimeOptions(workers=workers)))
    assert sorted((r["number"], r["double"]) for r in results) == [(number, 2 * number) for number in range(7)]
    assert all(before <= r[STARTED] <= r[ENDED] <= time.time() for r in results)
    assert list(run_units(Doubler, {}, [], RuntimeOptions(workers=workers))) == []


def test_an_error_in_a_unit_is_told_as_it_was_raised(ray_cluster: None) -> None:
    units = [{"number": number} for number in range(9)]
    with pytest.raises(DataError, match="seven is damaged; make it again"):
        list(run_units(Doubler, {}, units, RuntimeOptions(workers=2)))


def test_an_error_in_making_a_worker_is_told_as_it_was_raised(ray_cluster: None) -> None:
    with pytest.raises(ModelError, match="the model is damaged; fit it again"):
        list(run_units(Doubler, {"broken": True}, [{"number": 1}], RuntimeOptions(workers=1)))

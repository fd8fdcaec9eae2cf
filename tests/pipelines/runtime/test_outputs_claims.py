"""Claims under which nothing was written: taken back by the job that fails, taken over where a killed one left them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.runtime.locks import BusyError
from pipelines.runtime.outputs import LOCK, PLAN, check_output, open_file, open_output
from unianom import files
from unianom.errors import DataError, WeightsError

PLANS = {"first": {"method": "patchcore", "weights": "a"}, "mended": {"method": "patchcore", "weights": "b"}}


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that is not there yet, on disk or on an object store."""
    if request.param == "local":
        yield str(tmp_path / "output")
    else:
        uri = f"memory://test-{uuid.uuid4().hex}"
        yield uri
        files.remove(uri)


def put(output: str, *names: str) -> None:
    for name in names:
        files.write_bytes(files.join(output, name), b"{}")


def left_behind(output: str, kind: str = "model", plan: dict[str, str] = PLANS["first"]) -> None:
    """Leave what a killed job leaves that had only claimed its output."""
    with open_output(output, kind, plan):
        pass


def fail(output: str, *written: str, kind: str = "model", error: type[BaseException] = WeightsError) -> None:
    """Run a job that fails, after it wrote some files."""
    with pytest.raises(error), open_output(output, kind, PLANS["first"]):  # noqa: PT012
        put(output, *written)
        raise error("no weights")


# ---------------------------------------------------------------------------------------------------------- taken over
@pytest.mark.parametrize("kind", ["model", "score set", "shard set", "campaign", "models"])
def test_another_plan_of_any_job_takes_over_where_nothing_was_written(output: str, kind: str) -> None:
    left_behind(output, kind)
    check_output(output, "model", PLANS["mended"])
    with open_output(output, "model", PLANS["mended"]) as digest:
        put(output, "model.json")
    assert files.read_json(files.join(output, PLAN)) == {"job": "model", "digest": digest, "plan": PLANS["mended"]}


@pytest.mark.parametrize(
    "written",
    ["model.json", "_work/part-00000.npy", "weights.safetensors.0a1b2c3d.tmp", "notes.txt", "sub/_plan.json"],
)
def test_what_was_written_is_still_refused(output: str, written: str) -> None:
    left_behind(output)
    put(output, written)
    with pytest.raises(DataError, match=r"a model of another run \(differing in: weights\).*--overwrite true"):
        check_output(output, "model", PLANS["mended"])
    with pytest.raises(DataError, match="choose another output"), open_output(output, "score set", PLANS["mended"]):
        pass
    assert files.list_files(output) == sorted([PLAN, written])
    assert files.read_json(files.join(output, PLAN))["plan"] == PLANS["first"]


def test_a_claim_whose_job_is_at_work_is_not_taken_over(tmp_path: Path) -> None:
    output = str(tmp_path / "output")
    code = (
        "import sys; from pipelines.runtime.outputs import open_output\n"
        f"with open_output({output!r}, 'model', {PLANS['first']!r}):\n"
        "    print('claimed', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(BusyError, match=rf"process {other.pid} "), open_output(output, "model", PLANS["mended"]):
            pass
        assert files.read_json(files.join(output, PLAN))["plan"] == PLANS["first"]
        other.kill()
    with open_output(output, "model", PLANS["mended"]):
        assert files.read_json(files.join(output, PLAN))["plan"] == PLANS["mended"]


def test_models_of_single_categories_are_taken_over_one_by_one(output: str) -> None:
    """One category was claimed and nothing fitted, then another was."""
    left_behind(output, "models")
    left_behind(files.join(output, "bottle"))
    check_output(output, "models", PLANS["mended"])
    check_output(files.join(output, "bottle"), "model", PLANS["mended"])
    put(files.join(output, "bottle"), "model.json")
    for folder, kind in ((output, "models"), (files.join(output, "bottle"), "model")):
        with pytest.raises(DataError, match=r"--overwrite true"):
            check_output(folder, kind, PLANS["mended"])


# ---------------------------------------------------------------------------------------------------------- taken back
@pytest.mark.parametrize("error", [WeightsError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["model", "campaign", "models", "shard set"])
def test_a_job_that_fails_before_it_writes_leaves_nothing(output: str, kind: str, error: type[BaseException]) -> None:
    fail(output, kind=kind, error=error)
    assert files.list_files(output) == []
    assert "://" in output or not Path(output).exists()  # a store's folder is the names of its files


def test_a_job_that_wrote_leaves_its_claim_and_goes_on(output: str) -> None:
    fail(output, "_work/part-00000.npy")
    assert files.list_files(output) == [PLAN, "_work/part-00000.npy"]
    with open_output(output, "model", PLANS["first"]):
        assert "_work/part-00000.npy" in files.list_files(output)


def test_the_folder_that_was_there_stays(tmp_path: Path) -> None:
    output = tmp_path / "mine"
    (output / "empty folder of mine").mkdir(parents=True)
    with pytest.raises(DataError, match="holds other files"), open_output(str(output), "model", PLANS["first"]):
        pass
    (output / "empty folder of mine").rmdir()
    fail(str(output))
    assert list(output.iterdir()) == []


def test_a_claim_of_an_earlier_run_is_left_to_it(output: str) -> None:
    """One that goes on with it, in the same process or another, does not take it back."""
    left_behind(output)
    fail(output)
    assert files.list_files(output) == [PLAN]
    files.remove(files.join(output, PLAN))
    with open_output(output, "model", PLANS["first"]):
        fail(output)
        assert set(files.list_files(output)) == {PLAN, LOCK}


def test_a_claim_stays_while_workers_may_still_write(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends them a moment after the job: a part that came without its plan would be nobody's."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    fail(output)
    assert files.list_files(output) == [PLAN]
    check_output(output, "model", PLANS["mended"])


def test_categories_that_were_finished_stay_when_a_later_one_fails(output: str) -> None:
    bottle, cable = (files.join(output, name) for name in ("bottle", "cable"))
    with pytest.raises(WeightsError), open_output(output, "models", PLANS["first"]):  # noqa: PT012
        with open_output(bottle, "model", PLANS["first"]):
            put(bottle, "model.json")
        with open_output(cable, "model", PLANS["first"]):
            raise WeightsError("no weights")
    assert files.list_files(output) == [PLAN, "bottle/_plan.json", "bottle/model.json"]


def test_a_file_that_is_not_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    for there in (False, True):
        with (
            pytest.raises(WeightsError),
            open_file(str(folder / "report.html"), "a report", "digest", lambda content: None),
        ):
            raise WeightsError("no weights")
        assert folder.exists() == there
        folder.mkdir(exist_ok=True)
    assert list(folder.iterdir()) == []

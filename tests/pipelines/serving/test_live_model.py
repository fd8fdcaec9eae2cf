"""The model in use: replaced when another lies there, kept when that one is no good."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving import live_model
from pipelines.serving.live_model import LiveModel
from pipelines.serving.model_source import FolderSource, ModelSource, RegistrySource, model_source
from pipelines.serving.predictor import load_predictor
from tests.pipelines.serving.conftest import RecordedMetrics, options
from unianom import files
from unianom.errors import MachineError, ModelError, OptionError


class Stub:
    """Stands in for a predictor."""

    def __init__(self, version: str) -> None:
        self.version, self.digest, self.files = version, "d" + version, None


class Registry(ModelSource):
    """A source whose version a test sets."""

    def __init__(self) -> None:
        super().__init__("models:/line@champion")
        self.now = "1"

    def version(self) -> str:
        if self.now == "away":
            raise MachineError("the registry cannot be reached")
        return self.now

    def fetch(self, version: str, folder: Path) -> str:
        return f"/models/{version}"


class Loader:
    """Makes stubs, but of versions that are bad."""

    def __init__(self) -> None:
        self.bad = {"2"}
        self.asked: list[str] = []

    def __call__(self, folder: str, version: str) -> Any:
        self.asked.append(folder)
        if version in self.bad:
            raise ModelError(f"{folder} is damaged")
        return Stub(version)


@pytest.fixture
def live() -> tuple[LiveModel, Registry, Loader, RecordedMetrics]:
    source, load, metrics = Registry(), Loader(), RecordedMetrics()
    made = LiveModel(source, load, metrics)  # type: ignore[arg-type]
    made.start(None)
    return made, source, load, metrics


def test_another_version_takes_over_once_it_is_loaded(live: Any) -> None:
    model, source, load, metrics = live
    first = model.predictor
    assert not model.poll()
    assert model.predictor is first
    source.now = "3"
    assert model.poll()
    assert model.predictor.version == "3"
    assert first.version == "1"  # whoever still holds it has it whole
    assert load.asked == ["/models/1", "/models/3"]
    assert metrics.of("model") == [["1", "d1", True], ["1", "d1", False], ["3", "d3", True]]


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, source, load, metrics = live
    source.now = "2"
    with caplog.at_level("ERROR", "ray.serve.unianom"):
        assert not model.poll()
    assert model.predictor.version == "1"
    (told,) = [json.loads(record.getMessage()) for record in caplog.records]
    assert told["event"] == "model not loaded"
    assert (told["version"], told["still_in_use"], told["error"]) == ("2", "1", "/models/2 is damaged")
    assert metrics.of("load") == [[True], [False]]
    load.bad.clear()
    assert model.poll()
    assert model.predictor.version == "2"
    assert metrics.of("load")[-1] == [True]


def test_a_bad_version_is_tried_ever_more_seldom(live: Any) -> None:
    model, source, load, _ = live
    source.now = "2"
    tries = []
    for number in range(40):
        before = len(load.asked)
        model.poll()
        if len(load.asked) > before:
            tries.append(number)
    assert tries == [0, 1, 3, 7, 15, 31]
    source.now = "4"  # which is no reason to wait with another one
    assert model.poll()
    assert model.predictor.version == "4"


def test_moved_back_to_the_model_in_use_nothing_is_wrong_any_more(live: Any) -> None:
    model, source, load, metrics = live
    source.now = "2"
    model.poll()
    source.now = "1"
    assert not model.poll()
    assert metrics.of("load")[-1] == [True]
    assert load.asked == ["/models/1", "/models/2"]


def test_a_registry_that_is_away_leaves_the_model(live: Any) -> None:
    model, source, _, metrics = live
    source.now = "away"
    assert not model.poll()
    assert model.predictor.version == "1"
    assert metrics.of("load")[-1] == [False]


def test_the_same_model_under_another_version_is_told_once(live: Any) -> None:
    model, source, _, metrics = live
    model._load = lambda folder, version: Stub("1") if version == "1" else _renamed("3")
    source.now = "3"
    assert model.poll()
    assert metrics.of("model") == [["1", "d1", True], ["1", "d1", False], ["3", "d1", True]]


def _renamed(version: str) -> Any:
    stub = Stub("1")
    stub.version = version
    return stub


@pytest.mark.parametrize("poll_seconds", [None, 0.01])
def test_a_model_that_is_not_needed_at_once_is_looked_for_until_it_is_there(
    poll_seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no longer, unless it is to be looked for others."""
    monkeypatch.setattr(live_model, "FIRST_POLL_SECONDS", 0.01)
    source, load = Registry(), Loader()
    source.now = "2"
    threads = set(threading.enumerate())
    model = LiveModel(source, load, RecordedMetrics())  # type: ignore[arg-type]
    model.start(poll_seconds, needed=False)
    (watch,) = set(threading.enumerate()) - threads
    load.bad.clear()
    if poll_seconds is None:
        watch.join(60)
        assert not watch.is_alive()
        assert model.predictor is not None
    else:
        while model.predictor is None:
            watch.join(0.01)
        source.now = "3"
        while model.predictor.version == "2":
            watch.join(0.01)
        model.close()


def test_the_watch_polls_until_it_is_closed() -> None:
    source, metrics = Registry(), RecordedMetrics()
    loaded = threading.Event()

    def load(folder: str, version: str) -> Any:
        if version == "3":
            loaded.set()
        return Stub(version)

    model = LiveModel(source, load, metrics)  # type: ignore[arg-type]
    model.start(0.01)
    source.now = "3"
    assert loaded.wait(30)
    model.close()


def test_a_first_model_that_is_needed_must_be_there() -> None:
    source = Registry()
    source.now = "2"
    model = LiveModel(source, Loader(), RecordedMetrics())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is damaged"):
        model.start(None)
    model.start(600.0, needed=False)  # as a shadow's
    assert model.predictor is None
    model.close()


def test_a_folder_is_another_model_when_its_rule_is(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    given = options(folder)
    live = LiveModel(
        FolderSource(str(folder)),
        lambda path, version: load_predictor(path, given.model, version, given, "cpu"),
        RecordedMetrics(),  # type: ignore[arg-type]
    )
    live.start(None)
    assert live.predictor is not None
    assert live.predictor.version == live.predictor.digest
    content = files.read_json(folder / "model.json")
    content["threshold"]["value"] = 0.125
    files.write_json(folder / "model.json", content)
    assert live.poll()
    threshold = live.predictor.threshold(None)
    assert threshold is not None
    assert threshold.fail_above == 0.125
    (folder / "model.json").write_text("{")
    assert not live.poll()
    assert live.predictor.threshold(None) == threshold


def test_what_a_uri_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert isinstance(model_source("runs/a", None), FolderSource)
    with pytest.raises(OptionError, match="--mlflow_uri or MLFLOW_TRACKING_URI"):
        model_source("models:/line@champion", None)
    assert isinstance(model_source("models:/line@champion", "sqlite:///a.db"), RegistrySource)
    assert model_source("models:/line/7", "sqlite:///a.db").version() == "7"
    files.write_json(tmp_path / "models.json", {"cog": "cog"})
    with pytest.raises(ModelError, match="one model for each category"):
        FolderSource(str(tmp_path)).version()
    with pytest.raises(ModelError, match=r"no model.json in"):
        FolderSource(str(tmp_path / "none")).version()

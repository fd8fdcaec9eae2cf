"""A tiny model as a server has it, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.serving.access import Access
from pipelines.serving.http_app import make_app
from pipelines.serving.live_model import LiveModel
from pipelines.serving.model_source import FolderSource
from pipelines.serving.predictor import Predictor, load_predictor
from pipelines.serving.serve_options import ServeOptions
from pipelines.serving.service import ScoringService
from tests.pipelines.conftest import Small
from unianom.data.shards import Selection, ShardSet
from unianom.model import load


class RecordedMetrics:
    """Stands in for `ServingMetrics`: keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: self.calls.append((name, *values))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of the calls of this name."""
        return [values for called, *values in self.calls if called == name]  # type: ignore[misc]


def options(model: Path | str, **changes: Any) -> ServeOptions:
    return ServeOptions(**{"model": str(model), "engine": "pytorch", "poll_seconds": None, **changes})


def predictor_of(model: Path | str, **changes: Any) -> Predictor:
    given = options(model, **changes)
    return load_predictor(given.model, given.model, "1", given, "cpu")


def service_of(model: Path | str, **changes: Any) -> ScoringService:
    given, metrics = options(model, **changes), RecordedMetrics()
    live = LiveModel(
        FolderSource(given.model),
        lambda folder, version: load_predictor(folder, given.model, version, given, "cpu"),
        metrics,  # type: ignore[arg-type]
    )
    live.start(None)
    return ScoringService(live, given, 1, metrics)  # type: ignore[arg-type]


def client_of(service: ScoringService, token: str = "", host: str = "127.0.0.1", shadow: Any = None) -> TestClient:
    return TestClient(make_app(service, Access(token), shadow), client=(host, 50_000))


@pytest.fixture(scope="session")
def predictor(tiny_model: Path) -> Predictor:
    return predictor_of(tiny_model)


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Path:
    """A copy of the tiny model that has thresholds for categories, too."""
    folder = tiny_model.parent / "served"
    made = load(tiny_model)
    assert made.threshold is not None
    own = {"cog": replace(made.threshold, value=1.0), "weave": replace(made.threshold, value=1e6)}
    replace(made, category_thresholds=own).save(folder)
    return folder


@pytest.fixture
def service(model: Path) -> ScoringService:
    return service_of(model)


@pytest.fixture
def client(service: ScoringService) -> TestClient:
    return client_of(service)


@pytest.fixture(scope="session")
def pictures(small: Small) -> list[bytes]:
    """Encoded files of test images."""
    table = ShardSet.open(str(small.shards)).table(Selection(("test",)), ["image"])
    found: list[bytes] = table["image"].to_pylist()
    return found

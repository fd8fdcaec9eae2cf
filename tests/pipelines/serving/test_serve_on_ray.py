"""A server on Ray: scores of batch scoring, a model that is replaced under load, a full queue, a shadow, metrics."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import ray
import requests
from mlflow import MlflowClient
from ray import serve as ray_serve

from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.tracking import track
from pipelines.serving.serve import start, stop
from pipelines.serving.serve_options import ReplicaOptions, ServeOptions
from tests.pipelines.conftest import Small
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.model import load

pytestmark = pytest.mark.ray

SECONDS = 120
"""Time that anything here may take."""


class Registry:
    """Versions of a model in an MLflow of their own.

    Args:
        folder: for the store and models.
        first: model folder that the versions are made of.
    """

    def __init__(self, folder: Path, first: Path) -> None:
        self._folder, self._first = folder, first
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)

    def register(self, threshold: float) -> str:
        """Register the model with another threshold; return its digest."""
        folder = self._folder / f"model-{threshold}"
        model = load(self._first)
        assert model.threshold is not None
        model = replace(model, threshold=replace(model.threshold, value=threshold))
        model.save(folder)
        with track(TrackingOptions(mlflow_uri=self.uri), "train", str(folder), {}) as run:
            run.register_model(str(folder), "line")
        return model.digest

    def move(self, version: int) -> None:
        self.client.set_registered_model_alias("line", "champion", str(version))

    def damage(self, version: int) -> None:
        uri = self.client.get_model_version_download_uri("line", str(version))
        (weights,) = Path(unquote(urlsplit(uri).path)).rglob("weights.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    """Ask again until there is an answer that is true."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    return pytest.fail(f"{what} did not come within {SECONDS} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
    return port


def metric(name: str, **labels: str) -> float:
    """Return the sum of a metric over what Ray's exporters tell; 0 if it is not there."""
    total = 0.0
    for node in ray.nodes():
        lines = requests.get(
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30
        ).text
        for line in lines.splitlines():
            if line.startswith(f"ray_{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
    return total


@pytest.fixture
def server(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> Iterator[tuple[str, Registry, list[str]]]:
    """A server's address, its registry, and the digests of two good versions; the third is damaged."""
    registry = Registry(tmp_path, tiny_model)
    digests = [registry.register(value) for value in (1e-6, 1e6, 5.0)][:2]
    registry.damage(3)
    registry.move(1)
    options = ServeOptions(
        "models:/line@champion",
        shadow="models:/line/2",
        port=free_port(),
        mlflow_uri=registry.uri,
        engine="pytorch",
        max_batch_size=3,
        batch_wait_seconds=1.0,
        poll_seconds=0.5,
        replicas=ReplicaOptions(max_ongoing_requests=4, max_queued_requests=4, retry_after_seconds=2),
    )
    try:
        start(options)
        yield f"http://127.0.0.1:{options.port}", registry, digests
    finally:
        stop()
        ray_serve.shutdown()


def ask(address: str, images: list[bytes], **fields: Any) -> requests.Response:
    body = {"images": [{"image": base64.b64encode(data).decode()} for data in images], **fields}
    return requests.post(f"{address}/v1/score", json=body, timeout=SECONDS)


def test_a_server_on_ray(server: Any, small: Small, tiny_scores: Path) -> None:
    address, registry, digests = server
    test = Selection(("test",))
    shards = ShardSet.open(str(small.shards))
    ranges = [
        [row for batch in shards.read_range(within, test, ["sample_id", "image"]) for row in batch.to_pylist()]
        for within in shards.ranges(test)
    ]
    pictures = [row["image"] for rows in ranges for row in rows]

    # scores are those of batch scoring, to the bit where batches are the same
    expected = {row["sample_id"]: row["score"] for row in ScoreSet.open(str(tiny_scores)).table().to_pylist()}
    batches = [rows[place : place + 3] for rows in ranges for place in range(0, len(rows), 3)]  # as they were there
    assert len(batches) >= 3
    for batch in batches[:3]:
        answer = ask(address, [row["image"] for row in batch], map="overlay")
        assert answer.status_code == 200, answer.text
        found = answer.json()["results"]
        assert [one["score"] for one in found] == [expected[row["sample_id"]] for row in batch]
        assert {(one["model"], one["decision"], one["status"]) for one in found} == {(digests[0], "fail", "ok")}
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    kept = requests.get(f"{address}/v1/model", headers={"X-Request-ID": "mine"}, timeout=SECONDS)
    assert (kept.json()["version"], kept.headers["x-request-id"]) == ("1", "mine")

    # the alias moves under load, first to a good model, then to one that is damaged: no request fails
    answers: list[tuple[int, str]] = []
    ended = threading.Event()

    def load_on(place: int) -> None:
        while not ended.is_set():
            answer = ask(address, pictures[place : place + 2])
            answers.extend((answer.status_code, one["model"]) for one in answer.json().get("results", [{"model": ""}]))

    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load_on, place) for place in (0, 2, 4)]
        try:
            wait_for("an answer", lambda: len(answers) > 10)
            registry.move(2)
            wait_for("the new model", lambda: answers[-1][1] == digests[1])
            registry.move(3)
            wait_for("a failed load", lambda: metric("unianom_model_load_failing", role="champion") == 1)
        finally:
            ended.set()
        for one in loads:
            one.result()
    assert {code for code, _ in answers} == {200}
    assert {model for _, model in answers} == set(digests)
    assert ask(address, pictures[:1]).json()["results"][0]["model"] == digests[1]
    assert metric("unianom_model_loads_total", role="champion", result="loaded") == 2

    # more than replica and queue hold is refused at once, and the rest is answered
    with ThreadPoolExecutor(40) as pool:
        codes = list(pool.map(lambda _: ask(address, pictures[:3]), range(40)))
    count = Counter(answer.status_code for answer in codes)
    assert set(count) == {200, 503}
    assert {answer.headers["retry-after"] for answer in codes if answer.status_code == 503} == {"2"}
    assert ask(address, pictures[:1]).status_code == 200

    # the shadow has seen what the champion answered, and its other threshold shows
    flips = wait_for("flips", lambda: metric("unianom_shadow_flips_total", champion="fail", shadow="pass"))
    assert flips >= sum(map(len, batches[:3]))
    wait_for("metrics", lambda: metric("unianom_images_total", role="champion", status="ok") >= len(answers))
    assert metric("unianom_batch_images_count", role="champion") > 0

"""A server under load: latencies, images per second against the bare forward pass, a full queue, a model replaced."""

from __future__ import annotations

import http.client
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.benchmarks.bare_forward import BareForward
from pipelines.benchmarks.harness import Side, Timing, clocked, fixed_threads, interleave
from pipelines.benchmarks.options import ServingBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.benchmarks.scoring import FORWARD_IMAGES, input_batches
from pipelines.runtime.actors import connect
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.serving.predictor import PreparedImage, load_predictor
from pipelines.serving.serve import start, stop
from pipelines.serving.serve_options import ReplicaOptions, ServeOptions
from unianom import files
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.execution import CPU

PICTURES = 64
"""Different images that are sent, at most, over and over."""


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        code: HTTP status; 0 where there was no answer.
        seconds: from its first byte to the last of its answer.
        retry_after: header of that name.
        body: content of the answer.
    """

    code: int
    seconds: float
    retry_after: str | None
    body: bytes


def measure_serving(options: ServingBenchmark) -> dict[str, Any]:
    """Serve a model by one replica with one thread, and send it images from this machine.

    Sides in turn: clients that each send an image when the last one is answered, one alone and several together; the
    same model on decoded images in full batches, without a server; and the bare forward pass of the backbone; both on
    one thread. Then, once each: more clients than replica and queue hold, and a model that is replaced meanwhile.
    """
    shards = ShardSet.open(options.shards)
    pictures = shards.table(Selection(), ["image"])["image"].slice(0, PICTURES).to_pylist()
    if not pictures:
        raise DataError(f"{options.shards} holds no images; give a shard set with some")
    method = load_model(options.model, CPU).method
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder:
        cached, model = str(Path(folder, "images.npy")), Path(folder, "model")
        batches = input_batches(method, shards, Selection(), options.max_batch_size)
        np.save(cached, np.concatenate(list(islice(batches, max(1, FORWARD_IMAGES // options.max_batch_size)))))
        shutil.copytree(files.full_uri(options.model), model)
        with BareForward(options.model, cached, options.max_batch_size, 1) as bare, _served(options, model) as port:
            load = _Load(port, pictures, options.seconds)
            load.run(options.clients)  # what is slow at the first call does not count
            several, alone, forward = f"{options.clients} clients", "model without a server", "bare forward"
            predict = _predict(options, pictures)
            sides: dict[str, Side] = {
                "1 client": lambda: load.timing(1),
                several: lambda: load.timing(options.clients),
                alone: clocked(len(pictures), predict),
                forward: lambda: Timing(*bare.run(1)),
            }
            with fixed_threads(1):
                measured = interleave(sides, options.rounds)
            tables = {
                "latency, milliseconds": {name: _latencies(measured.turns[name]) for name in ("1 client", several)},
                "overload": {f"{options.overload_clients} clients": _overload(load, options.overload_clients)},
                "replaced under load": {several: _replaced(load, options.clients, model)},
            }
    ratios = {f"{several} ÷ {other}": measured.ratio(several, other) for other in (alone, forward)}
    return write_report(options, "images", measured, ratios, tables=tables)


def _predict(options: ServingBenchmark, pictures: Sequence[bytes]) -> Callable[[], None]:
    """Return what scores decoded images in full batches, as a replica does, in this process."""
    given = ServeOptions(options.model, engine=options.engine, max_batch_size=options.max_batch_size)
    predictor = load_predictor(options.model, options.model, "", given, "cpu")
    images = [PreparedImage(predictor.decode(picture)) for picture in pictures]

    def predict() -> None:
        for first in range(0, len(images), options.max_batch_size):
            predictor.predict(images[first : first + options.max_batch_size])

    return predict


@contextmanager
def _served(options: ServingBenchmark, model: Path) -> Iterator[int]:
    """Serve a model folder; yields the port."""
    given = ServeOptions(
        str(model),
        port=options.port,
        engine=options.engine,
        max_batch_size=options.max_batch_size,
        poll_seconds=0.5,
        replicas=ReplicaOptions(
            max_ongoing_requests=2 * options.max_batch_size, max_queued_requests=2 * options.max_batch_size
        ),
    )
    connect(RuntimeOptions())
    try:
        start(given)
        yield given.port
    finally:
        stop()


class _Load:
    """Clients that send images, each the next one when the last is answered.

    Args:
        port: of the server.
        pictures: encoded files.
        seconds: how long they do.
    """

    def __init__(self, port: int, pictures: Sequence[bytes], seconds: float) -> None:
        self._port, self._pictures, self.seconds = port, pictures, seconds

    def run(self, clients: int) -> list[Answer]:
        """Return what so many clients at a time were answered."""
        end = time.monotonic() + self.seconds
        with ThreadPoolExecutor(clients) as pool:
            found = pool.map(lambda number: self._ask(number, end), range(clients))
            return [answer for answers in found for answer in answers]

    def timing(self, clients: int) -> Timing:
        """Return the same as a side's turn: images that were scored, in how many seconds."""
        begin = time.perf_counter()
        answers = self.run(clients)
        seconds = time.perf_counter() - begin
        if failed := Counter(answer.code for answer in answers if answer.code != 200):
            raise DataError(f"the server did not answer as it should under an ordinary load: {dict(failed)}")
        return Timing(len(answers), seconds, answers)

    def _ask(self, number: int, end: float) -> list[Answer]:
        answers: list[Answer] = []
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        first = number % len(self._pictures)  # not all the same image at the same time
        for picture in cycle([*self._pictures[first:], *self._pictures[:first]]):
            if time.monotonic() > end:
                break
            begin = time.perf_counter()
            code, retry_after, body = 0, None, b""
            try:
                connection.request("POST", "/v1/score", picture, {"Content-Type": "application/octet-stream"})
                response = connection.getresponse()
                code, retry_after, body = response.status, response.headers["Retry-After"], response.read()
            except (OSError, http.client.HTTPException):
                connection.close()  # opened again by the next request
            answers.append(Answer(code, time.perf_counter() - begin, retry_after, body))
        connection.close()
        return answers


def _latencies(turns: Sequence[Timing]) -> dict[str, float]:
    seconds = np.array([answer.seconds for turn in turns for answer in turn.result if answer.code == 200])
    return {f"p{part}": 1000 * float(np.percentile(seconds, part)) for part in (50, 95, 99)}


def _overload(load: _Load, clients: int) -> dict[str, Any]:
    """Return what more clients than the queue holds are answered, and what that costs the replica in memory."""
    before, peaks, ended = _replica_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            peaks.append(_replica_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    answers = load.run(clients)
    ended.set()
    watching.join()
    codes = Counter(answer.code for answer in answers)
    refused = [answer for answer in answers if answer.code == 503]
    return {
        "answered": codes[200],
        "503": codes[503],
        "503 with Retry-After": sum(answer.retry_after is not None for answer in refused),
        "other": len(answers) - codes[200] - codes[503],
        **{name: value for name, value in _latencies([Timing(1, 1, answers)]).items() if name != "p95"},
        "503 p99": 1000 * float(np.percentile([answer.seconds for answer in refused], 99)) if refused else 0.0,
        "MB before": before / 1e6,
        "MB peak": max(peaks) / 1e6,
        "MB after": _replica_bytes() / 1e6,
    }


def _replaced(load: _Load, clients: int, model: Path) -> dict[str, Any]:
    """Return what clients are answered while another model takes the place of the one in use."""
    content = files.read_json(model / "model.json")
    content["provenance"] = {**content["provenance"], "benchmark": "replaced"}
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(load.run, clients)
        time.sleep(load.seconds / 4)
        files.write_json(model / "model.json", content)
        found = answers.result()
    digest = files.sha256_file(model / "model.json").encode()
    good = [answer for answer in found if answer.code == 200]
    return {
        "requests": len(found),
        "failed": len(found) - len(good),
        "by the old model": sum(digest not in answer.body for answer in good),
        "by the new one": sum(digest in answer.body for answer in good),
        **_latencies([Timing(1, 1, found)]),
        "longest": 1000 * max(answer.seconds for answer in found),
    }


def _replica_bytes() -> int:
    """Return the memory that the replica's process has to itself."""
    import psutil  # Ray brings its own, and shows it when imported

    for process in psutil.process_iter(["cmdline"]):
        if "ServeReplica:unianom:champion" in " ".join(process.info["cmdline"] or ()):
            return int(process.memory_full_info().uss)
    raise DataError("the replica's process is not there any more")

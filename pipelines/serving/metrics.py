"""Metrics of a server, which Ray's exporter hands to Prometheus as `ray_unianom_…`.

Outside a Ray process the same calls do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
DIFFERENCES = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]


class ServingMetrics:
    """The metrics of one replica.

    Args:
        role: of its model: "champion" or "shadow".
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._requests = _counter("unianom_requests", "Requests by path and HTTP status.", "path", "code")
        self._request_seconds = _histogram(
            "unianom_request_seconds", "Seconds from a request's arrival to its answer.", SECONDS, "path"
        )
        self._images = _counter("unianom_images", "Images by status: ok, or why there is no score.", "role", "status")
        self._decisions = _counter("unianom_decisions", "Scored images by decision.", "role", "decision")
        self._batch_images = _histogram("unianom_batch_images", "Images of a forward pass.", SIZES, "role")
        self._batch_seconds = _histogram("unianom_batch_seconds", "Seconds of a forward pass.", SECONDS, "role")
        self._model = _gauge(
            "unianom_model", "1 for the model in use, 0 for those before it.", "role", "version", "digest"
        )
        self._failing = _gauge("unianom_model_load_failing", "1 while the model wanted cannot be loaded.", "role")
        self._loads = _counter("unianom_model_loads", "Models loaded, or not, by result.", "role", "result")
        self._compared = _counter("unianom_shadow_images", "Images for the shadow model, by result.", "result")
        self._difference = _histogram(
            "unianom_shadow_difference", "Absolute difference of both models' scores.", DIFFERENCES, "scale"
        )
        self._flips = _counter(
            "unianom_shadow_flips", "Images that both models decide otherwise.", "champion", "shadow"
        )

    def request(self, path: str, code: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.inc(1, {"path": path, "code": str(code)})
        self._request_seconds.observe(_positive(seconds), {"path": path})

    def image(self, status: str, decision: str | None) -> None:
        """Count an image that was answered."""
        self._images.inc(1, {"role": self._role, "status": status})
        if status == "ok":
            self._decisions.inc(1, {"role": self._role, "decision": decision or "none"})

    def batch(self, size: int, seconds: float) -> None:
        """Count a forward pass."""
        self._batch_images.observe(size, {"role": self._role})
        self._batch_seconds.observe(_positive(seconds), {"role": self._role})

    def model(self, version: str, digest: str, in_use: bool) -> None:
        """Tell of a model whether it is in use."""
        self._model.set(float(in_use), {"role": self._role, "version": version, "digest": digest})

    def load(self, done: bool) -> None:
        """Count a model that was loaded, or could not be."""
        self._loads.inc(1, {"role": self._role, "result": "loaded" if done else "failed"})
        self._failing.set(float(not done), {"role": self._role})

    def compared(self, result: str, count: int = 1) -> None:
        """Count images by what became of them on their way to the shadow model: compared, dropped or failed."""
        self._compared.inc(count, {"result": result})

    def difference(self, values: Sequence[tuple[str, float]], decisions: tuple[str, str] | None) -> None:
        """Count how far both models are apart on an image.

        Args:
            values: absolute differences by scale, "raw" or "calibrated".
            decisions: champion's and shadow's, where they differ.
        """
        for scale, value in values:
            self._difference.observe(_positive(value), {"scale": scale})
        if decisions is not None:
            self._flips.inc(1, {"champion": decisions[0], "shadow": decisions[1]})


def _counter(name: str, description: str, *labels: str) -> Any:
    return Counter(name, description, labels)  # type: ignore[arg-type]  # Ray declares tuples of one


def _gauge(name: str, description: str, *labels: str) -> Any:
    return Gauge(name, description, labels)  # type: ignore[arg-type]


def _histogram(name: str, description: str, boundaries: list[float], *labels: str) -> Any:
    return Histogram(name, description, boundaries, labels)  # type: ignore[arg-type]


def _positive(value: Any) -> float:
    """Return a value that Ray's histograms take, which is none at or below zero."""
    return max(float(value), 1e-12)

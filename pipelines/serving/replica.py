"""The deployments of Ray Serve: replicas of the model that answers, and of the shadow model.

A replica is made when its model is loaded, and Ray Serve sends it requests from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.runtime.task_worker import set_threads
from pipelines.serving.access import Access
from pipelines.serving.http_app import make_app
from pipelines.serving.live_model import LiveModel
from pipelines.serving.metrics import ServingMetrics
from pipelines.serving.model_source import model_source
from pipelines.serving.predictor import load_predictor
from pipelines.serving.serve_options import ReplicaOptions, ServeOptions
from pipelines.serving.service import ScoringService
from pipelines.serving.shadow import ShadowFeed, ShadowImage, compare


class _Replica:
    """A model and what scores with it.

    Args:
        uri: of the model.
        role: "champion" or "shadow".
        options: of the server.
        own: of these replicas.
        needed: whether there is no replica without a model.
    """

    def __init__(self, uri: str, role: str, options: ServeOptions, own: ReplicaOptions, needed: bool) -> None:
        set_threads(own.cpus)
        self.metrics = ServingMetrics(role)
        self.live = LiveModel(
            model_source(uri, options.mlflow_uri),
            lambda folder, version: load_predictor(folder, uri, version, options, own.device),
            self.metrics,
        )
        self.service = ScoringService(self.live, options, own.cpus, self.metrics)
        self.live.start(options.poll_seconds, needed)

    def check_health(self) -> None:
        """Raise where this replica should be replaced; called by Ray Serve."""
        if fault := self.service.fault:
            raise RuntimeError(fault)


@serve.deployment(name="champion")
@serve.ingress()
class Champion(_Replica):
    """Answers requests.

    Args:
        options: of the server.
        shadow: the shadow's deployment.
    """

    def __init__(self, options: ServeOptions, shadow: DeploymentHandle | None = None) -> None:
        super().__init__(options.model, "champion", options, options.replicas, needed=True)
        self._shadow = shadow

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP interface; called by Ray Serve once this replica is made."""
        feed = None if self._shadow is None else ShadowFeed(self._send, self.metrics)
        return make_app(self.service, Access.from_environment(), feed, answers_ids=False)

    async def _send(self, images: list[ShadowImage]) -> None:
        assert self._shadow is not None
        await self._shadow.compare.remote(images)


@serve.deployment(name="shadow")
class Shadow(_Replica):
    """Scores what the champion has scored, and logs both.

    Args:
        options: of the server.
    """

    def __init__(self, options: ServeOptions) -> None:
        assert options.shadow is not None
        super().__init__(options.shadow, "shadow", options, options.shadow_replicas, needed=False)

    async def compare(self, images: Sequence[ShadowImage]) -> None:
        """Score images and log them."""
        await compare(self.service, images)


def deployment_options(own: ReplicaOptions, request_seconds: float) -> dict[str, Any]:
    """Return the options of a deployment, as Ray Serve takes them."""
    scaling: dict[str, Any] = {"num_replicas": own.min_replicas}
    if own.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": own.min_replicas,
                "max_replicas": own.max_replicas,
                "target_ongoing_requests": own.target_ongoing_requests,
            }
        }
    return {
        **scaling,
        "max_ongoing_requests": own.max_ongoing_requests,
        "max_queued_requests": own.max_queued_requests,
        "backpressure_config": {"status_code": 503, "retry_after_s": own.retry_after_seconds},
        "graceful_shutdown_timeout_s": request_seconds + 5,
        "health_check_period_s": 10,
        "max_constructor_retry_count": 3,
        "ray_actor_options": {"num_cpus": own.cpus, "num_gpus": own.gpus},
    }

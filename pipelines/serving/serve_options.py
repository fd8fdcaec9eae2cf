"""Options of jobs/serve.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Annotated, Literal

from annotated_types import Interval

from unianom.data.image import ImageLimits
from unianom.execution import Search
from unianom.options import AtLeastOne, AtLeastZero, NotNegative, Options, Positive, ValueRefused

REGISTRY = "models:/"
"""Beginning of the URI of a model in MLflow's registry."""

Port = Annotated[int, Interval(ge=1, le=65535)]


@dataclass(frozen=True)
class ReplicaOptions(Options):
    """How many replicas of a model answer, and what each takes.

    Args:
        min_replicas: replicas; with `max_replicas`, the least of them.
        max_replicas: as many as load asks for, at most; null keeps to `min_replicas`.
        target_ongoing_requests: requests in each replica that autoscaling aims at.
        max_ongoing_requests: requests in a replica at most; others wait in the queue.
        max_queued_requests: requests that wait at each proxy at most; beyond, they are answered 503 at once.
        retry_after_seconds: after which these should come again, as their header Retry-After says.
        cpus: CPUs, and so threads, of each replica. Scores depend on it in their last bits.
        gpus: GPUs of each; 0 runs on CPUs. Fractions share a GPU.
    """

    usual = ("min_replicas", "max_replicas", "cpus", "gpus")

    min_replicas: AtLeastOne = 1
    max_replicas: AtLeastOne | None = None
    target_ongoing_requests: AtLeastOne = 8
    max_ongoing_requests: AtLeastOne = 16
    max_queued_requests: AtLeastZero = 64
    retry_after_seconds: Positive = 1.0
    cpus: AtLeastOne = 1
    gpus: NotNegative = 0

    def check(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueRefused(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueRefused(f"gpus={self.gpus:g}: more than one GPU can only be taken whole")

    @property
    def device(self) -> str:
        """Device that the network runs on."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class ServeOptions(Options):
    """Serve a model over HTTP: images in, scores and decisions out.

    Args:
        model: model folder, path or URI, or a model of MLflow's registry, models:/NAME@ALIAS or models:/NAME/VERSION.
        shadow: another model, given in the same way, that scores the same images on replicas of its own. Its scores
            are logged beside the first one's, and never answered.
        host: address to listen on. Without a token in the environment variable UNIANOM_SERVE_TOKEN, only requests from
            this machine are answered, and only addresses of it are taken here.
        port: port to listen on.
        max_batch_size: images in one forward pass at most.
        batch_wait_seconds: how long an image waits for others while the network is free.
        max_images: images of one request at most.
        max_request_bytes: size of a request at most.
        request_seconds: how long a request may take, its arrival and the wait for the network included.
        poll_seconds: how often is looked whether the model has changed (its alias moved, its folder was written anew);
            the new one takes over when it is loaded; null never looks.
        mlflow_uri: MLflow tracking URI of the registry; null takes MLFLOW_TRACKING_URI.
        search: how memory banks are searched, as in jobs/score.py.
        engine: what computes frozen encoders: "pytorch", or on CPUs "openvino" or "openvino_bf16"; "auto" takes
            OpenVINO where it is installed, there is no GPU, and features are as PyTorch has them.
        fold_batch_norm: fold batch norm of trained methods into convolutions, as in jobs/score.py.
        local_cpus: CPUs to use of this machine where no cluster is given; null takes all.
        limits: what an image may cost; one beyond is answered with its status.
        replicas: replicas of the model and their CPUs and GPUs.
        shadow_replicas: those of the shadow model.
    """

    usual = (
        "model",
        "shadow",
        "host",
        "port",
        "max_batch_size",
        "max_images",
        "poll_seconds",
        "mlflow_uri",
        "engine",
        "replicas",
    )

    model: str
    shadow: str | None = None
    host: str = "127.0.0.1"
    port: Port = 8000
    max_batch_size: AtLeastOne = 8
    batch_wait_seconds: NotNegative = 0.005
    max_images: AtLeastOne = 64
    max_request_bytes: AtLeastOne = 128 << 20
    request_seconds: Positive = 60.0
    poll_seconds: Positive | None = 30.0
    mlflow_uri: str | None = None
    search: Search = "auto"
    engine: Literal["auto", "pytorch", "openvino", "openvino_bf16"] = "auto"
    fold_batch_norm: bool = False
    local_cpus: AtLeastOne | None = None
    limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=32 << 20, seconds=10.0))
    replicas: ReplicaOptions = field(default_factory=ReplicaOptions)
    shadow_replicas: ReplicaOptions = field(default_factory=ReplicaOptions)

    def check(self) -> None:
        for name, uri in (("model", self.model), ("shadow", self.shadow)):
            if uri is not None and uri.startswith(REGISTRY):
                try:
                    registered(uri)
                except ValueError as error:
                    raise ValueRefused(f"{name}={uri}: give models:/NAME@ALIAS or models:/NAME/VERSION") from error
        if self.engine.startswith("openvino") and (self.replicas.gpus or (self.shadow and self.shadow_replicas.gpus)):
            raise ValueRefused(f"engine={self.engine} runs on CPUs; leave out replicas.gpus, or take pytorch")


def registered(uri: str) -> tuple[str, str, str]:
    """Split the URI of a registered model.

    Returns:
        Its name, and either alias or version; the other one is empty.

    Raises:
        ValueError: it is none.
    """
    rest = uri.removeprefix(REGISTRY)
    name, sign, alias = rest.rpartition("@")
    if sign and name and alias and "/" not in alias:
        return name, alias, ""
    name, sign, version = rest.rpartition("/")
    if sign and name and version.isdecimal():
        return name, "", version
    raise ValueError(uri)


def is_loopback(host: str) -> bool:
    """Return whether an address is one that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        found = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback

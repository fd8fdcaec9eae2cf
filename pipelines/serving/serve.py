"""jobs/serve.py: an application of Ray Serve on this machine's Ray or a cluster's, for as long as the job runs."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress

import ray
from ray import serve as ray_serve

from pipelines.runtime.actors import connect
from pipelines.runtime.console import console
from pipelines.runtime.errors import reason, user_error
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.signals import own_signals
from pipelines.serving.access import TOKEN, check_host
from pipelines.serving.app import application
from pipelines.serving.model_source import model_source
from pipelines.serving.serve_options import ServeOptions
from unianom.errors import MachineError, OptionError

NAME = "unianom"
"""Name of the application in Ray Serve."""


def serve(options: ServeOptions) -> None:
    """Serve until this job is ended by a signal, then answer what has come, and stop.

    Raises:
        OptionError: other machines could ask, without a token; or the cluster has not what a replica takes.
        ModelError, TrackingError: there is no such model.
        MachineError: no Ray, the port is taken, or no replica could be started.
    """
    check_host(options.host)
    for uri in filter(None, (options.model, options.shadow)):
        model_source(uri, options.mlflow_uri).version()  # what is wrong with it shows before anything is started
    connect(RuntimeOptions(local_cpus=options.local_cpus))
    _check_resources(options)
    try:
        start(options)
        _tell(options)
        with suppress(KeyboardInterrupt):  # which any signal that ends a job raises, and is the usual end of this one
            threading.Event().wait()
        console.print("stopping: requests that have come are answered")
    finally:
        stop()


def start(options: ServeOptions) -> None:
    """Start the application on the Ray that is connected; returns when its model is loaded and it answers.

    Raises:
        MachineError: the port is taken, or no replica could be started.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; replicas have their own
    http = {"host": options.host, "port": options.port, "request_timeout_s": None}
    try:
        with own_signals():
            ray_serve.start(http_options=http)
            ray_serve.run(application(options), name=NAME, route_prefix="/")
    except Exception as error:
        if (known := user_error(error)) is not None:
            raise known from error
        said = _deployment_message()
        raise MachineError(f"the server could not be started ({said or reason(error)})") from error


def stop() -> None:
    """Let the application answer what it has, and end it."""
    with suppress(Exception), own_signals():  # the Ray it ran on may be gone
        ray_serve.delete(NAME)


def _deployment_message() -> str:
    """Return what Ray Serve says of replicas that did not start, on one line."""
    with suppress(Exception):
        for deployment in ray_serve.status().applications[NAME].deployments.values():
            lines = [line for line in deployment.message.splitlines() if line.strip()]
            if deployment.status == "DEPLOY_FAILED" and lines:
                return " ".join(lines[-1].split())[:500]
    return ""


def _check_resources(options: ServeOptions) -> None:
    """Refuse replicas that the cluster can not hold, which would else be waited for without an end."""
    have = ray.cluster_resources()
    groups = [options.replicas] + ([options.shadow_replicas] if options.shadow else [])
    for kind, key in (("CPU", "cpus"), ("GPU", "gpus")):
        needed = sum(getattr(group, key) * group.min_replicas for group in groups)
        if needed > have.get(kind, 0):
            raise OptionError(
                f"the replicas need {needed:g} {kind}s; this Ray has {have.get(kind, 0):g}: lower replicas.{key} or "
                f"replicas.min_replicas"
            )


def _tell(options: ServeOptions) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    console.print(f"serving {options.model} at http://{host}:{options.port}/ (API: /docs)")
    if not os.environ.get(TOKEN, "").strip():
        console.print(f"without a token ({TOKEN}) only requests from this machine are answered")
    for node in ray.nodes():
        if node["Alive"] and node.get("MetricsExportPort"):
            console.print(f"metrics: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    console.print("Ctrl-C stops it")

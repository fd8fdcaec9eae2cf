"""The server as an application of Ray Serve: `serve run pipelines.serving.app:build model=runs/line-3`, or as the
`import_path` of a RayService, with options as its `args`."""

from __future__ import annotations

from typing import Any

from ray import serve

from pipelines.runtime.given_options import GivenOptions
from pipelines.serving.replica import Champion, Shadow, deployment_options
from pipelines.serving.serve_options import ServeOptions
from unianom.options import flatten


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application.

    Args:
        args: options as of jobs/serve.py, those of a group as a mapping of their own ("replicas": {"gpus": 1}) or by
            dotted names ("replicas.gpus": 1), as numbers or as text; `host` and `port` are Ray Serve's to decide.

    Raises:
        OptionError: an unknown option, or a wrong value.
    """
    given = GivenOptions(ServeOptions)
    given.read([f"--{name}={_text(value)}" for name, value in flatten(args).items()])
    return application(given.instance())


def application(options: ServeOptions) -> serve.Application:
    """Return the application that options describe."""
    champion = _deployment(Champion).options(**deployment_options(options.replicas, options.request_seconds))
    if options.shadow is None:
        return champion.bind(options)
    shadow = _deployment(Shadow).options(**deployment_options(options.shadow_replicas, options.request_seconds))
    return champion.bind(options, shadow.bind(options))


def _deployment(replica: Any) -> serve.Deployment:
    """Return what Ray Serve's decorator makes of a class, which type checkers do not see."""
    deployment: serve.Deployment = replica
    return deployment


def _text(value: Any) -> str:
    """Return a value as a command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

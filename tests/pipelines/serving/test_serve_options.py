"""Options of a server, and the application that they make."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.serving.access import TOKEN, check_host
from pipelines.serving.app import build
from pipelines.serving.replica import deployment_options
from pipelines.serving.serve_options import ReplicaOptions, ServeOptions, is_loopback, registered
from unianom.errors import OptionError


def test_registered_models() -> None:
    assert registered("models:/line-3@champion") == ("line-3", "champion", "")
    assert registered("models:/line/3/4") == ("line/3", "", "4")
    for wrong in ("models:/line", "models:/line@", "models:/@champion", "models:/line/x", "models:/"):
        with pytest.raises(ValueError):
            registered(wrong)
        with pytest.raises(OptionError, match="give models:/NAME@ALIAS"):
            ServeOptions(wrong)


def test_loopback_addresses() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.1.2.3", "::ffff:127.0.0.1")] == [True] * 5
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example.com", "::ffff:10.0.0.1", "")] == [False] * 6


def test_other_machines_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    check_host("127.0.0.1")
    with pytest.raises(OptionError, match=TOKEN):
        check_host("0.0.0.0")
    monkeypatch.setenv(TOKEN, " ")
    with pytest.raises(OptionError, match=TOKEN):
        check_host("0.0.0.0")
    monkeypatch.setenv(TOKEN, "secret")
    check_host("0.0.0.0")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "below min_replicas"),
        ({"gpus": 1.5}, "only be taken whole"),
        ({"max_queued_requests": -1}, "max_queued_requests"),
    ],
)
def test_replicas_that_cannot_be(own: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ReplicaOptions(**own)


def test_what_ray_serve_is_told() -> None:
    fixed = deployment_options(ReplicaOptions(min_replicas=2, gpus=0.25, cpus=3, retry_after_seconds=2), 60)
    assert (fixed["num_replicas"], fixed["ray_actor_options"]) == (2, {"num_cpus": 3, "num_gpus": 0.25})
    assert fixed["backpressure_config"] == {"status_code": 503, "retry_after_s": 2}
    assert fixed["graceful_shutdown_timeout_s"] > 60
    scaled = deployment_options(ReplicaOptions(max_replicas=4), 60)
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"]["max_replicas"] == 4


def test_an_application_from_arguments_as_a_cluster_gives_them() -> None:
    """Groups as mappings or by dotted names, numbers or text; what is left out of a group keeps a server's default."""
    app = build(
        {
            "model": "models:/line@champion",
            "shadow": "runs/b",
            "mlflow_uri": None,
            "max_batch_size": "16",
            "fold_batch_norm": True,
            "replicas": {"cpus": 2, "max_replicas": 3},
            "limits.max_pixels": "1000",
        }
    )
    deployment = app._bound_deployment
    options, shadow = deployment.init_args
    assert (options.max_batch_size, options.fold_batch_norm, options.replicas.cpus) == (16, True, 2)
    assert (options.limits.max_pixels, options.limits.seconds) == (1000, 10.0)
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert shadow._bound_deployment.name == "shadow"
    assert len(build({"model": "runs/a"})._bound_deployment.init_args) == 1
    with pytest.raises(OptionError, match="did you mean"):
        build({"model": "runs/a", "max_batch": 2})
    with pytest.raises(OptionError, match="model"):
        build({})

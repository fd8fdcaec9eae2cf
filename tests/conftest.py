"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faulty_proxy import Proxy
    from tests.s3_server import Server


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images and weights; tests that need it are skipped where it is absent."""
    named = os.environ.get("UNIANOM_REAL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "real"
    if not (folder / "images").is_dir():
        pytest.skip(f"no real images in {folder}; set UNIANOM_REAL_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def s3_running() -> Iterator[Server]:
    """A server that speaks S3."""
    from tests import s3_server

    with s3_server.serving() as running:
        yield running


@pytest.fixture(scope="session")
def running_proxy(s3_running: Server) -> Iterator[Proxy]:
    """What stands before it."""
    from tests import faulty_proxy

    with faulty_proxy.standing_before(s3_running.endpoint) as running:
        yield running


@pytest.fixture
def store(s3_running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with one empty bucket, and the environment of its clients but for the endpoint."""
    from tests import s3_server
    from unianom import s3

    s3_running.empty()
    for name, value in s3_server.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "_told", set())
    return s3_running


@pytest.fixture
def proxy(store: Server, running_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the bucket; requests go wrong when a test gives it a plan."""
    running_proxy.forgive()
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.endpoint)
    yield running_proxy
    running_proxy.forgive()


@pytest.fixture
def reconnected(proxy: Proxy) -> Iterator[None]:
    """Connections made anew, for a test that changes the environment of a client. (Making one takes half a second.)"""
    from unianom.s3 import PatientS3

    PatientS3.clear_instance_cache()
    yield
    PatientS3.clear_instance_cache()

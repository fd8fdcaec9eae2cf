"""S3 on good days and on bad ones: requests that fail are made again, what does not pass reaches the user by name. A
real server speaks S3; a proxy before it lets requests go wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import s3fs.core

from pipelines.data.image_files import read_image_file
from pipelines.runtime import locks
from pipelines.runtime.locks import BusyError, exclusive
from tests import faulty_proxy
from tests.faulty_proxy import Proxy, Request, always, first
from tests.s3_server import Server
from unianom import files, s3
from unianom.data.layouts.source import Source
from unianom.errors import DataError, MachineError, storage_error
from unianom.s3 import PatientS3
from unianom.s3_errors import NoBucketError, StoreTimeoutError, UploadGoneError

PART = 5 * 2**20
"""Bytes of the smallest part that S3 takes but for the last."""


class Clock:
    """Time that passes by sleeping alone, which takes none.

    Attributes:
        pauses: slept so far, in seconds.
    """

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.passed = 0.0

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.passed += seconds

    def monotonic(self) -> float:
        return self.passed


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nobody waits between two tries."""
    clock = Clock()
    monkeypatch.setattr(s3, "sleep", clock.sleep)
    monkeypatch.setattr(s3, "monotonic", clock.monotonic)
    return clock


def told(error: BaseException) -> str:
    """The sentence that a user would see."""
    known = storage_error(error)
    assert isinstance(known, MachineError)
    return str(known)


CALLS: dict[str, Callable[[], Any]] = {
    "read": lambda: files.read_bytes("s3://bucket/a/x"),
    "write": lambda: files.write_bytes("s3://bucket/a/x", b"1"),
    "exists": lambda: files.exists("s3://bucket/a/x"),
    "is_file": lambda: files.is_file("s3://bucket/a/x"),
    "is_folder": lambda: files.is_folder("s3://bucket/a/x"),
    "list": lambda: files.list_names("s3://bucket/a"),
    "list all": lambda: files.list_files("s3://bucket/a"),
    "hash": lambda: files.sha256_file("s3://bucket/a/x"),
    "remove": lambda: files.remove("s3://bucket/a/x"),
    "bucket": lambda: files.exists("s3://bucket"),
}


# ------------------------------------------------------------------------------------------------------- a good day
def test_what_is_written_is_read(proxy: Proxy, store: Server) -> None:
    files.write_bytes("s3://bucket/a/x.bin", b"content")
    assert store.objects() == {"a/x.bin": b"content"}
    assert files.read_bytes("s3://bucket/a/x.bin") == b"content"
    assert files.sha256_file("s3://bucket/a/x.bin") == files.sha256_of(b"content")
    assert files.exists("s3://bucket/a/x.bin")
    assert files.is_file("s3://bucket/a/x.bin")
    assert files.is_folder("s3://bucket/a")
    assert not files.is_file("s3://bucket/a")
    assert files.exists("s3://bucket")
    assert not files.exists("s3://bucket/a/y.bin")
    assert files.list_names("s3://bucket/a") == ["x.bin"]
    with pytest.raises(FileNotFoundError) as raised:
        files.read_bytes("s3://bucket/a/y.bin")
    assert storage_error(raised.value) is None  # a file that is not there is for the caller to judge
    files.remove("s3://bucket/a")
    assert store.objects() == {}


def test_a_folder_is_listed_page_by_page(proxy: Proxy, store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed is what fsspec lists, and no page is asked for before the one before it is used up."""
    monkeypatch.setattr(s3, "PAGE", 4)
    client = store.client()
    for key in ("a/", *(f"a/{number}.png" for number in range(9)), "a/b/1.png", "a/b/2.png", "a/c/1.png", "d.png"):
        client.put_object(Bucket="bucket", Key=key, Body=b"1" * len(key))
    fs, folder = files.resolve("s3://bucket/a")
    expected = {(one["name"], one["type"], one["size"]) for one in fs.ls(folder, detail=True)}
    proxy.forgive()
    proxy.plan = first("503")  # a page is asked for again
    found = files.iter_infos(fs, folder)
    listed = [next(found)]
    assert len(proxy.requests) == 2
    listed += found
    assert len(proxy.requests) == 4
    assert {(one["name"], one["type"], one["size"]) for one in listed} == expected
    assert len(listed) == len(expected) == 12
    proxy.forgive()
    assert files.is_folder("s3://bucket/a")
    (request,) = proxy.requests
    assert "max-keys=1" in request.target.split("&")
    assert [one["name"] for one in files.iter_infos(fs, "bucket")] == ["bucket/a", "bucket/d.png"]
    assert [one["type"] for one in files.iter_infos(fs, "bucket/d.png")] == ["file"]
    with pytest.raises(FileNotFoundError):
        list(files.iter_infos(fs, "bucket/e"))
    with pytest.raises(DataError, match="no folder s3://bucket/e; check the path"):
        list(Source.open("s3://bucket/e").walk())
    with pytest.raises(DataError, match=r"s3://bucket/d.png is a file; a folder is expected"):
        list(Source.open("s3://bucket/d.png").walk())


def test_a_file_is_read_by_one_request_and_a_large_one_by_ranges(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    files.write_bytes("s3://bucket/x", content)
    proxy.forgive()
    assert files.read_bytes("s3://bucket/x") == content
    assert [request.method for request in proxy.requests] == ["GET"]
    fs, path = files.resolve("s3://bucket/x")
    monkeypatch.setattr(fs, "default_block_size", 1000)
    assert fs.cat_file(path) == content
    assert fs.cat_file(path, start=900, end=2100) == content[900:2100]


@pytest.mark.parametrize("uri", ["s3://", "s3://Bad bucket!/x", "s3:///x!y/z", "s3a://ü/x"])
def test_no_bucket_can_have_such_a_name(proxy: Proxy, uri: str) -> None:
    with pytest.raises(DataError, match="no bucket can have the name"):
        files.exists(uri)
    assert proxy.requests == []


def test_a_lock_on_a_store_is_held_by_one_and_goes_with_the_block(
    proxy: Proxy, store: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = "s3://bucket/output/_lock.json"
    with exclusive(lock, "it"):
        assert list(store.objects()) == ["output/_lock.json"]
        with monkeypatch.context() as other:  # another process, which does not hold it
            other.setattr(locks, "_held", {})
            with pytest.raises(BusyError, match="has been at work on it since"), exclusive(lock, "it"):
                pass
    assert store.objects() == {}


# -------------------------------------------------------------------------------------------------- what may pass
@pytest.mark.parametrize("call", CALLS)
def test_what_passes_is_not_noticed(proxy: Proxy, store: Server, call: str) -> None:
    files.write_bytes("s3://bucket/a/x", b"1")
    expected = CALLS[call]()
    after = store.objects()
    for kind in faulty_proxy.PASSING:
        proxy.forgive()
        files.write_bytes("s3://bucket/a/x", b"1")
        proxy.plan = first(*2 * [kind])
        assert CALLS[call]() == expected, kind
        assert store.objects() == after, kind
        assert set(proxy.faults) == {kind}


def test_pauses_grow_and_are_drawn(proxy: Proxy, clock: Clock) -> None:
    files.write_bytes("s3://bucket/x", b"content")
    proxy.plan = first(*9 * ["503"], method="GET")
    assert files.read_bytes("s3://bucket/x") == b"content"
    longest = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]
    assert len(clock.pauses) == 9
    assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, longest, strict=True))
    assert len({pause / most for pause, most in zip(clock.pauses, longest, strict=True)}) == 9


def test_what_does_not_pass_ends_after_a_minute(proxy: Proxy, clock: Clock) -> None:
    proxy.plan = always("500")
    with pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith(f"s3://bucket/x: {proxy.endpoint} answered InternalError")
    assert s3.GIVE_UP - 5 <= sum(clock.pauses) <= s3.GIVE_UP
    assert len(proxy.requests) == len(clock.pauses) + 1


def test_an_answer_that_breaks_off_is_asked_for_again(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3_500)
    files.write_bytes("s3://bucket/x", content)
    fs, path = files.resolve("s3://bucket/x")
    monkeypatch.setattr(fs, "default_block_size", 1000)  # so that it counts as large

    def copied() -> bytes:
        fs.get_file(path, str(tmp_path / "copy"))
        return (tmp_path / "copy").read_bytes()

    def in_pieces() -> bytes:
        with fs.open(path, "rb", cache_type="none") as handle:
            return b"".join(iter(lambda: handle.read(900), b""))

    for read in (lambda: fs.cat_file(path), copied, in_pieces):
        proxy.forgive()
        proxy.plan = lambda request: "cut" if request.number % 3 and request.method == "GET" else ""
        assert read() == content
        assert proxy.faults["cut"] > 3


def test_a_lock_whose_making_was_not_answered_is_held(proxy: Proxy, store: Server) -> None:
    proxy.plan = first("lost", method="PUT")
    with exclusive("s3://bucket/output/_lock.json", "it"):
        assert list(store.objects()) == ["output/_lock.json"]
    assert proxy.faults == {"lost": 1}
    assert store.objects() == {}


def test_objects_that_a_deletion_leaves_are_seen(proxy: Proxy, store: Server) -> None:
    files.write_bytes("s3://bucket/a/x", b"1")
    proxy.plan = first("kept for now", method="POST")
    files.remove("s3://bucket/a")
    assert store.objects() == {}
    files.write_bytes("s3://bucket/a/x", b"1")
    proxy.plan = first("kept", method="POST")
    with pytest.raises(PermissionError) as raised:
        files.remove("s3://bucket/a")
    assert told(raised.value).startswith("s3://bucket: access is denied (AccessDenied")


# ---------------------------------------------------------------------------------------------- uploads in parts
@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content that is uploaded in three parts."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: PART)
    return bytes(PART) + bytes([1]) * PART + b"end"


def test_an_upload_in_parts_survives_what_passes(proxy: Proxy, store: Server, in_parts: bytes) -> None:
    proxy.plan = first(*3 * ["cut"], target="partNumber")
    files.write_bytes("s3://bucket/x", in_parts)
    assert proxy.faults == {"cut": 3}
    assert store.objects() == {"x": in_parts}
    assert store.unfinished_uploads() == []


def test_an_upload_whose_completion_was_not_answered_is_made_again(
    proxy: Proxy, store: Server, in_parts: bytes
) -> None:
    proxy.plan = first("lost", "gone", method="POST", target="uploadId")
    files.write_bytes("s3://bucket/x", in_parts)
    assert proxy.faults == {"lost": 1, "gone": 1}
    assert store.objects() == {"x": in_parts}
    assert store.unfinished_uploads() == []


def test_an_upload_that_is_lost_again_and_again_is_named(proxy: Proxy, store: Server, in_parts: bytes) -> None:
    proxy.plan = first(*3 * ["gone"], method="POST", target="uploadId")
    with pytest.raises(UploadGoneError) as raised:
        files.write_bytes("s3://bucket/x", in_parts)
    assert told(raised.value).startswith(f"s3://bucket/x: {proxy.endpoint} does not know the upload")
    assert store.objects() == {}
    assert store.unfinished_uploads() == []


def test_an_upload_that_fails_leaves_what_was_there(proxy: Proxy, store: Server, in_parts: bytes) -> None:
    files.write_bytes("s3://bucket/x", b"before")
    ends = {"partNumber=1": "silent", "partNumber=2": "denied"}
    proxy.plan = lambda request: next((end for part, end in ends.items() if part in request.target), "")
    with pytest.raises(PermissionError) as raised:
        files.write_bytes("s3://bucket/x", in_parts)
    assert told(raised.value).startswith("s3://bucket/x: access is denied")
    running = asyncio.all_tasks(files.resolve("s3://bucket/x")[0].loop)
    assert "_call_s3" not in {task.get_coro().__name__ for task in running}  # no part comes after all
    assert store.objects() == {"x": b"before"}
    assert store.unfinished_uploads() == []


KILLED = """
import sys, s3fs.core
from unianom import files
s3fs.core.calculate_chunksize = lambda *_, **__: 5 * 2**20
files.write_bytes("s3://bucket/new/x", bytes(11 * 2**20))
"""


def test_an_upload_that_is_killed_leaves_nothing_that_a_reader_sees(proxy: Proxy, store: Server) -> None:
    arrived = threading.Event()

    def plan(request: Request) -> str:
        if "partNumber=3" not in request.target:
            return ""
        arrived.set()
        return "silent"

    proxy.plan = plan
    writer = subprocess.Popen([sys.executable, "-c", KILLED])
    try:
        assert arrived.wait(60)
    finally:
        writer.kill()
        writer.wait()
    assert store.unfinished_uploads() == ["new/x"]  # it was in the middle of it
    proxy.plan = always("")
    assert not files.exists("s3://bucket/new/x")
    assert not files.is_folder("s3://bucket/new")
    assert files.list_files("s3://bucket") == []
    files.write_bytes("s3://bucket/new/x", b"again")
    assert files.read_bytes("s3://bucket/new/x") == b"again"


# ---------------------------------------------------------------------------------------- what is told, and at once
@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_names_what_it_is_about_and_what_to_do(proxy: Proxy, clock: Clock, call: str) -> None:
    proxy.plan = always("denied")
    with pytest.raises(PermissionError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket")
    assert "access is denied (AccessDenied)" in told(raised.value)
    assert "AWS_ACCESS_KEY_ID" in told(raised.value)
    assert clock.pauses == []
    assert len(proxy.requests) <= 2  # what HEAD was refused for is asked for


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_named(proxy: Proxy, store: Server, clock: Clock, call: str) -> None:
    store.client().delete_bucket(Bucket="bucket")
    with pytest.raises(NoBucketError) as raised:
        CALLS[call]()
    assert told(raised.value) == f"s3://bucket: there is no such bucket at {proxy.endpoint}; mend its name, or make it"
    assert clock.pauses == []
    assert len(proxy.requests) <= 2


@pytest.mark.usefixtures("reconnected")
@pytest.mark.parametrize("call", CALLS)
def test_missing_credentials_are_told(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, clock: Clock, call: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket")
    assert "no credentials were found" in told(raised.value)
    assert "AWS_PROFILE" in told(raised.value)
    assert proxy.requests == []
    assert clock.pauses == []


@pytest.mark.parametrize("call", CALLS)
def test_wrong_credentials_are_told(proxy: Proxy, store: Server, clock: Clock, call: str) -> None:
    with store.checking_credentials(), pytest.raises(PermissionError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in told(raised.value)
    assert f"{proxy.endpoint} refuses the credentials (InvalidAccessKeyId: The AWS Access" in told(raised.value)
    assert clock.pauses == []
    assert len(proxy.requests) <= 2


@pytest.mark.usefixtures("reconnected")
def test_a_wrong_secret_is_told(proxy: Proxy, store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.make_user()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    with store.checking_credentials():
        with pytest.raises(PermissionError) as raised:
            files.write_bytes("s3://bucket/x", b"1")
        assert "SignatureDoesNotMatch" in told(raised.value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        PatientS3.clear_instance_cache()
        files.write_bytes("s3://bucket/x", b"1")
    assert store.objects() == {"x": b"1"}


def test_a_token_that_has_expired_is_told(proxy: Proxy, clock: Clock) -> None:
    proxy.plan = always("expired")
    with pytest.raises(PermissionError, match=r"refuses the credentials \(ExpiredToken: The provided"):
        files.exists("s3://bucket/a/x")
    assert clock.pauses == []


def test_a_source_that_cannot_be_listed_is_named(proxy: Proxy, store: Server) -> None:
    proxy.plan = always("denied")
    with pytest.raises(MachineError, match=r"s3://bucket/a.*: access is denied"):
        Source.open("s3://bucket/a").entries()
    proxy.plan = always("")
    with pytest.raises(MachineError, match=r"s3://other: there is no such bucket"):
        Source.open("s3://other/a").entries()


def test_an_image_in_a_store_that_fails_is_no_fault_of_the_image(proxy: Proxy, clock: Clock) -> None:
    with pytest.raises(MachineError, match=r"s3://other: there is no such bucket"):
        read_image_file("s3://other/a.png")
    proxy.plan = always("500")
    with pytest.raises(MachineError, match=r"s3://bucket/a.png: .* answered InternalError"):
        read_image_file("s3://bucket/a.png")
    assert sum(clock.pauses) <= s3.GIVE_UP  # not that and more on top of it


# ------------------------------------------------------------------------------------------------------- time-outs
def configure(monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    """Set what fsspec takes from FSSPEC_S3, when it is imported."""
    configuration: dict[str, Any] = {}
    fsspec.config.set_conf_env(configuration, {"FSSPEC_S3": json.dumps({"config_kwargs": config})})
    monkeypatch.setitem(fsspec.config.conf, "s3", configuration["s3"])


def test_a_store_that_keeps_silent_is_waited_for_aloud_and_not_for_ever(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(monkeypatch, read_timeout=0.2)
    monkeypatch.setattr(s3, "TELL", 0.1)
    monkeypatch.setattr(s3, "GIVE_UP", 0.0)
    proxy.plan = always("silent")
    with caplog.at_level(logging.WARNING, "unianom"), pytest.raises(StoreTimeoutError) as raised:
        files.read_bytes("s3://bucket/x")
    assert raised.value.errno == errno.ETIMEDOUT
    assert told(raised.value).startswith(f"s3://bucket/x: no answer from {proxy.endpoint} (Read timeout")
    assert "AWS_ENDPOINT_URL" in told(raised.value)
    assert proxy.faults == {"silent": s3.TRIES}  # one layer tries again, not three of them
    proxy.plan = first(*2 * ["silent"])
    files.write_bytes("s3://bucket/y", b"1")
    assert files.read_bytes("s3://bucket/y") == b"1"
    (line,) = caplog.messages  # once for a bucket
    assert line.startswith(f"waiting for s3://bucket: no answer from {proxy.endpoint}")


@pytest.mark.usefixtures("reconnected")
def test_an_endpoint_that_accepts_no_connection_is_not_waited_for_for_ever(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, connect_timeout=0.2)
    monkeypatch.setattr(s3, "GIVE_UP", 0.0)
    with socket.socket() as deaf, ExitStack() as waiting:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):  # until its queue is full
            queued = waiting.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(deaf.getsockname())
        endpoint = "http://127.0.0.1:{1}".format(*deaf.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StoreTimeoutError) as raised:
            files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith(f"s3://bucket/x: no answer from {endpoint} (Connect timeout")


@pytest.mark.usefixtures("reconnected")
def test_an_endpoint_where_nobody_listens_is_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreTimeoutError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith("s3://bucket/x: no answer from http://127.0.0.1:9 (Could not connect")


@pytest.mark.usefixtures("reconnected")
def test_an_endpoint_without_encryption_is_told_at_once(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.replace("http:", "https:"))
    with pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert "check http or https in AWS_ENDPOINT_URL" in told(raised.value)
    assert clock.pauses == []


@pytest.mark.usefixtures("reconnected")
def test_no_password_of_an_endpoint_is_told(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    with pytest.raises(StoreTimeoutError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith("s3://bucket/x: no answer from http://127.0.0.1:9 ")
    assert "secret" not in told(raised.value)


def test_time_outs_are_set_and_what_the_user_configures_comes_first(
    store: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = files.resolve("s3://bucket/a b/c")
    assert path == "bucket/a b/c"
    assert isinstance(fs, PatientS3)
    config = fs._prepare_config_kwargs()
    assert config == {"connect_timeout": 10, "read_timeout": 15, "retries": {"total_max_attempts": 1}}
    configure(monkeypatch, read_timeout=90)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    own, _ = files.resolve("s3a://bucket/x")
    assert isinstance(own, PatientS3)
    assert own._prepare_config_kwargs() == {"connect_timeout": 10, "read_timeout": 90}

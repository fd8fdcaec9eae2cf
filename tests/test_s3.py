"""What an object store answers, or does not, reaches the user by name; a small server stands in for S3."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import fsspec.config
import pytest

from pipelines.runtime import locks
from pipelines.runtime.locks import BusyError, exclusive
from tests.s3_stub import Store, serving
from unianom import files, s3
from unianom.data.layouts.source import Source
from unianom.errors import DataError, MachineError, storage_error
from unianom.s3 import PatientS3


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty bucket at the endpoint of the environment."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "_told", set())
    with serving() as (served, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        PatientS3.clear_instance_cache()
        yield served
    PatientS3.clear_instance_cache()


def told(error: BaseException) -> str:
    """The sentence that a user would see."""
    known = storage_error(error)
    assert isinstance(known, MachineError)
    return str(known)


def test_a_lock_on_a_store_is_held_by_one_and_goes_with_the_block(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = "s3://bucket/output/_lock.json"
    with exclusive(lock, "it"):
        assert list(store.objects) == ["bucket/output/_lock.json"]
        with monkeypatch.context() as other:  # another process, which does not hold it
            other.setattr(locks, "_held", {})
            with pytest.raises(BusyError, match="has been at work on it since"), exclusive(lock, "it"):
                pass
    assert store.objects == {}


@pytest.mark.parametrize("uri", ["s3://", "s3://Bad bucket!/x", "s3:///x!y/z", "s3a://ü/x"])
def test_no_bucket_can_have_such_a_name(store: Store, uri: str) -> None:
    with pytest.raises(DataError, match="no bucket can have the name"):
        files.exists(uri)
    assert store.requests == []


def test_what_is_written_is_read(store: Store) -> None:
    files.write_bytes("s3://bucket/a/x.bin", b"content")
    assert store.objects == {"bucket/a/x.bin": b"content"}
    assert files.read_bytes("s3://bucket/a/x.bin") == b"content"
    assert files.sha256_file("s3://bucket/a/x.bin") == files.sha256_of(b"content")
    assert files.exists("s3://bucket/a/x.bin")
    assert not files.exists("s3://bucket/a/y.bin")
    assert files.list_names("s3://bucket/a") == ["x.bin"]
    with pytest.raises(FileNotFoundError) as raised:
        files.read_bytes("s3://bucket/a/y.bin")
    assert storage_error(raised.value) is None  # a file that is not there is for the caller to judge


CALLS = {
    "read": lambda: files.read_bytes("s3://bucket/a/x"),
    "write": lambda: files.write_bytes("s3://bucket/a/x", b"1"),
    "exists": lambda: files.exists("s3://bucket/a/x"),
    "list": lambda: files.list_names("s3://bucket/a"),
    "hash": lambda: files.sha256_file("s3://bucket/a/x"),
    "remove": lambda: files.remove("s3://bucket/a/x"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_names_what_it_is_about_and_what_to_do(store: Store, call: str) -> None:
    store.refuse = "AccessDenied"
    with pytest.raises(PermissionError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket/a")
    assert "access is denied" in told(raised.value)
    assert "AWS_ACCESS_KEY_ID" in told(raised.value)


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_missing_bucket_is_named(store: Store, call: str) -> None:
    store.buckets.clear()
    with pytest.raises(FileNotFoundError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket: there is no such bucket at http://127.0.0.1")


@pytest.mark.parametrize("call", CALLS)
def test_missing_credentials_are_told(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError) as raised:
        CALLS[call]()
    assert told(raised.value).startswith("s3://bucket/a")
    assert "no credentials were found" in told(raised.value)
    assert "AWS_PROFILE" in told(raised.value)
    assert store.requests == []


def test_errors_of_the_store_that_pass_are_not_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes("s3://bucket/x", b"content")
    monkeypatch.setattr(s3, "PAUSE", 0.01)
    before = len(store.requests)
    store.fail = 7
    assert files.read_bytes("s3://bucket/x") == b"content"
    assert [method for method, _ in store.requests[before:]] == 8 * ["HEAD"] + ["GET"]


def test_errors_of_the_store_that_do_not_pass_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "GIVE_UP", 3.0)
    monkeypatch.setattr(s3, "PAUSE", 0.01)
    store.fail = 1000
    with pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith("s3://bucket/x: http://127.0.0.1")
    assert "500" in told(raised.value)
    assert 2 <= 1000 - store.fail <= 20  # pauses double


def test_a_store_that_keeps_silent_is_waited_for_aloud_and_not_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PatientS3, "read_timeout", 0.3)
    monkeypatch.setattr(PatientS3, "retries", 2)
    monkeypatch.setattr(s3, "TELL", 0.1)
    store.silent = True
    with caplog.at_level(logging.WARNING), pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert raised.value.errno == errno.ETIMEDOUT
    assert told(raised.value).startswith("s3://bucket/x: no answer from http://127.0.0.1")
    assert "AWS_ENDPOINT_URL" in told(raised.value)
    assert len(store.requests) == 2  # one layer tries again, not three of them
    with pytest.raises(OSError):
        files.read_bytes("s3://bucket/y")
    (line,) = caplog.messages  # once for a bucket
    assert line.startswith("waiting for s3://bucket: no answer from http://127.0.0.1")


def test_an_endpoint_where_nobody_listens_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "GIVE_UP", 0.0)
    with pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith("s3://bucket/x: no answer from http://127.0.0.1:9 (Could not connect")


def test_no_password_of_an_endpoint_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    monkeypatch.setattr(s3, "GIVE_UP", 0.0)
    with pytest.raises(OSError) as raised:
        files.read_bytes("s3://bucket/x")
    assert told(raised.value).startswith("s3://bucket/x: no answer from http://127.0.0.1:9 ")
    assert "secret" not in told(raised.value)


def test_a_source_that_may_not_be_listed_is_named(store: Store) -> None:
    store.refuse = "AccessDenied"
    with pytest.raises(MachineError, match=r"s3://bucket/a.*: access is denied"):
        Source.open("s3://bucket/a").entries()


def test_time_outs_are_set_and_what_the_user_configures_comes_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = files.resolve("s3://bucket/a b/c")
    assert path == "bucket/a b/c"
    assert isinstance(fs, PatientS3)
    config = fs._prepare_config_kwargs()
    assert config == {"connect_timeout": 10, "read_timeout": 15, "retries": {"total_max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 90}})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    own, _ = files.resolve("s3a://bucket/x")
    assert isinstance(own, PatientS3)
    assert own._prepare_config_kwargs() == {"connect_timeout": 10, "read_timeout": 90}

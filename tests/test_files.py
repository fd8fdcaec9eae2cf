import errno
import hashlib
import json
import os
import re
import socket
import unicodedata
import uuid
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from unianom import files
from unianom.errors import DataError, NotAFileError


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """An empty folder, on disk or on an object store."""
    if request.param == "local":
        yield str(tmp_path / "folder")
    else:
        uri = f"memory://test-{uuid.uuid4().hex}"
        yield uri
        files.remove(uri)


# ---- names --------------------------------------------------------------------------------------------------------


def test_full_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.full_uri("a/b") == str(tmp_path / "a/b")
    assert files.full_uri(Path("a")) == str(tmp_path / "a")
    assert files.full_uri("file:///a/b") == "/a/b"
    assert files.full_uri("~/a") == str(Path.home() / "a")
    assert files.full_uri("memory://a/b/") == "memory:///a/b"
    assert files.full_uri("/a/b/") == "/a/b"


@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("/a", "/a/b/c"),
        ("/a/", "/a/b/c"),
        ("/", "/b/c"),
        ("a", "a/b/c"),
        ("s3://bucket", "s3://bucket/b/c"),
        ("s3://bucket/", "s3://bucket/b/c"),
        ("memory://", "memory://b/c"),
        (Path("/a"), "/a/b/c"),
    ],
)
def test_join(uri, joined):
    assert files.join(uri, "b", "c") == joined


@pytest.mark.parametrize(
    "name",
    [
        *("a::b.png", "cam1::12-30.png", "C::x", "s3::x.png", "zip::y", "memory::z", "::"),
        *("file:x.png", "local:x", "cam:1", "http:", "~t.png", "a%20b?.png", "[x]*.png", "b#c"),
    ],
)
def test_a_local_name_is_a_name_whatever_it_holds(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"here")
    monkeypatch.chdir(tmp_path)
    for place in (name, str(tmp_path / name), tmp_path / name, f"./{name}"):
        assert files.is_local(place)
        assert files.read_bytes(place) == b"here"
        assert Path(files.full_uri(place)).samefile(tmp_path / name)
        assert not files.is_chained(place)


def test_two_colons_on_an_object_store():
    uri = f"memory://test-{uuid.uuid4().hex}/cam1::12-30.png"
    files.write_bytes(uri, b"here")
    assert files.read_bytes(uri) == b"here"
    assert files.list_names(files.join(uri, "..").replace("/cam1::12-30.png/..", "")) == ["cam1::12-30.png"]


def test_chained_uris_stay_what_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.txt", "inside")
    chained = f"zip://b.txt::{tmp_path}/a.zip"
    assert files.read_bytes(chained) == b"inside"
    for uri in (chained, "simplecache::s3://b/k", "tar://x::s3://b/y.tar", "filecache::memory://x"):
        assert files.is_chained(uri)
    for uri in ("s3://b/a::c", "gs://x::y", "/a::b", "a::b", "nothing://a::b", "s3://b/k"):
        assert not files.is_chained(uri)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_composed_otherwise_are_found(folder, forms):
    stored, asked = (unicodedata.normalize(form, "gerät-ü/é.png") for form in forms)
    files.write_bytes(files.join(folder, stored), b"x")
    found = files.composed_otherwise(files.join(folder, asked))
    assert found is not None
    assert files.read_bytes(found) == b"x"
    assert unicodedata.normalize("NFC", found).endswith(unicodedata.normalize("NFC", stored))
    assert files.composed_otherwise(files.join(folder, asked + "x")) is None
    assert files.composed_otherwise(files.join(folder, "plain.png")) is None


def test_local_or_not(tmp_path):
    assert files.is_local(tmp_path)
    assert files.is_local("file:///tmp")
    assert not files.is_local("memory://a")


def test_an_unknown_scheme_says_what_to_install():
    with pytest.raises(DataError, match=r"cannot open nowhere://a: no file system for 'nowhere://'.*install"):
        files.resolve("nowhere://a")


# ---- reading and listing ------------------------------------------------------------------------------------------


def test_write_read_list_and_remove(folder):
    assert not files.exists(folder)
    assert files.list_names(folder) == []
    files.write_bytes(files.join(folder, "b", "c.bin"), b"\0\1")
    files.write_bytes(files.join(folder, "a.bin"), b"")
    assert files.list_names(folder) == ["a.bin", "b"]
    assert files.read_bytes(files.join(folder, "b", "c.bin")) == b"\0\1"
    assert files.exists(files.join(folder, "a.bin"))
    files.remove(files.join(folder, "a.bin"))
    assert files.list_names(folder) == ["b"]
    files.remove(folder)
    assert not files.exists(folder)
    files.remove(folder)


def test_reading_what_is_not_there(folder):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(folder, "absent"))


def test_files_that_other_processes_wrote_are_seen(folder):
    """Listings are not cached: an object store's would hide what another worker has just written."""
    assert files.list_names(folder) == []
    fs, path = fsspec.core.url_to_fs(files.join(folder, "new"))
    fs.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH120
    fs.pipe_file(path, b"1")
    assert files.list_names(folder) == ["new"]
    assert files.exists(files.join(folder, "new"))


# ---- whole or not at all ------------------------------------------------------------------------------------------


def _write_and_fail(uri, error):
    with files.open_atomic(uri) as handle:
        handle.write(b"half of it")
        raise error


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_what_was_there(folder, before, error):
    uri = files.join(folder, "file")
    if before is not None:
        files.write_bytes(uri, before)
    with pytest.raises(type(error)):
        _write_and_fail(uri, error)
    assert files.list_names(folder) == ([] if before is None else ["file"])
    if before is not None:
        assert files.read_bytes(uri) == before


def test_a_file_is_not_there_before_it_is_complete(folder):
    uri = files.join(folder, "file")
    with files.open_atomic(uri) as handle:
        handle.write(b"1")
        handle.flush()
        assert "file" not in files.list_names(folder)
    assert files.list_names(folder) == ["file"]
    assert files.read_bytes(uri) == b"1"


def test_a_second_writer_replaces_the_first(folder):
    uri = files.join(folder, "file")
    with files.open_atomic(uri) as slow:
        slow.write(b"slow")
        files.write_bytes(uri, b"fast, and longer")
        assert files.read_bytes(uri) == b"fast, and longer"
    assert files.read_bytes(uri) == b"slow"
    assert files.list_names(folder) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    files.write_bytes(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace"]


def test_a_failed_upload_leaves_nothing(monkeypatch):
    def put_file(*_):
        raise OSError(errno.ECONNRESET, "connection reset")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with pytest.raises(OSError, match="connection reset"):
        files.write_bytes("memory://test-upload/file", b"content")
    assert not files.exists("memory://test-upload")


# ---- JSON and checksums -------------------------------------------------------------------------------------------


def test_json_keeps_the_order_of_keys_and_text_as_it_is(folder):
    uri = files.join(folder, "x.json")
    content = {"b": [1, None, 0.1], "a": "Größe ≥ 1"}
    files.write_json(uri, content)
    assert list(files.read_json(uri)) == ["b", "a"]
    assert files.read_json(uri) == content
    assert "Größe ≥ 1".encode() in files.read_bytes(uri)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path, value):
    """They are no JSON: most other readers would refuse the whole file."""
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"score": value})
    assert list(tmp_path.iterdir()) == []


def test_checksums(folder):
    content = os.urandom((1 << 20) + 17)  # more than is read at once
    files.write_bytes(files.join(folder, "file"), content)
    expected = hashlib.sha256(content).hexdigest()
    assert files.sha256_of(content) == expected
    assert files.sha256_file(files.join(folder, "file")) == expected


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert files.digest_of({"a": 1, "b": {"c": [1, 2], "d": None}}) == files.digest_of(
        {"b": {"d": None, "c": [1, 2]}, "a": 1}
    )


def test_a_digest_tells_everything_else_apart():
    contents = [
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": [1]},
        {"a": "1"},
        {"a": 1.5},
        {"a": None},
        {"a": [1, 2]},
        {"a": [2, 1]},
        {"a": {"a": 1}},
        [],
        {},
        "a",
        {"a": True},
    ]
    assert len({files.digest_of(content) for content in contents}) == len(contents)
    assert files.digest_of({"a": (4.0, [1e3])}) == files.digest_of({"a": [4, [1000]]})
    assert files.digest_of([]) == hashlib.sha256(b"[]").hexdigest()
    assert files.digest_of(json.loads(json.dumps({"x": 0.1}))) == files.digest_of({"x": 0.1})


# ---- tables and arrays --------------------------------------------------------------------------------------------


def test_csv_has_the_columns_in_the_order_they_come():
    assert files.csv_bytes([{"b": 1, "a": "x,y"}, {"a": None, "c": 0.5}]) == b'b,a,c\n1,"x,y",\n,,0.5\n'
    assert files.csv_bytes([], ["a", "b"]) == b"a,b\n"


def test_arrays_come_back_from_disk_and_store(folder, tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    uri = files.join(folder, "part.npy")
    files.write_array(uri, array)
    copies = tmp_path / "copies"
    mapped = files.map_array(uri, copies)
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == np.float32
    assert np.array_equal(mapped, array)
    fetched = list(copies.rglob("*.npy"))
    assert len(fetched) == (0 if files.is_local(uri) else 1)
    files.remove(uri)
    if fetched:  # not fetched a second time
        assert np.array_equal(files.map_array(uri, copies), array)


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        files.write_array(tmp_path / "a.npy", np.array([{}]))
    assert not (tmp_path / "a.npy").exists()


def test_what_lies_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.beside("runs/model/", "prepared") == str(tmp_path / "runs" / "prepared")
    assert files.beside("memory://a/b", "c") == "memory:///a/c"


@pytest.mark.parametrize("name", ["bottle", "01", "a b", "a_b", "metal-nut.v2", "Flasche_ä", "螺丝"])
def test_harmless_names_stay(name):
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/tmp/x", "..", ".", "", "_work", ".git", "a/b", "a\\b", "a?b", "a%20b", "a:b", "x" * 300, "é" * 80],
)
def test_names_from_data_stay_inside_their_folder(name):
    safe = files.safe_name(name)
    assert re.fullmatch(r"[^\W_][\w.\- ]*-[0-9a-f]{8}", safe)
    assert len(safe.encode()) <= 109
    assert safe != name


def test_names_that_are_taken_are_given_to_nothing_else():
    taken = ("models.json", "model.json")
    safe = [files.safe_name(name, taken) for name in ("models.json", "Model.json", "model.json", "bottle")]
    assert len({name.lower() for name in safe}) == 4
    assert not set(taken) & {name.lower() for name in safe}
    assert safe[3] == "bottle"
    assert files.safe_name("models.json") == "models.json"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000])
def test_json_of_endless_depth_is_no_json(tmp_path, content):
    (tmp_path / "deep.json").write_text(content)
    with pytest.raises(ValueError, match="brackets lie too deep"):
        files.read_json(tmp_path / "deep.json")


def test_no_two_names_share_a_file():
    names = ["a/b", "a_b", "a b", "a:b", "é", "e\u0301", "..", "../", "_a", "a", "x" * 150, "x" * 151]
    names += [files.safe_name(name) for name in names if files.safe_name(name) != name]
    assert len({files.safe_name(name) for name in names}) == len(names)


# ---- what is no file ----------------------------------------------------------------------------------------------


def make_special(folder, kind):
    """Something at `folder`/x that would be waited for, or that is nowhere."""
    place = folder / "x"
    if kind == "a named pipe":
        os.mkfifo(place)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(place))
    else:
        place.symlink_to("/dev/zero")
    return place


@pytest.mark.parametrize("read", [files.read_bytes, files.read_json, files.sha256_file, files.read_array])
@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    place = make_special(Path(), kind)
    with pytest.raises(NotAFileError, match=f"{kind}, not a file") as raised:
        read(place)
    assert raised.value.filename == str(tmp_path / "x")


def test_no_file_has_a_name_with_a_null_byte(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file can have this name"):
        files.read_bytes(f"{tmp_path}/a\0b")


@pytest.mark.parametrize("name", ["part-00000.parquet", "a b", "ä", "..a", "model", "-x", "a:b"])
def test_plain_names(name):
    assert files.is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a/", "a\\b", "s3://a", "a\0", None, 3, ["a"]])
def test_names_that_lead_elsewhere(name):
    assert not files.is_plain_name(name)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_full_disk_is_named_by_the_file_that_found_it_full(tmp_path, store):
    uri = str(tmp_path / "x") if store == "local" else "memory://full/x"
    names = []

    def write():
        with files.open_atomic(uri) as handle:
            names.append(handle.name)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as raised:
        write()
    # of an object store it is this machine's folder of temporary files that is full
    assert raised.value.filename == (uri if store == "local" else names[0])

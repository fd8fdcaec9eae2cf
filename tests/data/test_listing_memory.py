"""Listings of many images: the same as of few, without holding them in memory."""

import gc
import json
import os
import tracemalloc

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from unianom import files
from unianom.data.layouts import LAYOUTS, iter_samples, make_options
from unianom.data.layouts import source as module
from unianom.data.layouts.left_out import LeftOut
from unianom.data.layouts.source import Source


def fill(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number * 7919 % count:06d}.png").touch()


@pytest.mark.parametrize("most", [0, 3, 9, 10, 50_000])
def test_a_large_folder_is_listed_as_a_small_one(tmp_path, monkeypatch, most):
    for name in (
        "b.png",
        "Ä.png",
        "a.PNG",
        "😀.png",
        "\uffee.png",
        "a/2.png",
        "a/10.png",
        "notes.txt",
        "more.txt",
        ".dot.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    os.symlink(tmp_path, tmp_path / "back")  # noqa: PTH211
    monkeypatch.setattr(module, "MOST_IN_MEMORY", most)
    seen = LeftOut()
    source = Source.open(tmp_path, left_out=seen)
    assert list(source.iter_entries()) == source.entries()
    assert [entry.path for entry in source.entries()] == sorted(entry.path for entry in source.entries())
    assert [(image.path, image.size) for image in source.walk()] == [
        *(("a/10.png", 8), ("a/2.png", 7), ("a.PNG", 5), ("b.png", 5)),
        *((name, 5) for name in ("Ä.png", "\uffee.png", "😀.png")),
    ]
    assert seen.summary() == {
        "files": {".txt": {"count": 2, "example": f"{tmp_path}/more.txt"}},
        "links": {"count": 1, "examples": [f"{tmp_path}/back"]},
    }


def test_what_is_no_folder_is_told_as_before(tmp_path):
    (tmp_path / "file").touch()
    source = Source.open(tmp_path)
    with pytest.raises(module.DataError, match="file is a file; a folder is expected"):
        list(source.iter_entries("file"))
    with pytest.raises(module.DataError, match=r"no folder .*/gone; check the path of the source"):
        list(source.iter_entries("gone"))


def test_a_walk_does_not_leave_its_listings_with_the_file_system(monkeypatch):
    """Clients of object stores keep what they listed, of every folder."""
    uri = "memory://test-listing"
    try:
        for number in range(3):
            files.write_bytes(f"{uri}/{number}/image.png", b"x")
        source = Source.open(uri)
        ls = type(source.fs).ls

        def kept(self, path, *arguments, **more):
            found = ls(self, path, *arguments, **more)
            self.dircache[path] = found
            return found

        monkeypatch.setattr(type(source.fs), "ls", kept)
        assert sum(1 for _ in source.walk()) == 3
        assert [path for path in source.fs.dircache if "test-listing" in path] == []
    finally:
        files.remove(uri)


class Info(dict):
    """What a store says of an object; counted as long as it is held."""

    held = most = 0

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        Info.held += 1
        Info.most = max(Info.most, Info.held)

    def __del__(self):
        Info.held -= 1


@pytest.mark.parametrize("paged", [True, False])
def test_a_page_of_a_store_is_held_at_a_time(monkeypatch, paged):
    """Of stores that can give pages; others give all at once."""
    pages, size = 300, 10

    def iter_dir(self, path):
        for page in range(pages):
            found = [
                Info(name=f"{path}/{page * 7919 % pages:03d}-{number}.png", type="file", size=number)
                for number in range(size)
            ]
            yield from found

    if paged:
        monkeypatch.setattr(MemoryFileSystem, "iter_dir", iter_dir, raising=False)
        monkeypatch.setattr(MemoryFileSystem, "ls", None)
    else:
        monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail: list(iter_dir(self, path)))
    monkeypatch.setattr(module, "MOST_IN_MEMORY", 100)
    monkeypatch.setattr(Info, "most", 0)
    images = list(Source.open("memory://many").walk())
    assert [image.path for image in images] == [
        f"{page:03d}-{number}.png" for page in range(pages) for number in range(size)
    ]
    assert Info.held == 0
    assert (Info.most <= 2 * size) == paged


def table(folder, count, name, line):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(line(number) for number in range(count)))
    return folder / name


def manifest(number):
    label = number % 2
    row = {"filename": f"images/{number:06d}.png", "label": label, "clsname": "nut", "split": ("train", "test")[label]}
    return json.dumps(row) + "\n"


def labels(number):
    return json.dumps({"image": f"images/{number:06d}.png", "label": number % 2}) + "\n"


LISTINGS = {
    "folder": ({"unlabelled": True}, lambda folder, count: fill(folder / "a", count)),
    "folder, labelled": ({"normal": "ok"}, lambda folder, count: fill(folder / "ok", count)),
    "manifest": ({}, lambda folder, count: table(folder, count, "table.jsonl", manifest)),
    "labels": ({"normal": ["0"]}, lambda folder, count: table(folder, count, "table.jsonl", labels)),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch, kind):
    """Less than 10 bytes an image of Python's objects, and the bytes of a table of labels, which is read whole."""
    monkeypatch.setattr(module, "MOST_IN_MEMORY", 100)
    given, make = LISTINGS[kind]
    layout = kind.partition(",")[0]
    options = make_options(LAYOUTS[layout], given)
    peaks = {}
    for count in (300, 600, 2000):  # the first time for what is made once
        root = make(tmp_path / str(count), count) or tmp_path / str(count)
        gc.collect()
        tracemalloc.start()
        assert sum(1 for _ in iter_samples(layout, root, options)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    allowed = 10 + (len(labels(0)) if layout == "labels" else 0)
    assert peaks[2000] - peaks[600] < allowed * 1400

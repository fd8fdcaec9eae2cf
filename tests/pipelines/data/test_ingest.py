import dataclasses
import errno
import gc
import hashlib
import io
import json
import os
import shutil
import threading
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipelines.data import image_files, ingest_part, sample_files
from pipelines.data import ingest as module
from pipelines.data.ahead import map_ahead
from pipelines.data.image_files import AT_ONCE, read_image_file
from pipelines.data.ingest import ingest
from pipelines.data.ingest_findings import SetFindings
from pipelines.data.ingest_part import PartIngester
from pipelines.data.ingest_plan import END, SampleListing, pack_samples, part_name, unpack_samples
from pipelines.data.ingest_summary import print_summary
from pipelines.data.options import IngestOptions
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from unianom import files
from unianom.data.id_digest import IdDigest
from unianom.data.image import ImageLimits, decode_image, decode_mask
from unianom.data.schema import REJECTED_SCHEMA, Crop, SampleRef
from unianom.data.shards import MANIFEST, REJECTED, Selection, ShardSet
from unianom.errors import DataError, ImageError, MachineError, OptionError
from unianom.s3 import GIVE_UP
from unianom.temporary_database import temporary_database


def picture(seed, height=12, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(pixels, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def ref(name, **changes):
    defaults = {"dataset": "set", "category": "nut", "split": "train", "label": 0, "defect": "good", "uri": f"/{name}"}
    return SampleRef(**{"sample_id": f"set/{name}", **defaults, **changes})


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def run_part(output, refs, threads=2, number=0, **arguments):
    """One part, read back: its rows, its rejected rows and its record."""
    limits = arguments.pop("limits", ImageLimits())
    ingester = PartIngester(str(output), "plan", limits, arguments.pop("resize", None), threads, **arguments)
    record = ingester.run({"number": number, "refs": [pack_samples(refs)]})
    rows = ShardSet(str(output), {"files": [record]}, "").table().to_pylist()
    return rows, {row["sample_id"]: row for row in record["rejected"]}, record


@pytest.fixture
def tasks(monkeypatch):
    """Units of work done here, one after another, in place of Ray; gives the numbers of the parts that were written."""
    done = []

    def run_tasks(worker, arguments, tasks, *_):
        for task in tasks:
            done.append(task["number"])
            yield json.loads(json.dumps(worker(**arguments).run(task)))

    monkeypatch.setattr(module, "run_tasks", run_tasks)
    return done


@pytest.fixture
def corpus(tmp_path):
    """Two categories in MVTec's layout: eight normal images each for training, two normal and two bad for testing."""
    root = tmp_path / "corpus"
    seed = 0
    for category in ("bolt", "nut"):
        for split, defect, count in (("train", "good", 8), ("test", "good", 2), ("test", "dent", 2)):
            for number in range(count):
                seed += 1
                write(root / category / split / defect / f"{number:03d}.png", encoded(picture(seed)))
                if defect == "dent":
                    mask = np.zeros((12, 16), np.uint8)
                    mask[2 : 4 + number, 3:9] = 255
                    write(root / category / "ground_truth" / defect / f"{number:03d}_mask.png", encoded(mask))
    return root


def options(corpus, tmp_path, **changes):
    defaults = {"layout": "mvtec", "source": str(corpus), "output": str(tmp_path / "shards"), "min_parts": 4}
    return IngestOptions(**{**defaults, **changes})


def plan_parts(refs, part_bytes, min_parts):
    with temporary_database() as database:
        listing = SampleListing(database, refs)
        parts = range(listing.deal(part_bytes, min_parts))
        planned = [list(listing.part(part)) for part in parts]
        assert [listing.part_count(part) for part in parts] == [len(part) for part in planned]
        return planned


def check_unique(refs):
    with temporary_database() as database:
        SampleListing(database, refs).check_unique()


def contaminated(refs, fraction, seed):
    with temporary_database() as database:
        listing = SampleListing(database, refs)
        listing.contaminate(fraction, seed)
        return list(listing)


def digest_of_refs(refs):
    with temporary_database() as database:
        return SampleListing(database, refs).digest()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the plan -----------------------------------------------------------------------------------------------------


def many_refs():
    rng = np.random.default_rng(0)
    refs = []
    for number in range(500):
        split = ("train", "val", "test")[rng.integers(3)]
        label = (0, 1, None)[rng.integers(3)]
        category = ("bolt", "nut", "cog")[rng.integers(3)]
        refs.append(ref(f"{number}", split=split, label=label, category=category, size=int(rng.integers(100, 1000))))
    return refs


@pytest.mark.parametrize("min_parts", [1, 7, 16])
def test_every_part_holds_the_same_mix(min_parts):
    refs = many_refs()
    parts = plan_parts(refs, 1 << 20, min_parts)
    assert len(parts) == min_parts
    assert sorted(r.sample_id for part in parts for r in part) == sorted(r.sample_id for r in refs)
    strata = Counter((r.split, r.category, r.label) for r in refs)
    assert len(strata) == 27
    for stratum in strata:
        held = [sum((r.split, r.category, r.label) == stratum for r in part) for part in parts]
        assert max(held) - min(held) <= 1
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_splits_lie_together_in_a_part():
    for part in plan_parts(many_refs(), 1 << 20, 16):
        splits = [r.split for r in part]
        assert splits == sorted(splits)


def test_the_plan_does_not_depend_on_the_order_of_the_listing():
    refs = many_refs()
    assert plan_parts(refs[::-1], 1 << 20, 16) == plan_parts(refs, 1 << 20, 16)


def test_a_part_is_no_neighbourhood_of_names():
    """Names often tell the time a picture was taken; a part should not be one hour of the camera."""
    refs = [ref(f"{number:03d}") for number in range(100)]
    (part,) = plan_parts(refs, 1 << 20, 1)
    expected = sorted(refs, key=lambda r: hashlib.sha256(r.sample_id.encode()).digest())
    assert part == expected
    assert part != refs


@pytest.mark.parametrize(
    ("samples", "size", "part_bytes", "parts"),
    [(16, 10, 1 << 20, 16), (15, 10, 1 << 20, 15), (1, 10, 1 << 20, 1), (100, 1000, 5000, 20), (100, 1000, 4999, 21),
     (5, 1000, 10, 5), (100, None, 5000, 16)],
)  # fmt: skip
def test_how_many_parts(samples, size, part_bytes, parts):
    """So many that none exceeds the aimed size, at least 16, but never more than samples."""
    planned = plan_parts([ref(str(number), size=size) for number in range(samples)], part_bytes, 16)
    assert len(planned) == parts
    assert all(planned)


def test_images_inside_the_plan_count_by_their_bytes():
    assert len(plan_parts([ref(str(number), data=bytes(1000)) for number in range(100)], 5000, 1)) == 20


def test_two_samples_of_one_name_are_refused():
    check_unique([ref("a"), ref("b")])
    with pytest.raises(DataError, match=r"/x/a and /y/a are both named set/a"):
        check_unique([ref("a", uri="/x/a"), ref("b"), ref("a", uri="/y/a")])


# ---- one part -----------------------------------------------------------------------------------------------------


def test_images_are_stored_untouched(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    given = {
        "a.png": ("PNG", encoded(picture(1)), (12, 16)),
        "b.jpg": ("JPEG", encoded(picture(2), "JPEG", exif=exif), (16, 12)),
        "c.bmp": ("BMP", encoded(picture(3)[..., 0], "BMP"), (12, 16)),
        "d.tif": ("TIFF", encoded(picture(4)[..., 0].astype(np.uint16) * 257, "TIFF"), (12, 16)),
        "e.webp": ("WEBP", encoded(picture(5), "WEBP"), (12, 16)),
        "misnamed.png": ("JPEG", encoded(picture(6), "JPEG"), (12, 16)),
    }
    refs = [
        ref(name, uri=write(tmp_path / name, data), label=None, defect=None) for name, (_, data, _) in given.items()
    ]
    rows, rejected, record = run_part(tmp_path / "out", refs)
    assert rejected == {}
    assert record["rows"] == len(rows) == len(given)
    for row, r in zip(rows, refs):
        file_format, data, size = given[r.sample_id.removeprefix("set/")]
        assert row["image"] == data
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["format"], (row["height"], row["width"])) == (file_format, size)
        assert {key: row[key] for key in ("sample_id", "dataset", "category", "split", "label", "defect", "uri")} == {
            key: getattr(r, key) for key in ("sample_id", "dataset", "category", "split", "label", "defect", "uri")
        }


def test_images_inside_the_plan_are_stored_as_well(tmp_path):
    data = encoded(picture(1))
    (row,), _, _ = run_part(tmp_path, [ref("0", data=data, uri="/batch#0")])
    assert row["image"] == data
    assert row["uri"] == "/batch#0"


def test_what_cannot_be_used_is_a_rejected_row_with_its_reason(tmp_path, monkeypatch):
    good = encoded(picture(0))
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    write(tmp_path / "good.png", good)
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")  # noqa: PTH211
    refused = {
        "folder.jpg": ("unsupported", "a folder"),
        "absent.png": ("missing", "no such file"),
        "link.png": ("missing", "no such file"),
        "good.png/inside.png": ("missing", "no such file"),
        "secret.png": ("missing", "no permission"),
        "cut.png": ("corrupt", "cannot decode"),
        "short.png": ("corrupt", "cannot decode"),
        "text.png": ("corrupt", "known format"),
        "empty.png": ("corrupt", "empty"),
        "animation.gif": ("corrupt", "known format"),
        "float.tif": ("unsupported", "float"),
        "huge.png": ("too_large", "pixels"),
        "heavy.png": ("too_large", "bytes"),
    }
    write(tmp_path / "secret.png", good)
    write(tmp_path / "cut.png", good[: len(good) // 2])
    write(tmp_path / "short.png", good[:-25])
    write(tmp_path / "text.png", b"no image at all")
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "animation.gif", encoded(picture(0), "GIF"))
    write(tmp_path / "float.tif", encoded(picture(0)[..., 0].astype(np.float32), "TIFF"))
    write(tmp_path / "huge.png", encoded(np.zeros((200, 300), np.uint8)))
    write(tmp_path / "heavy.png", encoded(picture(0, 50, 50)))
    read_bytes = files.read_bytes

    def guarded(uri):
        if uri.endswith("secret.png"):
            raise PermissionError(errno.EACCES, "Permission denied", uri)
        return read_bytes(uri)

    monkeypatch.setattr(files, "read_bytes", guarded)
    names = ["good.png", *refused]
    refs = [ref(name, uri=str(tmp_path / name), split="test", label=1, defect="dent") for name in names]
    limits = ImageLimits(max_pixels=50_000, max_bytes=7000)
    rows, rejected, record = run_part(tmp_path / "out", refs, limits=limits)
    assert [row["sample_id"] for row in rows] == ["set/good.png"]
    assert list(rejected) == [f"set/{name}" for name in refused]
    assert record["rows"] == 1
    for name, (status, words) in refused.items():
        row = rejected[f"set/{name}"]
        assert (row["status"], row["split"], row["label"], row["defect"]) == (status, "test", 1, "dent")
        assert words in row["error"]
        assert row["uri"] == str(tmp_path / name)
        assert sorted(row) == sorted(REJECTED_SCHEMA.names)


def test_a_file_that_the_listing_says_is_too_large_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "read_bytes", lambda _: pytest.fail("read"))
    _, rejected, _ = run_part(tmp_path, [ref("a.png", size=1001)], limits=ImageLimits(max_bytes=1000))
    assert rejected["set/a.png"]["status"] == "too_large"


def test_masks_are_stored_as_zero_and_255_and_their_problems_recorded(tmp_path):
    shape = (12, 16)
    defect = np.zeros(shape, np.uint8)
    defect[3:5, 2:9] = 1
    exif = Image.Exif()
    exif[0x0112] = 6
    masks = {
        "classes": encoded(defect * np.uint8(2)),
        "antialiased": encoded(defect * np.uint8(90) + np.uint8(60)),
        "empty": encoded(np.zeros(shape, np.uint8)),
        "wrong_size": encoded(np.zeros((16, 12), np.uint8)),
        "unreadable": b"no image",
        "normal": encoded(np.zeros(shape, np.uint8)),
    }
    image = encoded(picture(1))
    refs = []
    for name, data in masks.items():
        mask_uri = write(tmp_path / f"{name}_mask.png", data)
        threshold = 127 if name == "antialiased" else 0
        uri = write(tmp_path / f"{name}.png", image)
        refs.append(ref(name, uri=uri, label=int(name != "normal"), mask_uri=mask_uri, mask_threshold=threshold))
    folder = tmp_path / "folder_mask.png"
    folder.mkdir()
    plain = write(tmp_path / "plain.png", image)
    refs += [
        ref("absent", uri=plain, label=1, mask_uri=str(tmp_path / "nowhere.png")),
        ref("folder", uri=plain, label=1, mask_uri=str(folder)),
        ref("none_bad", uri=plain, label=1),
        ref("none_good", uri=plain, label=0),
        ref("none_unknown", uri=plain, label=None),
        ref("upright", uri=write(tmp_path / "u.jpg", encoded(picture(2), "JPEG", exif=exif)), label=1,
            mask_uri=write(tmp_path / "u_mask.png", encoded(np.full((16, 12), 255, np.uint8)))),
    ]  # fmt: skip
    rows, rejected, record = run_part(tmp_path / "out", refs)
    assert rejected == {}
    assert record["masks"] == {
        "missing": ["set/absent", "set/none_bad"],
        "wrong_size": ["set/wrong_size"],
        "unreadable": ["set/unreadable", "set/folder"],
        "empty": ["set/empty"],
    }
    stored = {row["sample_id"].removeprefix("set/"): row["mask"] for row in rows}
    without = {"wrong_size", "unreadable", "absent", "folder", "none_bad", "none_good", "none_unknown"}
    assert {name for name, mask in stored.items() if mask is None} == without
    for name, expected in (
        ("classes", defect * 255),
        ("antialiased", defect * 255),
        ("empty", defect * 0),
        ("normal", defect * 0),
        ("upright", np.full((16, 12), 255)),
    ):
        with Image.open(io.BytesIO(stored[name])) as mask:
            assert (mask.format, mask.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(mask), expected)


def test_reduced_images_keep_the_name_of_their_original(tmp_path):
    original = encoded(picture(1, 40, 60))
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 255
    small = encoded(picture(2, 16, 90))
    refs = [
        ref(
            "large", uri=write(tmp_path / "l.png", original), mask_uri=write(tmp_path / "m.png", encoded(mask)), label=1
        ),
        ref("small", uri=write(tmp_path / "s.png", small)),
    ]
    rows, _, _ = run_part(tmp_path / "out", refs, resize=20)
    large, untouched = rows
    assert (large["height"], large["width"]) == (20, 30)
    assert decode_image(large["image"]).pixels.shape == (20, 30, 3)
    assert large["sha256"] == hashlib.sha256(original).hexdigest()
    reduced = decode_mask(large["mask"])
    assert reduced.shape == (20, 30)
    np.testing.assert_array_equal(reduced[5:10, 15:25], np.full((5, 10), 255))
    assert reduced.sum() == 255 * 50
    assert untouched["image"] == small


def test_a_crop_is_stored_as_png_with_its_mask_and_its_own_checksum(tmp_path):
    pixels = picture(1, 41, 60)
    mask = np.zeros((41, 60), np.uint8)
    mask[10:20, 30:50] = 255
    beside = np.zeros((41, 60), np.uint8)
    beside[:, :5] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(picture(2, 40, 60), "JPEG", exif=exif)
    image, crop = write(tmp_path / "i.png", encoded(pixels)), Crop("centre", 20)
    refs = [
        ref("cut", uri=image, label=1, mask_uri=write(tmp_path / "m.png", encoded(mask)), crop=crop),
        ref("cut_away", uri=image, label=1, mask_uri=write(tmp_path / "b.png", encoded(beside)), crop=crop),
        ref("mask_of_crop", uri=image, label=1, mask_uri=write(tmp_path / "s.png", encoded(mask[:20, :20])), crop=crop),
        ref("upright", uri=write(tmp_path / "u.jpg", jpeg), crop=crop),
        ref("padded", uri=image, label=1, mask_uri=str(tmp_path / "m.png"), crop=Crop("centre", 50, pad=True)),
        ref("whole", uri=image),
    ]
    rows, rejected, record = run_part(tmp_path / "out", refs)
    assert rejected == {}
    assert record["masks"] == {
        "missing": [],
        "wrong_size": ["set/mask_of_crop"],
        "unreadable": [],
        "empty": ["set/cut_away"],
    }
    cut, cut_away, _, upright, padded, whole = rows
    # (41 - 20) / 2 is rounded to 10, the even one, as torchvision does
    for row, expected in (
        (cut, pixels[10:30, 20:40]),
        (cut_away, pixels[10:30, 20:40]),
        (upright, decode_image(jpeg).pixels[20:40, 10:30]),
    ):
        assert (row["format"], row["height"], row["width"]) == ("PNG", 20, 20)
        assert row["image"] == encoded(expected, compress_level=1)
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
    np.testing.assert_array_equal(decode_mask(cut["mask"]), mask[10:30, 20:40])
    assert (padded["height"], padded["width"]) == (50, 50)
    np.testing.assert_array_equal(decode_image(padded["image"]).pixels[4:45], pixels[:, 5:55])
    assert not decode_image(padded["image"]).pixels[:4].any()
    np.testing.assert_array_equal(decode_mask(padded["mask"])[4:45], mask[:, 5:55])
    assert whole["image"] == (tmp_path / "i.png").read_bytes()


def test_a_crop_that_an_image_does_not_allow_is_a_rejected_row(tmp_path):
    write(tmp_path / "small.png", encoded(picture(1, 30, 19)))
    write(tmp_path / "dark.png", encoded(np.full((30, 30, 3), 10, np.uint8)))
    write(tmp_path / "strip.png", encoded(picture(2, 1, 300)))
    write(tmp_path / "broken.png", b"no image")
    fundus = Crop("fundus", 20)
    refs = [
        ref("small", uri=str(tmp_path / "small.png"), crop=Crop("centre", 20)),
        ref("dark", uri=str(tmp_path / "dark.png"), crop=fundus),
        ref("strip", uri=str(tmp_path / "strip.png"), crop=fundus),
        ref("broken", uri=str(tmp_path / "broken.png"), crop=fundus),
    ]
    rows, rejected, _ = run_part(tmp_path / "out", refs, limits=ImageLimits(max_pixels=50_000))
    assert rows == []
    assert {name: row["status"] for name, row in rejected.items()} == {
        "set/small": "unsupported",
        "set/dark": "unsupported",
        "set/strip": "too_large",
        "set/broken": "corrupt",
    }
    assert "19 x 30 pixels, smaller than its layout's crop of 20" in rejected["set/small"]["error"]


def test_a_crop_may_be_reduced_too(tmp_path):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[20:40, 20:40] = 255
    mask = np.ascontiguousarray(pixels[..., 0])
    uri, mask_uri = write(tmp_path / "i.png", encoded(pixels)), write(tmp_path / "m.png", encoded(mask))
    refs = [ref("a", uri=uri, mask_uri=mask_uri, label=1, crop=Crop("centre", 40))]
    ((row,), _, _) = run_part(tmp_path / "out", refs, resize=20)
    assert (row["height"], row["width"]) == decode_mask(row["mask"]).shape == (20, 20)
    assert row["sha256"] == hashlib.sha256(encoded(pixels[10:50, 10:50], compress_level=1)).hexdigest()
    np.testing.assert_array_equal(decode_mask(row["mask"])[5:15, 5:15], np.full((10, 10), 255))
    assert decode_mask(row["mask"]).sum() == 100 * 255


@pytest.mark.parametrize("resize", [None, 8])
def test_the_bytes_of_a_part_do_not_depend_on_threads_or_repetition(tmp_path, resize):
    refs = []
    for number in range(30):
        data = b"broken" if number % 7 == 3 else encoded(picture(number, 10 + number % 5, 12))
        split, crop = ("test", "train")[number > 12], (None, Crop("fundus", 12), Crop("centre", 9))[number % 3]
        refs.append(ref(f"{number}", uri=write(tmp_path / f"{number}.png", data), split=split, crop=crop))
    made = []
    for threads in (1, 3, 8, 1):
        output = tmp_path / f"out{len(made)}"
        rows, rejected, _ = run_part(output, refs, threads, resize=resize)
        made.append(contents(output))
        assert [row["sample_id"] for row in rows] == [r.sample_id for n, r in enumerate(refs) if n % 7 != 3]
        assert list(rejected) == [r.sample_id for n, r in enumerate(refs) if n % 7 == 3]
    assert sorted(made[0]) == ["_part-00000.json", "part-00000.parquet"]
    assert all(other == made[0] for other in made)
    run_part(tmp_path / "out0", refs, resize=resize)
    assert contents(tmp_path / "out0") == made[0]


def test_the_record_of_a_part_tells_its_checksum(tmp_path):
    _, _, record = run_part(tmp_path / "out", [ref("a", uri=write(tmp_path / "a.png", encoded(picture(1))))], number=3)
    assert record["name"] == "part-00003.parquet"
    assert record["plan"] == "plan"
    assert record["sha256"] == hashlib.sha256((tmp_path / "out/part-00003.parquet").read_bytes()).hexdigest()
    assert outputs.part_record(str(tmp_path / "out"), "part-00003.parquet") == record


def test_the_record_comes_after_the_part(tmp_path, monkeypatch):
    refs = [ref("a", uri=write(tmp_path / "a.png", encoded(picture(1))))]
    seen = []

    def killed(output, part, _):
        seen.append(pq.read_table(files.join(output, part)).num_rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "commit_part", killed)
    with pytest.raises(KeyboardInterrupt):
        run_part(tmp_path / "out", refs)
    assert seen == [1]
    assert outputs.part_record(str(tmp_path / "out"), part_name(0)) is None
    monkeypatch.undo()
    before = contents(tmp_path / "out")
    run_part(tmp_path / "out", refs)
    assert contents(tmp_path / "out")["part-00000.parquet"] == before["part-00000.parquet"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_part_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    refs = [ref(str(n), uri=write(tmp_path / f"{n}.png", encoded(picture(n)))) for n in range(8)]
    read_bytes = files.read_bytes

    def failing(uri):
        if uri.endswith("5.png"):
            raise RuntimeError("bug")
        return read_bytes(uri)

    monkeypatch.setattr(files, "read_bytes", failing)
    with pytest.raises(RuntimeError, match="bug"):
        run_part(tmp_path / "out", refs)
    gc.collect(1)  # the unfinished writer, here rather than in another test
    assert contents(tmp_path / "out") == {}


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """A file on a disk with room for 2,000 bytes."""

    def __init__(self, handle):
        self._handle = handle

    def write(self, content):
        return self._handle.write(content) if self._handle.tell() + len(content) <= 2000 else full()

    def __getattr__(self, name):
        return getattr(self._handle, name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path, monkeypatch, call):
    refs = [ref(str(n), uri=write(tmp_path / f"{n}.png", encoded(picture(n)))) for n in range(6)]
    open_atomic = files.open_atomic

    @contextmanager
    def open_on_full_disk(uri):
        with open_atomic(uri) as handle:
            yield FullDisk(handle)

    if call == "write":
        monkeypatch.setattr(files, "open_atomic", open_on_full_disk)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        run_part(tmp_path / "out", refs)
    assert caught.value.errno == errno.ENOSPC
    del caught
    gc.collect(1)
    assert contents(tmp_path / "out") == {}


# ---- reading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch):
    """Seconds that would have been slept."""
    slept = []
    # in this file alone: a lock that another test left signs its life in a thread, and sleeps between
    monkeypatch.setattr(image_files, "time", SimpleNamespace(sleep=slept.append))
    return slept


def flaky(monkeypatch, *errors):
    left = list(errors)

    def read_bytes(_):
        if left:
            raise left.pop(0)
        return b"content"

    monkeypatch.setattr(files, "read_bytes", read_bytes)


def test_what_may_pass_is_tried_again(monkeypatch, naps):
    flaky(monkeypatch, ConnectionResetError("reset"), TimeoutError("slow"))
    assert read_image_file("s3://bucket/a.png") == b"content"
    assert len(naps) == 2
    assert naps[1] > naps[0] > 0


def test_what_does_not_pass_ends_the_job_and_says_how_to_go_on(monkeypatch, naps):
    flaky(monkeypatch, *[OSError(errno.EIO, "Input/output error")] * 3)
    with pytest.raises(DataError, match=r"cannot read s3://bucket/a.png: .*Input/output error.*same command again"):
        read_image_file("s3://bucket/a.png")
    assert len(naps) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FileNotFoundError("a"), "missing"),
        (NotADirectoryError("a"), "missing"),
        (PermissionError("a"), "missing"),
        (IsADirectoryError("a"), "unsupported"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(monkeypatch, naps, error, status):
    flaky(monkeypatch, error)
    with pytest.raises(ImageError) as caught:
        read_image_file("/a.png")
    assert caught.value.status == status
    assert naps == []


def special(folder, kind):
    """Path of something with an image's name that is no image, and why."""
    path = folder / f"{kind}.png"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "unsupported", "a named pipe, not a file"
    if kind == "device":
        path.symlink_to("/dev/zero")
        return path, "unsupported", "a device, not a file"
    if kind == "self":
        path.symlink_to(path.name)
        return path, "missing", "a link that leads back to itself"
    if kind == "loop":
        path.symlink_to("other.png")
        (folder / "other.png").symlink_to(path.name)
        return path, "missing", "a link that leads back to itself"
    if kind == "dangling":
        path.symlink_to("/nowhere/a.png")
        return path, "missing", "no such file"
    if kind == "long":
        return folder / ("a" * 300 + ".png"), "missing", "no such file, its name is longer than the file system takes"
    return folder / "a\0.png", "missing", "no such file"


KINDS = ["pipe", "device", "self", "loop", "dangling", "long", "null"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_one_rejected_row(tmp_path, naps, kind):
    path, status, words = special(tmp_path, kind)
    good = write(tmp_path / "good.png", encoded(picture(1)))
    rows, rejected, _ = run_part(tmp_path / "out", [ref("bad", uri=str(path)), ref("good", uri=good)])
    assert [row["sample_id"] for row in rows] == ["set/good"]
    assert rejected["set/bad"]["status"] == status
    assert rejected["set/bad"]["error"].startswith(f"{words}: {path}")
    assert naps == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_no_file_is_told_and_its_image_kept(tmp_path, naps, kind):
    path, status, _ = special(tmp_path, kind)
    good = write(tmp_path / "good.png", encoded(picture(1)))
    rows, _, record = run_part(tmp_path / "out", [ref("good", uri=good, label=1, split="test", mask_uri=str(path))])
    assert [row["mask"] for row in rows] == [None]
    assert record["masks"]["missing" if status == "missing" else "unreadable"] == ["set/good"]


@pytest.mark.parametrize("layout", ["folder", "manifest"])
def test_a_source_with_pipes_and_loops_is_read_to_its_end(tmp_path, inline, layout):
    source = tmp_path / "source"
    for number in range(3):
        write(source / "good" / f"{number}.png", encoded(picture(number)))
    paths = [special(source / "good", kind)[0] for kind in KINDS if kind not in ("long", "null")]
    options = {"normal": "good"}
    if layout == "manifest":
        options = {}
        names = [*(source / "good" / f"{number}.png" for number in range(3)), *paths]
        rows = [{"filename": f"good/{p.name}", "category": "x", "split": "train", "label": 0} for p in names]
        (source / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = ingest(
        IngestOptions(
            layout,
            str(source if layout == "folder" else source / "all.jsonl"),
            str(tmp_path / "out"),
            layout_options=options,
            max_reject_fraction=0.9,
        )
    )
    images = {row["uri"].rsplit("/", 1)[1] for row in result.shards.table(columns=["uri"]).to_pylist()}
    assert images == {"0.png", "1.png", "2.png"}
    rejected = {row["uri"].rsplit("/", 1)[1] for row in result.shards.rejected().to_pylist()}
    assert rejected >= {path.name for path in paths}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("hung", ["2.png", "2_mask.png"])
def test_a_store_that_hangs_rejects_the_sample_and_no_other(tmp_path, monkeypatch, threads, hung):
    """At its image or at its mask."""
    mask = encoded(np.eye(12, 16, dtype=np.uint8) * 255)
    refs = []
    for n in range(6):
        uri, mask_uri = (write(tmp_path / name, data) for name, data in
                         ((f"{n}.png", encoded(picture(n))), (f"{n}_mask.png", mask)))  # fmt: skip
        refs.append(ref(f"{n}.png", uri=uri, mask_uri=mask_uri, label=1))
    whole, _, _ = run_part(tmp_path / "whole", refs)
    release = threading.Event()

    def read(uri):
        if uri.endswith(f"/{hung}"):
            release.wait()
        return read_image_file(uri)

    monkeypatch.setattr(sample_files, "read_image_file", read)
    rows, rejected, record = run_part(tmp_path / "out", refs, threads, limits=ImageLimits(seconds=1))
    release.set()
    assert rows == [row for row in whole if row["sample_id"] != "set/2.png"]
    assert record["rows"] == 5
    row = rejected.pop("set/2.png")
    assert (row["status"], row["uri"], row["label"]) == ("timeout", refs[2].uri, 1)
    assert "took more than 1 s, the limit (--limits.seconds)" in row["error"]
    assert list(row) == REJECTED_SCHEMA.names
    assert not rejected


@pytest.mark.parametrize("threads", [1, 4])
def test_files_are_fetched_many_at_a_time(tmp_path, monkeypatch, threads):
    """A store that takes its time costs threads that wait, however many check images: each file here is given only
    when so many are asked for."""
    refs = []
    for n in range(2 * AT_ONCE):
        uri = f"memory:///test-ingest-fetched/{threads}/{n}.png"
        files.write_bytes(uri, encoded(picture(n)))
        refs.append(ref(f"{n}.png", uri=uri))
    together = threading.Barrier(AT_ONCE)

    def read(uri):
        together.wait(timeout=30)
        return read_image_file(uri)

    monkeypatch.setattr(sample_files, "read_image_file", read)
    try:
        rows, rejected, _ = run_part(tmp_path / "out", refs, threads)
    finally:
        files.remove("memory:///test-ingest-fetched")
    assert not rejected
    assert [row["sample_id"] for row in rows] == [ref.sample_id for ref in refs]


def test_a_store_that_answers_with_errors_ends_the_job_before_an_image_is_late(monkeypatch):
    """So that a store that is away for a while costs no image."""
    waited = []

    def away(uri):
        waited.append(GIVE_UP)
        raise OSError(errno.EIO, "SlowDown", uri)

    monkeypatch.setattr(files, "read_bytes", away)
    monkeypatch.setattr(image_files, "time", SimpleNamespace(sleep=waited.append))
    with pytest.raises(MachineError, match=r"s3://bucket/a\.png: SlowDown"):
        read_image_file("s3://bucket/a.png")
    assert sum(waited) < ImageLimits().seconds


def test_packed_samples_come_through_arrays_of_bytes():
    """As Ray Data hands tasks over; some packed samples end in a zero byte."""
    samples = [SampleRef(f"set/{n}.png", "set", "a", "test", None, None, f"/set/{n}.png") for n in range(2000)]
    packed = [pack_samples([sample]) for sample in samples]
    assert any(content.removesuffix(END).endswith(b"\0") for content in packed)
    assert list(unpack_samples(np.array(packed))) == samples


def test_map_ahead_keeps_the_order_and_a_bounded_number_in_hand():
    taken, given = [], []
    lock = threading.Lock()

    def items():
        for number in range(40):
            with lock:
                taken.append(number)
                assert len(taken) - len(given) <= 5
            yield number

    with ThreadPoolExecutor(3) as pool:
        for value in map_ahead(pool, lambda n: n * n, items(), 5):
            with lock:
                given.append(value)
        assert list(map_ahead(pool, str, iter([]), 5)) == []
        assert list(map_ahead(pool, str, iter([1]), 5)) == ["1"]
    assert given == [n * n for n in range(40)]


def test_map_ahead_keeps_a_bounded_size_in_hand():
    """Of items of 4, 4, 90, 4 … at most 10 and one more item."""
    sizes = [90 if number == 2 else 4 for number in range(12)]
    taken, given, most = [], [], []

    def items():
        for number in range(12):
            taken.append(number)
            most.append(sum(sizes[number] for number in taken) - sum(sizes[number] for number in given))
            yield number

    with ThreadPoolExecutor(3) as pool:
        for value in map_ahead(pool, lambda n: n, items(), 5, None, sizes.__getitem__, 10):
            given.append(value)
    assert given == list(range(12))
    assert most == [4, 8, 98, 4, 8, 12, 12, 12, 12, 12, 12, 12]


def test_map_ahead_raises_what_the_function_does():
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(map_ahead(pool, lambda n: 1 // n, iter([1, 0, 2]), 2))


# ---- the whole job ------------------------------------------------------------------------------------------------


def test_a_corpus_becomes_a_shard_set(corpus, tmp_path, tasks):
    result = ingest(options(corpus, tmp_path))
    assert result.fresh
    assert sorted(tasks) == [0, 1, 2, 3]
    shards = result.shards
    rows = shards.table().to_pylist()
    found = sorted(path for path in corpus.rglob("*.png") if "ground_truth" not in path.parts)
    assert sorted(row["sample_id"] for row in rows) == [f"mvtec/{path.relative_to(corpus)}" for path in found]
    for row in rows:
        path = corpus / row["sample_id"].removeprefix("mvtec/")
        category, split, defect, name = path.relative_to(corpus).parts
        assert (row["category"], row["split"], row["defect"]) == (category, split, defect)
        assert row["label"] == int(defect == "dent")
        assert row["image"] == path.read_bytes()
        assert row["uri"] == str(path)
        if defect == "dent":
            mask = corpus / category / "ground_truth" / defect / name.replace(".png", "_mask.png")
            np.testing.assert_array_equal(decode_mask(row["mask"]), decode_mask(mask.read_bytes()))
    assert shards.rejected().num_rows == 0
    assert sorted(files.list_names(shards.uri)) == sorted(
        [MANIFEST, REJECTED, outputs.PLAN]
        + [name for number in range(4) for name in (f"_part-{number:05d}.json", f"part-{number:05d}.parquet")]
    )


def test_the_manifest_tells_what_is_there(corpus, tmp_path, tasks):
    write(corpus / "nut" / "train" / "good" / "broken.png", b"")
    given = options(corpus, tmp_path, max_reject_fraction=0.5)
    shards = ingest(given).shards
    manifest = shards.manifest
    expected = Counter(
        (row["dataset"], row["category"], row["split"], row["label"], row["defect"])
        for row in shards.table().to_pylist()
    )
    keys = ("dataset", "category", "split", "label", "defect")
    assert {tuple(entry[key] for key in keys): entry["count"] for entry in manifest["counts"]} == expected
    for entry in manifest["counts"]:
        digest = IdDigest()
        digest.add(r["sample_id"] for r in shards.table().to_pylist() if all(r[key] == entry[key] for key in keys))
        assert entry["ids"] == digest.hex()
    assert sum(expected.values()) == 24
    assert manifest["rejected"] == {"corrupt": 1}
    (rejected,) = shards.rejected().to_pylist()
    assert (rejected["sample_id"], rejected["status"]) == ("mvtec/nut/train/good/broken.png", "corrupt")
    output = tmp_path / "shards"
    for entry in manifest["files"]:
        content = (output / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows"] == pq.ParquetFile(io.BytesIO(content)).metadata.num_rows
    assert manifest["bytes"] == sum((output / entry["name"]).stat().st_size for entry in manifest["files"])
    assert manifest["source"] == str(corpus)
    assert manifest["layout"] == "mvtec"
    # `seconds` is left out, so that shard sets from before there was a limit of time stay the same plan
    assert manifest["limits"] == {"max_pixels": 100_000_000, "max_bytes": 256 << 20}
    assert shards.count(Selection(("test",), ("bolt",))) == 4
    assert manifest["summary"]["height"] == [12, 12]


def test_the_same_command_again_changes_nothing(corpus, tmp_path, tasks):
    first = ingest(options(corpus, tmp_path))
    before = contents(tmp_path / "shards")
    tasks.clear()
    again = ingest(options(corpus, tmp_path))
    assert not again.fresh
    assert tasks == []
    assert contents(tmp_path / "shards") == before
    assert again.shards == first.shards


def test_an_interrupted_job_continues_to_the_same_bytes(corpus, tmp_path, tasks, capsys):
    ingest(options(corpus, tmp_path))
    whole = contents(tmp_path / "shards")
    for left in range(5):
        output = tmp_path / f"left{left}"
        shutil.copytree(tmp_path / "shards", output)
        (output / MANIFEST).unlink()
        (output / "part-00003.parquet.0a1b2c3d.tmp").write_bytes(b"half")
        for number in range(left, 4):
            (output / f"_part-{number:05d}.json").unlink()
        tasks.clear()
        assert ingest(options(corpus, tmp_path, output=str(output))).fresh
        assert tasks == list(range(left, 4))
        assert contents(output) == whole
    assert "continuing: 24 samples are stored already" in capsys.readouterr().out


def test_an_ingest_begun_with_larger_row_groups_is_continued(corpus, tmp_path, tasks, monkeypatch):
    """As before shards had small ones: what is there is kept, and the set is the same rows."""
    rows = ingest(options(corpus, tmp_path, output=str(tmp_path / "whole"))).shards.table().to_pylist()
    with monkeypatch.context() as before:
        before.setattr(ingest_part, "SAMPLE_GROUP_ROWS", 1)  # else than now, as small parts show no difference
        ingest(options(corpus, tmp_path))
    output = tmp_path / "shards"
    for name in (MANIFEST, "_part-00001.json", "_part-00003.json"):
        (output / name).unlink()
    kept = {name: contents(output)[name] for name in ("part-00000.parquet", "_part-00000.json")}
    tasks.clear()
    assert ingest(options(corpus, tmp_path)).shards.table().to_pylist() == rows
    assert tasks == [1, 3]
    assert kept.items() <= contents(output).items()
    groups = [pq.ParquetFile(output / part_name(number)).num_row_groups for number in range(4)]
    assert groups == [6, 2, 6, 2]


def test_the_record_of_another_plan_is_not_trusted(corpus, tmp_path, tasks):
    ingest(options(corpus, tmp_path))
    whole = contents(tmp_path / "shards")
    (tmp_path / "shards" / MANIFEST).unlink()
    record = json.loads(whole["_part-00002.json"])
    (tmp_path / "shards" / "_part-00002.json").write_text(json.dumps({**record, "plan": "another"}))
    tasks.clear()
    ingest(options(corpus, tmp_path))
    assert tasks == [2]
    assert contents(tmp_path / "shards") == whole


@pytest.mark.parametrize("changes", [{"resize": 64}, {"limits": ImageLimits(max_pixels=5000)}, {"min_parts": 5}])
def test_another_plan_does_not_touch_what_is_there(corpus, tmp_path, tasks, changes):
    ingest(options(corpus, tmp_path))
    before = contents(tmp_path / "shards")
    with pytest.raises(DataError, match=r"a shard set of another run .*--overwrite true"):
        ingest(options(corpus, tmp_path, **changes))
    assert contents(tmp_path / "shards") == before
    tasks.clear()
    assert ingest(options(corpus, tmp_path, overwrite=True, **changes)).fresh
    assert tasks
    assert contents(tmp_path / "shards") != before


def test_a_source_that_changed_is_another_plan(corpus, tmp_path, tasks):
    ingest(options(corpus, tmp_path))
    write(corpus / "nut" / "train" / "good" / "new.png", encoded(picture(99)))
    with pytest.raises(DataError, match=r"differing in: samples"):
        ingest(options(corpus, tmp_path))


def test_crops_are_part_of_the_plan_and_plans_from_before_there_were_any_still_hold():
    refs = [ref("a", size=9, mask_uri="/m", mask_threshold=127), ref("b", data=b"x")]
    digest = digest_of_refs
    assert digest(refs) == "baf8b959863c1c70e89ada8e219a9b3bee8d0f008af3d540ee08799bb1d7e1e0"
    cropped = [dataclasses.replace(refs[0], crop=Crop("centre", 9)), refs[1]]
    wider = [dataclasses.replace(refs[0], crop=Crop("centre", 9, pad=True)), refs[1]]
    assert len({digest(refs), digest(cropped), digest(wider)}) == 3


def test_workers_and_threads_are_no_part_of_the_plan(corpus, tmp_path, tasks):
    ingest(options(corpus, tmp_path))
    runtime = RuntimeOptions(workers=3, cpus_per_worker=2)
    assert not ingest(options(corpus, tmp_path, runtime=runtime, max_reject_fraction=1.0)).fresh


def test_too_many_rejected_samples_fail_the_job_after_the_rest_is_done(corpus, tmp_path, tasks):
    for number in range(3):
        write(corpus / "nut" / "train" / "good" / f"broken{number}.png", b"no image")
    write(corpus / "nut" / "train" / "good" / "gone.png", encoded(picture(1), "GIF"))
    os.remove(corpus / "nut" / "train" / "good" / "000.png")  # noqa: PTH107
    os.symlink("nowhere", corpus / "nut" / "train" / "good" / "000.png")  # noqa: PTH211
    message = r"5 of 28 samples were rejected \(4 corrupt, 1 missing\), more than --max-reject-fraction 0.01 allows"
    for _ in range(2):  # the second time from the finished set
        with pytest.raises(DataError, match=message):
            ingest(options(corpus, tmp_path))
    assert sorted(tasks) == [0, 1, 2, 3]
    shards = ShardSet.open(tmp_path / "shards")
    assert shards.count(Selection()) == 23
    assert shards.rejected().num_rows == 5
    assert not ingest(options(corpus, tmp_path, max_reject_fraction=5 / 28)).fresh


def test_a_source_of_which_nothing_can_be_read_never_gets_a_manifest(tmp_path, tasks):
    write(tmp_path / "corpus/nut/train/good/0.png", b"no image")
    write(tmp_path / "corpus/nut/test/good/0.png", b"no image")
    with pytest.raises(DataError, match=r"not one of 2 samples could be read; the reasons are in .*_rejected.parquet"):
        ingest(options(tmp_path / "corpus", tmp_path, max_reject_fraction=1.0))
    assert not outputs.is_complete(str(tmp_path / "shards"))


def test_a_part_that_was_not_written_ends_the_job(corpus, tmp_path, tasks, monkeypatch):
    monkeypatch.setattr(module, "run_tasks", lambda *_: iter(()))
    with pytest.raises(DataError, match=r"part-00000.parquet was not written; run the same command again"):
        ingest(options(corpus, tmp_path))
    assert not outputs.is_complete(str(tmp_path / "shards"))


def test_names_that_clash_are_told_before_any_image_is_read(corpus, tmp_path, tasks, monkeypatch):
    monkeypatch.setattr(module, "iter_samples", lambda *_: [ref("a", uri="/x/a"), ref("a", uri="/y/a")])
    with pytest.raises(DataError, match=r"/x/a and /y/a are both named set/a"):
        ingest(options(corpus, tmp_path))
    assert tasks == []
    assert not (tmp_path / "shards").exists()


def test_an_object_store_as_source_and_output(tasks):
    try:
        for split in ("train", "test"):
            for number in range(3):
                data = encoded(picture(number + 10 * (split == "test")))
                files.write_bytes(f"memory://test-ingest/corpus/nut/{split}/good/{number}.png", data)
        files.write_bytes("memory://test-ingest/corpus/nut/train/good/empty.png", b"")
        given = IngestOptions(
            "mvtec", "memory://test-ingest/corpus", "memory://test-ingest/shards", max_reject_fraction=0.5
        )
        shards = ingest(given).shards
        for row in shards.table().to_pylist():
            assert row["uri"].startswith("memory://")
            assert row["image"] == files.read_bytes(row["uri"])
        assert shards.count(Selection()) == 6
        assert shards.rejected().num_rows == 1
        assert not ingest(given).fresh
    finally:
        files.remove("memory://test-ingest")


def test_a_layout_that_crops(tmp_path, tasks):
    """MVTec 3D-AD's crops of 256 pixels, of images too small for one and of whole ones."""
    root = tmp_path / "corpus" / "dowel"
    mask = np.zeros((300, 280), np.uint8)
    mask[:30, 100:150] = 255
    for number, place in enumerate(("train/good", "validation/good", "test/good", "test/cut")):
        write(root / place / "rgb" / "000.png", encoded(picture(number, 300, 280)))
    write(root / "test/cut/gt/000.png", encoded(mask))
    write(root / "train/good/rgb/001.png", encoded(picture(9, 255, 280)))
    given = options(tmp_path / "corpus", tmp_path, layout="mvtec3d", max_reject_fraction=0.5)
    shards = ingest(given).shards
    (rejected,) = shards.rejected().to_pylist()
    assert (rejected["sample_id"], rejected["status"]) == ("mvtec3d/dowel/train/good/rgb/001.png", "unsupported")
    rows = {row["split"] + "/" + row["defect"]: row for row in shards.table().to_pylist()}
    assert sorted(rows) == ["test/cut", "test/good", "train/good", "val/good"]
    for number, name in enumerate(("train/good", "val/good", "test/good", "test/cut")):
        cropped = decode_image(rows[name]["image"]).pixels
        np.testing.assert_array_equal(cropped, picture(number, 300, 280)[22:278, 12:268])
    np.testing.assert_array_equal(decode_mask(rows["test/cut"]["mask"]), mask[22:278, 12:268])
    whole = dataclasses.replace(given, layout_options={"crop": False}, output=str(tmp_path / "whole"))
    assert set(ingest(whole).shards.table().column("width").to_pylist()) == {280}
    with pytest.raises(DataError, match="a shard set of another run"):
        ingest(dataclasses.replace(whole, output=given.output))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "mvtek"}, r"no layout 'mvtek'; did you mean 'mvtec'\?"),
        ({"layout_options": {"datset": "x"}}, "datset.*dataset"),
    ],
)
def test_wrong_layouts(corpus, tmp_path, tasks, changes, words):
    with pytest.raises(OptionError, match=words):
        ingest(options(corpus, tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"part_bytes": 0},
        {"min_parts": 0},
        {"max_reject_fraction": 1.1},
        {"max_reject_fraction": -0.1},
        {"resize": 8},
    ],
)
def test_wrong_options(corpus, tmp_path, changes):
    with pytest.raises(OptionError):
        options(corpus, tmp_path, **changes)


# ---- what to know of the data -------------------------------------------------------------------------------------


def row(name, split, label, sha256, height=10, width=20):
    facts = {"sample_id": name, "split": split, "label": label, "sha256": sha256, "height": height, "width": width}
    return {**facts, "dataset": "set", "category": "nut", "defect": None}


def found_in(table, records, batch=4):
    with temporary_database() as database:
        findings = SetFindings(database)
        for record in records:
            findings.add_record({"rejected": [], **record})
        for start in range(0, len(table), batch):
            findings.add_rows(pa.RecordBatch.from_pylist(table[start : start + batch]))
        return findings.summary()


def test_the_summary_by_hand():
    table = [
        row("a", "train", 0, "x"),
        row("b", "train", 0, "x"),
        row("c", "train", 0, "y", height=30),
        row("d", "test", 0, "y", width=5),
        row("e", "test", 1, "z"),
        row("f", "test", 0, "z"),
        row("g", "val", None, "w", 7, 9),
    ]
    no_masks = {problem: [] for problem in ("missing", "wrong_size", "unreadable", "empty")}
    records = [
        {"masks": {**no_masks, "empty": ["e", "b"]}},
        {"masks": {**no_masks, "empty": ["a"], "missing": [str(number) for number in range(20)]}},
    ]
    summary = found_in(table, records)
    assert summary["height"] == [7, 30]
    assert summary["width"] == [5, 20]
    assert summary["distinct_sizes"] == 4
    assert summary["duplicates"] == {"groups": 3, "examples": [["a", "b"], ["c", "d"], ["e", "f"]]}
    assert summary["duplicates_across_splits"] == {"groups": 1, "examples": [["c", "d"]]}
    assert summary["duplicates_with_other_label"] == {"groups": 1, "examples": [["e", "f"]]}
    assert summary["masks"]["empty"] == {"count": 3, "examples": ["a", "b", "e"]}
    assert summary["masks"]["missing"]["count"] == 20
    assert len(summary["masks"]["missing"]["examples"]) == 10
    assert summary["masks"]["wrong_size"] == {"count": 0, "examples": []}


def test_a_test_image_that_is_also_a_training_image_is_found(corpus, tmp_path, tasks):
    shutil.copy(corpus / "nut/train/good/003.png", corpus / "nut/test/good/100.png")
    shutil.copy(corpus / "nut/train/good/004.png", corpus / "bolt/train/good/100.png")
    summary = ingest(options(corpus, tmp_path)).shards.manifest["summary"]
    assert summary["duplicates"]["groups"] == 2
    assert summary["duplicates_across_splits"]["groups"] == 1
    assert sorted(summary["duplicates_across_splits"]["examples"][0]) == [
        "mvtec/nut/test/good/100.png",
        "mvtec/nut/train/good/003.png",
    ]
    assert summary["duplicates_with_other_label"]["groups"] == 0


def test_a_store_that_refuses_fails_the_job_instead_of_rejecting_every_image(monkeypatch, naps):
    flaky(monkeypatch, PermissionError("Forbidden"))
    with pytest.raises(DataError, match="renew the credentials"):
        read_image_file("memory://bucket/a.png")


def test_contaminating_moves_a_share_of_each_categorys_anomalies_into_training():
    refs = [
        ref(f"{category}/{number}.png", category=category, uri="/x") for category in ("a", "b") for number in range(4)
    ]
    refs += [
        ref(f"{category}/bad{number}.png", category=category, split="test", label=1, defect="dent", mask_uri="/m")
        for category, count in (("a", 10), ("b", 4))
        for number in range(count)
    ]
    found = contaminated(refs, 0.3, seed=0)
    moved = [one for one, before in zip(found, refs, strict=True) if one != before]
    assert [sum(one.category == name for one in moved) for name in ("a", "b")] == [3, 1]
    assert {(one.split, one.label, one.defect, one.mask_uri) for one in moved} == {("train", 0, "dent", None)}
    assert [one.sample_id for one in found] == [one.sample_id for one in refs]
    assert contaminated(list(reversed(refs)), 0.3, seed=0) == list(reversed(found))
    assert contaminated(refs, 0.3, seed=1) != found
    with pytest.raises(DataError, match="no category has two of them"):
        contaminated(refs[:8], 0.3, seed=0)
    with pytest.raises(OptionError, match="contaminate=1"):
        IngestOptions("mtd", "/a", "/b", contaminate=1.0)


# ---- masks and images as people have them ---------------------------------------------------------------------------


def defect_mask(height=40, width=40):
    mask = np.zeros((height, width), np.uint8)
    mask[5:15, 8:28] = 255
    return mask


def masked_ref(tmp_path, name, mask, image=None, **changes):
    """An anomalous sample whose mask is saved as PNG, or is the encoded file."""
    data = mask if isinstance(mask, bytes) else encoded(mask)
    return ref(
        name,
        uri=write(tmp_path / f"{name}.png", encoded(picture(1, 40, 40)) if image is None else image),
        mask_uri=write(tmp_path / f"{name}_mask.png", data),
        label=1,
        **changes,
    )


def stored_masks(rows):
    return {row["sample_id"].removeprefix("set/"): decode_mask(row["mask"]) for row in rows}


def test_doubtful_masks_are_told(tmp_path):
    mask = defect_mask()
    refs = [
        masked_ref(tmp_path, "plain", mask),
        masked_ref(tmp_path, "inverted", 255 - mask),
        masked_ref(tmp_path, "jpeg", encoded(mask, "JPEG", quality=60)),
    ]
    rows, _, record = run_part(tmp_path / "out", refs)
    assert record["mask_doubts"] == {"nearly_full": ["set/inverted"], "read_at_half": ["set/jpeg"]}
    found = stored_masks(rows)
    np.testing.assert_array_equal(found["jpeg"], mask)
    np.testing.assert_array_equal(found["inverted"], 255 - mask)
    rows, _, record = run_part(tmp_path / "inverted", refs[1:2], invert_masks=True)
    np.testing.assert_array_equal(stored_masks(rows)["inverted"], mask)
    assert "mask_doubts" not in record
    rows, _, _ = run_part(tmp_path / "all", refs[2:], mask_threshold=0)
    assert (stored_masks(rows)["jpeg"] > 0).sum() > 250  # of 200
    rows, _, _ = run_part(tmp_path / "explicit", [dataclasses.replace(refs[2], mask_threshold=0)])
    assert (stored_masks(rows)["jpeg"] > 0).sum() > 250


@pytest.mark.parametrize("value", range(1, 9))
def test_masks_of_images_that_exif_turns(tmp_path, value):
    """Stored pixels are turned for show; a mask may have been drawn on either."""
    exif = Image.Exif()
    exif[0x0112] = value
    shown = {}
    for name, (height, width) in {"square": (40, 40), "wide": (30, 50)}.items():
        image = encoded(picture(3, height, width), "PNG", exif=exif)
        stored = np.zeros((height, width), np.uint8)
        stored[3:9, 4:20] = 255
        with Image.open(io.BytesIO(encoded(stored, exif=exif))) as opened:
            upright = np.asarray(ImageOps.exif_transpose(opened))
        refs = [
            masked_ref(tmp_path, f"{name}_stored", stored, image),
            masked_ref(tmp_path, f"{name}_shown", upright, image),
            masked_ref(tmp_path, f"{name}_own", encoded(stored, exif=exif), image),
        ]
        for how in ("auto", "shown", "stored"):
            rows, _, record = run_part(tmp_path / f"{name}{how}", refs, mask_orientation=how)
            found = {row["sample_id"].split("_")[1]: row["mask"] for row in rows}
            shown[name, how] = (
                {key: None if data is None else np.array_equal(decode_mask(data), upright)
                 for key, data in found.items()},
                record.get("mask_doubts", {}),
                record["masks"]["wrong_size"],
            )  # fmt: skip
    right = {"stored": True, "shown": True, "own": True}
    if value == 1:
        assert all(found == (right, {}, []) for found in shown.values())
        return
    tells = value >= 5
    assert shown["square", "stored"][0] | {"shown": None} == right | {"shown": None}
    assert shown["square", "shown"] == ({**right, "stored": False}, {}, [])
    doubted = {"maybe_unturned": ["set/square_stored", "set/square_shown"]}
    assert shown["square", "auto"] == ({**right, "stored": False}, doubted, [])
    if tells:
        assert shown["wide", "auto"] == (right, {"turned": ["set/wide_stored"]}, [])
        assert shown["wide", "shown"] == ({**right, "stored": None}, {}, ["set/wide_stored"])
        assert shown["wide", "stored"] == ({**right, "shown": None}, {}, ["set/wide_shown"])
    else:
        assert shown["wide", "auto"][1] == {"maybe_unturned": ["set/wide_stored", "set/wide_shown"]}


def test_several_masks_of_an_image_are_united(tmp_path):
    one, other = np.zeros((2, 40, 40), np.uint8)
    one[2:9, 3:8], other[20:30, 8:33] = 255, 3
    more = (write(tmp_path / "more.png", encoded(other)),)
    rows, _, record = run_part(tmp_path / "out", [masked_ref(tmp_path, "a", one, more_masks=more)])
    np.testing.assert_array_equal(stored_masks(rows)["a"] > 0, (one > 0) | (other > 0))
    assert not any(record["masks"].values())
    gone = [masked_ref(tmp_path, "a", one, more_masks=(str(tmp_path / "nowhere.png"),))]
    assert run_part(tmp_path / "gone", gone)[2]["masks"]["missing"] == ["set/a"]


def test_thin_defects_survive_reduction_and_crop(tmp_path):
    mask = np.zeros((1024, 1024), np.uint8)
    mask[400:402, 200:800] = 255
    image = encoded(np.full((1024, 1024, 3), 90, np.uint8))
    refs = [
        masked_ref(tmp_path, "reduced", mask, image),
        masked_ref(tmp_path, "cropped", mask, image, crop=Crop("fundus", 256, margin=0)),
    ]
    reduced, cropped = run_part(tmp_path / "out", refs, resize=256)[0]
    for row in (reduced, cropped):
        assert (row["height"], row["width"]) == (256, 256)
        expected = np.zeros((256, 256), bool)
        expected[100, 50:200] = True
        np.testing.assert_array_equal(decode_mask(row["mask"]) > 0, expected)


def test_twelve_bits_are_told_and_spread_where_asked(tmp_path):
    values = (np.arange(400).reshape(20, 20) * 4095 // 399).astype(np.uint16)
    deep, plain = encoded(values), encoded(picture(1, 20, 20))
    refs = [
        ref("a", uri=write(tmp_path / "a.png", deep)),
        ref("b", uri=write(tmp_path / "b.png", plain)),
        ref("c", uri=write(tmp_path / "c.png", deep), crop=Crop("centre", 10)),
    ]
    rows, _, record = run_part(tmp_path / "out", refs)
    assert record["deep"] == {"count": 2, "largest": 4095, "example": "set/a"}
    assert rows[0]["image"] == deep
    rows, rejected, record = run_part(tmp_path / "spread", refs, bits=12)
    assert rejected == {}
    assert "deep" not in record
    expected = np.floor(values.astype(float) * 255 / 4095 + 0.5)
    np.testing.assert_allclose(decode_image(rows[0]["image"]).pixels[..., 0], expected, atol=1)
    np.testing.assert_allclose(decode_image(rows[2]["image"]).pixels[..., 0], expected[5:15, 5:15], atol=1)
    assert rows[1]["image"] == plain
    assert rows[0]["sha256"] == hashlib.sha256(deep).hexdigest()
    assert (rows[0]["format"], rows[0]["height"], rows[0]["width"]) == ("PNG", 20, 20)
    assert set(run_part(tmp_path / "fewer", refs, bits=11)[1]) == {"set/a", "set/c"}


def test_an_image_whose_listed_name_is_composed_otherwise_is_read(tmp_path):
    """Names from a list made on another system; two colons are part of a name, too."""
    stored = unicodedata.normalize("NFD", "gerät/é.png")
    write(tmp_path / stored, encoded(picture(1)))
    write(tmp_path / "cam1::12-30.png", encoded(picture(2)))
    refs = [
        ref("composed", uri=str(tmp_path / unicodedata.normalize("NFC", "gerät/é.png"))),
        ref("colons", uri=str(tmp_path / "cam1::12-30.png")),
    ]
    rows, rejected, _ = run_part(tmp_path / "out", refs)
    assert rejected == {}
    assert [row["image"] for row in rows] == [encoded(picture(1)), encoded(picture(2))]


def printed(result, capsys):
    print_summary(result)
    return " ".join(capsys.readouterr().out.split())


def test_the_summary_says_what_was_left_out_and_what_looks_wrong(corpus, tmp_path, tasks, capsys):
    dents = corpus / "nut" / "ground_truth" / "dent"
    with Image.open(dents / "000_mask.png") as mask:
        write(dents / "000_mask.png", encoded(255 - np.asarray(mask)))
    write(dents / "001_mask.png", encoded(np.zeros((9, 9), np.uint8)))
    write(corpus / "bolt" / "train" / "good" / "x.gif", b"GIF89a")
    write(corpus / "bolt" / "train" / "good" / "noending", b"?")
    write(corpus / "bolt" / "spare" / "0.png", encoded(picture(5)))
    (corpus / "bolt" / "train" / "good" / "back").symlink_to("..")
    write(corpus / "bolt" / "train" / "good" / "deep.png", encoded(np.full((12, 16), 1023, np.uint16)))
    result = ingest(options(corpus, tmp_path))
    summary = result.shards.manifest["summary"]
    assert summary["masks"]["nearly_full"] == {"count": 1, "examples": ["mvtec/nut/test/dent/000.png"]}
    assert summary["left_out"] == {
        "files": {
            "": {"count": 1, "example": str(corpus / "bolt/train/good/noending")},
            ".gif": {"count": 1, "example": str(corpus / "bolt/train/good/x.gif")},
        },
        "folders": {"count": 1, "images": 1, "examples": [str(corpus / "bolt/spare")]},
        "links": {"count": 1, "examples": [str(corpus / "bolt/train/good/back")]},
    }
    assert summary["sixteen_bits"] == {"count": 1, "largest": 1023, "example": "mvtec/bolt/train/good/deep.png"}
    text = printed(result, capsys)
    for sentence in (
        "masks that cover nearly all of their image: 1, e.g. mvtec/nut/test/dent/000.png",
        "--invert_masks true",
        "masks that do not have the size of their image and were left out: 1, e.g. mvtec/nut/test/dent/001.png",
        "files ending in .gif: 1, e.g.",
        "files without an ending: 1, e.g.",
        "images in folders that the layout has no use for: at least 1 in 1, e.g.",
        "links to a folder that they lie in: 1, e.g.",
        "images of 16 bits a sample without a value above 1,023: 1, e.g. mvtec/bolt/train/good/deep.png",
        "--bits 10",
    ):
        assert sentence in text


def test_the_manifest_of_a_set_without_oddities_is_what_it_was(corpus, tmp_path, tasks):
    """Its checksum names the data to scores and models; nothing is added where there is nothing to tell."""
    manifest = ingest(options(corpus, tmp_path)).shards.manifest
    assert set(manifest["summary"]) == {
        *("height", "width", "distinct_sizes", "duplicates", "duplicates_across_splits"),
        *("duplicates_with_other_label", "masks"),
    }
    assert set(manifest["summary"]["masks"]) == {"missing", "wrong_size", "unreadable", "empty"}
    assert "reading" not in manifest


def test_how_files_are_read_is_part_of_the_plan_where_it_is_not_the_default(corpus, tmp_path, tasks):
    ingest(options(corpus, tmp_path))
    assert not ingest(options(corpus, tmp_path, mask_orientation="auto", invert_masks=False, bits=None)).fresh
    for change in ({"invert_masks": True}, {"mask_threshold": 9}, {"mask_orientation": "stored"}, {"bits": 12}):
        with pytest.raises(DataError, match="differing in"):
            ingest(options(corpus, tmp_path, **change))
    digest = digest_of_refs
    plain = [ref("a", size=9, mask_uri="/m")]
    united = [dataclasses.replace(plain[0], more_masks=("/n",))]
    explicit = [dataclasses.replace(plain[0], mask_threshold=0)]
    assert len({digest(plain), digest(united), digest(explicit)}) == 3
    # as it was before a threshold could be left open
    assert digest(plain) == "7c1461a71336d036813f323134600d33c6ff6d2dccdf975f6880130378625a34"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"bits": 8}, "bits=8"), ({"bits": 17}, "bits=17"), ({"mask_threshold": 255}, "mask_threshold")],
)
def test_reading_options_that_cannot_be(corpus, tmp_path, change, words):
    with pytest.raises(OptionError, match=words):
        options(corpus, tmp_path, **change)


def test_a_palette_of_red_on_black_whose_first_entry_is_red(tmp_path, tasks):
    """As an editor's indexed colours have it: by its numbers, black would be class 1."""
    mask = np.zeros((64, 64), bool)
    mask[20:30, 30:40] = mask[40:43, 10:13] = True
    indexed = Image.fromarray((~mask).astype(np.uint8))
    indexed.putpalette([220, 20, 20, 0, 0, 0])
    root, buffer = tmp_path / "set", io.BytesIO()
    indexed.save(buffer, "PNG")
    write(root / "masks" / "0.png", buffer.getvalue())
    for place in ("good/0", "good/1", "bad/0"):
        write(root / f"{place}.png", encoded(picture(1, 64, 64)))
    chosen = {"normal": "good", "abnormal": ["bad"], "masks": "masks"}
    shards = ingest(IngestOptions("folder", str(root), str(tmp_path / "out"), chosen)).shards
    (row,) = (row for row in shards.table().to_pylist() if row["label"])
    np.testing.assert_array_equal(decode_mask(row["mask"]) > 0, mask)

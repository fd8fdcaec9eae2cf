"""Every layout on a drawn miniature: which samples it finds, what it knows of them, and what it says when it cannot."""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from unianom.data.layouts import (
    IMAGENET_30,
    LAYOUTS,
    SPECIES_60,
    SPECIES_60_SPLITS,
    LeftOut,
    iter_samples,
    make_options,
)
from unianom.data.layouts.aptos import AptosOptions
from unianom.data.layouts.btad import BtadOptions
from unianom.data.layouts.cifar import CifarOptions
from unianom.data.layouts.class_folders import ClassOptions, choose_task
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100
from unianom.data.layouts.folder import FolderOptions
from unianom.data.layouts.kolektor import KolektorOptions
from unianom.data.layouts.manifest import ManifestOptions
from unianom.data.layouts.merged import MergedOptions
from unianom.data.layouts.mtd import MtdOptions
from unianom.data.layouts.mvtec import MvtecOptions
from unianom.data.layouts.mvtec3d import Mvtec3dOptions
from unianom.data.layouts.oct2017 import Oct2017Options
from unianom.data.layouts.ped2 import Ped2Options
from unianom.data.layouts.polyps import PolypOptions
from unianom.data.layouts.source import MOST_LISTED
from unianom.data.layouts.visa import VisaOptions
from unianom.data.schema import Crop
from unianom.errors import DataError, OptionError

FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}


def picture(path: str, value: int = 90) -> bytes:
    suffix = Path(path).suffix.lower()
    buffer = io.BytesIO()
    Image.new("L", (3, 2), value).save(buffer, FORMATS.get(suffix, "JPEG"))
    return buffer.getvalue()


def draw(root: Path, *paths: str, value: int = 90) -> None:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(path, value))


def facts(samples, root: Path) -> list[tuple]:
    """(sample_id, category, split, label, defect, mask relative to the root) of each sample, checked for the rest."""
    rows = []
    for sample in samples:
        assert sample.uri == f"{root}/{sample.sample_id.split('/', 1)[1]}"
        assert sample.size is None or sample.size == Path(sample.uri).stat().st_size
        mask = None if sample.mask_uri is None else str(Path(sample.mask_uri).relative_to(root))
        rows.append((sample.sample_id, sample.category, sample.split, sample.label, sample.defect, mask))
    assert len({row[0] for row in rows}) == len(rows)
    return rows


def fails(error, sentence: str, layout: str, root, options=None) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        list(iter_samples(layout, root, options))


# --- MVTec AD ---------------------------------------------------------------------------------------------------------


def draw_mvtec(root: Path) -> None:
    draw(root, "bottle/train/good/000.png", "bottle/train/good/001.PNG", "bottle/test/good/000.png")
    draw(root, "bottle/test/broken/000.png", "bottle/test/broken/001.png", "bottle/test/broken/002.png")
    draw(root, "bottle/ground_truth/broken/000_mask.png", "bottle/ground_truth/broken/002_mask.png", value=255)
    draw(root, "wood/train/good/000.jpg", "wood/test/scratch/000.jpg", "wood/ground_truth/scratch/000.png")
    draw(root, "bottle/train/good/._000.png", "bottle/train/good/.hidden/1.png", "__MACOSX/bottle/train/good/1.png")
    (root / "license.txt").write_text("…")
    (root / "bottle/train/good/Thumbs.db").write_text("…")
    (root / "bottle/train/good/readme.txt").write_text("…")


BOTTLE = [
    ("mvtec/bottle/train/good/000.png", "bottle", "train", 0, "good", None),
    ("mvtec/bottle/train/good/001.PNG", "bottle", "train", 0, "good", None),
    ("mvtec/bottle/test/broken/000.png", "bottle", "test", 1, "broken", "bottle/ground_truth/broken/000_mask.png"),
    ("mvtec/bottle/test/broken/001.png", "bottle", "test", 1, "broken", None),
    ("mvtec/bottle/test/broken/002.png", "bottle", "test", 1, "broken", "bottle/ground_truth/broken/002_mask.png"),
    ("mvtec/bottle/test/good/000.png", "bottle", "test", 0, "good", None),
]
WOOD = [
    ("mvtec/wood/train/good/000.jpg", "wood", "train", 0, "good", None),
    ("mvtec/wood/test/scratch/000.jpg", "wood", "test", 1, "scratch", "wood/ground_truth/scratch/000.png"),
]


def test_mvtec(tmp_path):
    draw_mvtec(tmp_path)
    assert facts(iter_samples("mvtec", tmp_path), tmp_path) == BOTTLE + WOOD
    assert facts(iter_samples("mvtec", tmp_path, MvtecOptions(categories=("wood",))), tmp_path) == WOOD
    # One category read alone has the same names as within the whole set.
    assert facts(iter_samples("mvtec", f"{tmp_path}/bottle/"), tmp_path) == BOTTLE
    samples = iter_samples("mvtec", tmp_path, MvtecOptions(dataset="factory"))
    assert {sample.dataset for sample in samples} == {"factory"}


def test_mvtec_merged(tmp_path):
    draw(
        tmp_path, "train/pipe_good/0.png", "train/pipe_fryum_good/0.png", "test/pipe_good/0.png", "test/pipe_cut/0.png"
    )
    draw(tmp_path, "test/pipe_fryum_good/0.png", "test/pipe_fryum_a_b/0.png", "ground_truth/pipe_fryum_a_b/0_mask.png")
    assert facts(iter_samples("mvtec", tmp_path), tmp_path) == [
        ("mvtec/train/pipe_fryum_good/0.png", "pipe_fryum", "train", 0, "good", None),
        (
            "mvtec/test/pipe_fryum_a_b/0.png",
            "pipe_fryum",
            "test",
            1,
            "a_b",
            "ground_truth/pipe_fryum_a_b/0_mask.png",
        ),
        ("mvtec/test/pipe_fryum_good/0.png", "pipe_fryum", "test", 0, "good", None),
        ("mvtec/train/pipe_good/0.png", "pipe", "train", 0, "good", None),
        ("mvtec/test/pipe_cut/0.png", "pipe", "test", 1, "cut", None),
        ("mvtec/test/pipe_good/0.png", "pipe", "test", 0, "good", None),
    ]
    draw(tmp_path, "test/cable_bent/0.png")
    fails(DataError, "test/cable_bent belongs to no category of train", "mvtec", tmp_path)


def test_mvtec_half_complete_roots(tmp_path):
    draw_mvtec(tmp_path)
    fails(
        OptionError,
        f"no category 'botle' in {tmp_path} (did you mean 'bottle'?); found: bottle, wood",
        "mvtec",
        tmp_path,
        MvtecOptions(categories=("botle",)),
    )
    draw(tmp_path, "tile/test/good/0.png", "tile/ground_truth/crack/0_mask.png")
    fails(DataError, f"no train/good under {tmp_path}/tile; found: ground_truth/, test/; expected", "mvtec", tmp_path)
    draw(tmp_path, "tile/train/ok/0.png")
    fails(DataError, f"no train/good under {tmp_path}/tile; found in train: ok/; expected", "mvtec", tmp_path)
    (tmp_path / "tile/train/ok").rename(tmp_path / "tile/train/good")
    (tmp_path / "tile/train/good/0.png").rename(tmp_path / "tile/train/good/0.gif")
    fails(DataError, f"no images in {tmp_path}/tile/train/good; found: 0.gif", "mvtec", tmp_path)
    draw(tmp_path, "tile/train/good/0.png", "tile/train/crack/0.png")
    fails(DataError, "tile/train holds crack beside good", "mvtec", tmp_path)
    draw(tmp_path, "empty/wood/readme/0.png")
    fails(DataError, f"no train/good under {tmp_path}/empty/wood", "mvtec", tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    fails(DataError, f"no category folders under {tmp_path}/bare; found: nothing", "mvtec", tmp_path / "bare")
    fails(DataError, f"no folder {tmp_path}/none; check the path", "mvtec", tmp_path / "none")
    fails(DataError, "license.txt is a file; a folder is expected", "mvtec", tmp_path / "license.txt")
    fails(DataError, "chained URIs are not supported", "mvtec", "zip://x::data.zip")


def test_mvtec_masks_that_fit_nothing_or_twice(tmp_path):
    draw(tmp_path, "a/train/good/0.png", "a/test/cut/000.png", "a/ground_truth/cut/mask000.png")
    fails(DataError, "no mask in", "mvtec", tmp_path)
    draw(tmp_path, "a/ground_truth/cut/000.png", "a/ground_truth/cut/000_mask.bmp")
    fails(DataError, "two masks for '000'", "mvtec", tmp_path)


def test_a_folder_named_like_an_image_is_a_sample_for_ingest_to_reject(tmp_path):
    draw(tmp_path, "a/train/good/0.png", "a/train/good/1.jpg/inside.png", "a/test/good/0.png")
    first, second, third = iter_samples("mvtec", tmp_path)
    assert (second.sample_id, second.size) == ("mvtec/a/train/good/1.jpg", None)
    assert [first.uri, third.uri] == [f"{tmp_path}/a/train/good/0.png", f"{tmp_path}/a/test/good/0.png"]


def test_linked_folders_and_files_are_followed(tmp_path):
    draw(tmp_path, "store/x/train/good/0.png", "store/x/test/good/0.png", "set/y/train/good/0.png")
    (tmp_path / "set/x").symlink_to(tmp_path / "store/x", target_is_directory=True)
    (tmp_path / "set/y/test").symlink_to(tmp_path / "store/x/test", target_is_directory=True)
    (tmp_path / "set/y/train/good/1.png").symlink_to(tmp_path / "store/x/train/good/0.png")
    (tmp_path / "set/y/train/good/2.png").symlink_to(tmp_path / "nowhere.png")
    samples = list(iter_samples("mvtec", tmp_path / "set"))
    assert [sample.sample_id.removeprefix("mvtec/") for sample in samples] == [
        *("x/train/good/0.png", "x/test/good/0.png"),
        *("y/train/good/0.png", "y/train/good/1.png", "y/train/good/2.png", "y/test/good/0.png"),
    ]
    assert samples[3].size == samples[0].size


def test_names_that_are_not_utf8(tmp_path):
    draw(tmp_path, "a/train/good/0.png", "a/test/good/ö.png")
    assert [sample.sample_id for sample in iter_samples("mvtec", tmp_path)][1] == "mvtec/a/test/good/ö.png"
    (tmp_path / "a/train/good/0.png").rename(tmp_path / "a/train/good/\udcff.png")
    fails(DataError, "is not valid UTF-8; rename the file", "mvtec", tmp_path)


def test_object_store(tmp_path):
    """The same samples through an fsspec URI, with URIs for paths."""
    draw_mvtec(tmp_path)
    fs = fsspec.filesystem("memory")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"/bucket/mvtec/{file.relative_to(tmp_path)}", file.read_bytes())
    try:
        for root, expected in (("memory://bucket/mvtec/", BOTTLE + WOOD), ("memory://bucket/mvtec/bottle", BOTTLE)):
            samples = list(iter_samples("mvtec", root))
            assert [sample.sample_id for sample in samples] == [row[0] for row in expected]
            prefix = "memory:///bucket/mvtec/"
            assert [sample.uri for sample in samples] == [row[0].replace("mvtec/", prefix, 1) for row in expected]
            assert [sample.mask_uri for sample in samples] == [row[5] and prefix + row[5] for row in expected]
            assert all(fs.cat_file(sample.uri) for sample in samples)
            assert samples[0].size == fs.size(samples[0].uri)
        fails(DataError, "no folder memory:///bucket/none", "mvtec", "memory://bucket/none")
    finally:
        fs.rm("/bucket", recursive=True)


# --- VisA -------------------------------------------------------------------------------------------------------------


def draw_visa(root: Path) -> list[str]:
    rows = ["object,split,label,image,mask"]
    for name in ("pcb1", "candle"):
        images, masks = f"{name}/Data/Images", f"{name}/Data/Masks/Anomaly"
        draw(root, f"{images}/Normal/0000.JPG", f"{images}/Normal/0001.JPG", f"{images}/Anomaly/000.JPG")
        draw(root, f"{masks}/000.png", value=2)
        rows += [
            f"{name},test,anomaly,{images}/Anomaly/000.JPG,{masks}/000.png",
            f"{name},train,normal,{images}/Normal/0001.JPG,",
            f"{name},test,normal,{images}/Normal/0000.JPG,",
        ]
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv/1cls.csv").write_text("\n".join(rows))
    return rows


def test_visa_raw(tmp_path):
    rows = draw_visa(tmp_path)
    images = "candle/Data/Images"
    candle = [
        (f"visa/{images}/Normal/0001.JPG", "candle", "train", 0, "good", None),
        (f"visa/{images}/Anomaly/000.JPG", "candle", "test", 1, "anomaly", "candle/Data/Masks/Anomaly/000.png"),
        (f"visa/{images}/Normal/0000.JPG", "candle", "test", 0, "good", None),
    ]
    found = facts(iter_samples("visa", tmp_path), tmp_path)
    assert found[:3] == candle
    assert [row[1] for row in found[3:]] == ["pcb1"] * 3
    assert facts(iter_samples("visa", tmp_path, VisaOptions(categories=("candle",))), tmp_path) == candle
    # A supervised split has anomalies in its training split.
    (tmp_path / "few.csv").write_text("\n".join(rows).replace("test,anomaly", "train,anomaly"))
    few = list(iter_samples("visa", tmp_path, VisaOptions(split_csv="few.csv")))
    assert Counter((sample.split, sample.label) for sample in few) == {("train", 1): 2, ("train", 0): 2, ("test", 0): 2}
    # A missing image stays a sample, without a size, for ingest to reject; a missing folder is a wrong root.
    (tmp_path / images / "Anomaly/000.JPG").unlink()
    sizes = {sample.sample_id: sample.size for sample in iter_samples("visa", tmp_path)}
    assert [name for name, size in sizes.items() if size is None] == [f"visa/{images}/Anomaly/000.JPG"]
    (tmp_path / images / "Anomaly").rename(tmp_path / "elsewhere")
    fails(DataError, f"no folder {tmp_path}/{images}/Anomaly", "visa", tmp_path)


@pytest.mark.parametrize("folder", ["", "1cls", "VisA_pytorch/1cls"])
def test_visa_prepared(tmp_path, folder):
    root = tmp_path / folder
    draw(root, "candle/train/good/0.JPG", "candle/test/good/1.JPG", "candle/test/bad/000.JPG")
    draw(root, "candle/ground_truth/bad/000.png", value=255)
    assert facts(iter_samples("visa", tmp_path), root) == [
        ("visa/candle/train/good/0.JPG", "candle", "train", 0, "good", None),
        ("visa/candle/test/bad/000.JPG", "candle", "test", 1, "bad", "candle/ground_truth/bad/000.png"),
        ("visa/candle/test/good/1.JPG", "candle", "test", 0, "good", None),
    ]


def test_visa_wrong_roots(tmp_path):
    draw(tmp_path, "candle/Data/Images/Normal/0.JPG")
    fails(
        DataError,
        f"no visa data set in {tmp_path}: neither the raw form with its split file split_csv/1cls.csv nor the prepared "
        "form with <category>/train/good, directly or in 1cls or VisA_pytorch/1cls; found: candle/",
        "visa",
        tmp_path,
    )
    rows = draw_visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    for broken, sentence in (
        (rows[1:], "lacks the column object, split, label, image, mask"),
        (rows[:1], "has a header but no rows"),
        ([*rows, rows[3]], "line 8 of"),
        ([*rows, "pcb1,train,good,a.JPG,"], "is not a row of object"),
        (
            [row for row in rows if not row.startswith("pcb1,train")],
            "no row of 'pcb1' with split train and label normal",
        ),
    ):
        table.write_text("\n".join(broken))
        fails(DataError, sentence, "visa", tmp_path)
    with pytest.raises(OptionError, match="must name a CSV file"):
        VisaOptions(split_csv="1cls")


# --- BTAD, MTD, KolektorSDD -------------------------------------------------------------------------------------------


def test_btad(tmp_path):
    draw(tmp_path, "01/train/ok/0.bmp", "01/test/ok/1.bmp", "01/test/ko/0000.bmp", "01/ground_truth/ko/0000.png")
    draw(tmp_path, "03/train/ok/0.bmp", "03/test/ko/0.bmp", "03/ground_truth/ko/0.bmp", "02/train/ok/0.png")
    draw(tmp_path, "02/test/ko/0.png")
    assert facts(iter_samples("btad", tmp_path), tmp_path) == [
        ("btad/01/train/ok/0.bmp", "01", "train", 0, "good", None),
        ("btad/01/test/ko/0000.bmp", "01", "test", 1, "ko", "01/ground_truth/ko/0000.png"),
        ("btad/01/test/ok/1.bmp", "01", "test", 0, "good", None),
        ("btad/02/train/ok/0.png", "02", "train", 0, "good", None),
        ("btad/02/test/ko/0.png", "02", "test", 1, "ko", None),
        ("btad/03/train/ok/0.bmp", "03", "train", 0, "good", None),
        ("btad/03/test/ko/0.bmp", "03", "test", 1, "ko", "03/ground_truth/ko/0.bmp"),
    ]
    fails(OptionError, "no category '04'", "btad", tmp_path, BtadOptions(categories=("04",)))


def draw_mtd(root: Path) -> None:
    for name, count in (("Free", 10), ("Blowhole", 2), ("Break", 1), ("Crack", 1), ("Fray", 1), ("Uneven", 1)):
        for number in range(count):
            draw(root, f"MT_{name}/Imgs/e{number}.jpg", f"MT_{name}/Imgs/e{number}.png")
    draw(root, "dataset.jpg")


def lowest_hashes(paths: list[str], count: int, seed: int = 0) -> list[str]:
    return sorted(paths, key=lambda path: hashlib.sha256(f"{seed}:{path}".encode()).hexdigest())[:count]


def test_mtd(tmp_path):
    draw_mtd(tmp_path)
    free = [f"MT_Free/Imgs/e{number}.jpg" for number in range(10)]
    samples = list(iter_samples("mtd", tmp_path))
    found = facts(samples, tmp_path)
    assert {row for row in found if row[3] == 0} == {
        (f"mtd/{path}", "magnetic_tile", "test" if path in lowest_hashes(free, 2) else "train", 0, "good", None)
        for path in free
    }
    assert {row for row in found if row[3] == 1} == {
        (f"mtd/MT_{name}/Imgs/e{number}.jpg", "magnetic_tile", "test", 1, name.lower(), f"MT_{name}/Imgs/e{number}.png")
        for name, number in (("Blowhole", 0), ("Blowhole", 1), ("Break", 0), ("Crack", 0), ("Fray", 0), ("Uneven", 0))
    }
    assert {sample.mask_threshold for sample in samples if sample.label} == {127}
    half = list(iter_samples("mtd", tmp_path, MtdOptions(train_fraction=0.5, seed=1, dataset="renamed")))
    assert sum(sample.split == "train" for sample in half) == 5
    # The split goes with the files, not with the name given to the set.
    assert [row[2] for row in found] == [s.split for s in iter_samples("mtd", tmp_path, MtdOptions(dataset="other"))]


def test_mtd_half_complete(tmp_path):
    draw_mtd(tmp_path)
    (tmp_path / "MT_Fray").rename(tmp_path / "Fray")
    fails(DataError, f"no MT_Fray/Imgs under {tmp_path}; found: Fray/, MT_Blowhole/", "mtd", tmp_path)
    for bad in ({"train_fraction": 0.0}, {"train_fraction": 1.1}, {"mask_threshold": 255}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            MtdOptions(**bad)


def draw_kolektor(root: Path) -> None:
    for item in range(1, 5):
        for part in range(3):
            draw(root, f"kos{item:02}/Part{part}.jpg")
            draw(root, f"kos{item:02}/Part{part}_label.bmp", value=255 if part == item - 1 else 0)


def test_kolektor(tmp_path):
    draw_kolektor(tmp_path)
    found = facts(iter_samples("kolektor", tmp_path), tmp_path)
    assert len(found) == 12
    cracked = {row for row in found if row[3] == 1}
    assert cracked == {
        (f"kolektor/kos0{n}/Part{n - 1}.jpg", "commutator", "test", 1, "crack", f"kos0{n}/Part{n - 1}_label.bmp")
        for n in (1, 2, 3)
    }
    sides = {}
    for sample_id, _, split, label, defect, mask in found:
        if label == 0:
            assert (defect, mask) == ("good", None)
            sides.setdefault(sample_id.split("/")[1], set()).add(split)
    # Flawless surfaces of one item are on one side; half the items on each.
    assert sorted(map(sorted, sides.values())) == [["test"], ["test"], ["train"], ["train"]]
    by_seed = {
        tuple(sample.split for sample in iter_samples("kolektor", tmp_path, KolektorOptions(seed=seed)))
        for seed in range(6)
    }
    assert len(by_seed) > 1


def test_kolektor_needs_every_mask(tmp_path):
    draw_kolektor(tmp_path)
    mask = tmp_path / "kos02/Part1_label.bmp"
    mask.write_bytes(b"BM damaged")
    fails(DataError, f"mask {mask} cannot be read, so the label is unknown", "kolektor", tmp_path)
    mask.unlink()
    fails(DataError, f"no mask Part1_label beside {tmp_path}/kos02/Part1.jpg", "kolektor", tmp_path)
    fails(DataError, f"no commutator folders in {tmp_path}/kos01; found: Part0.jpg,", "kolektor", tmp_path / "kos01")


# --- MVTec 3D-AD and VAD ---------------------------------------------------------------------------------------------


def draw_mvtec3d(root: Path) -> None:
    for category in ("bagel", "rope"):
        for folder, numbers in (("train/good", (0, 1)), ("validation/good", (0,)), ("test/good", (0,))):
            draw(root, *(f"{category}/{folder}/{kind}/00{n}.png" for n in numbers for kind in ("rgb", "gt")))
            draw(root, *(f"{category}/{folder}/xyz/00{n}.tiff" for n in numbers))
        draw(
            root,
            f"{category}/test/cut/rgb/000.png",
            f"{category}/test/cut/xyz/000.tiff",
            f"{category}/test/cut/gt/000.png",
        )
    (root / "bagel/calibration").mkdir()
    (root / "bagel/calibration/camera_parameters.json").write_text("{}")
    (root / "license.txt").write_text("…")


def test_mvtec3d(tmp_path):
    draw_mvtec3d(tmp_path)
    bagel = [
        ("mvtec3d/bagel/train/good/rgb/000.png", "bagel", "train", 0, "good", None),
        ("mvtec3d/bagel/train/good/rgb/001.png", "bagel", "train", 0, "good", None),
        ("mvtec3d/bagel/validation/good/rgb/000.png", "bagel", "val", 0, "good", None),
        ("mvtec3d/bagel/test/good/rgb/000.png", "bagel", "test", 0, "good", None),
        ("mvtec3d/bagel/test/cut/rgb/000.png", "bagel", "test", 1, "cut", "bagel/test/cut/gt/000.png"),
    ]
    samples = list(iter_samples("mvtec3d", tmp_path))
    assert facts(samples, tmp_path)[:5] == bagel
    assert [sample.category for sample in samples] == ["bagel"] * 5 + ["rope"] * 5
    assert {sample.mask_threshold for sample in samples if sample.label} == {127}
    assert facts(iter_samples("mvtec3d", tmp_path / "bagel"), tmp_path) == bagel
    only = Mvtec3dOptions(categories=("rope",), crop=False, mask_threshold=0)
    whole = list(iter_samples("mvtec3d", tmp_path, only))
    assert {(sample.category, sample.crop) for sample in whole} == {("rope", None)}
    assert {sample.mask_threshold for sample in whole if sample.label} == {0}


def test_mvtec3d_crops(tmp_path):
    """The sides of UniNet's released code, METHODS 1.3; only the images of cookie and rope may be smaller."""
    names = ("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire")
    for name in names:
        draw(tmp_path, *(f"{name}/{folder}/good/rgb/0.png" for folder in ("train", "validation", "test")))
    samples = list(iter_samples("mvtec3d", tmp_path))
    assert len(samples) == 30
    crops = {(sample.category, sample.crop.kind, sample.crop.side, sample.crop.pad) for sample in samples}
    sides = (512, 256, 512, 512, 256, 700, 512, 384, 900, 512)
    assert crops == {(name, "centre", side, name in ("cookie", "rope")) for name, side in zip(names, sides)}


def test_mvtec3d_half_complete(tmp_path):
    draw_mvtec3d(tmp_path)
    mask = tmp_path / "bagel/test/cut/gt/000.png"
    mask.rename(mask.with_name("001.png"))
    fails(
        DataError,
        f"no mask of {tmp_path}/bagel/test/cut/rgb/000.png in {mask.parent}, which should be named 000 or 000_mask; "
        f"found: 001.png",
        "mvtec3d",
        tmp_path,
    )
    mask.parent.rename(tmp_path / "bagel/test/cut/masks")
    fails(DataError, f"no gt under {tmp_path}/bagel/test/cut; found: masks/, rgb/, xyz/", "mvtec3d", tmp_path)
    (tmp_path / "bagel/validation").rename(tmp_path / "bagel/val")
    fails(DataError, f"no validation/good/rgb under {tmp_path}/bagel; found: calibration/", "mvtec3d", tmp_path)
    draw(tmp_path, "rope/train/cut/rgb/0.png")
    rope = Mvtec3dOptions(categories=("rope",))
    fails(DataError, f"{tmp_path}/rope/train holds cut beside good", "mvtec3d", tmp_path, rope)
    (tmp_path / "mvtec/a").mkdir(parents=True)
    draw(tmp_path / "mvtec", "a/train/good/0.png", "a/test/good/0.png")
    fails(
        DataError,
        f"no train/good/rgb under {tmp_path}/mvtec/a; found in train/good: 0.png",
        "mvtec3d",
        tmp_path / "mvtec",
    )
    (tmp_path / "bare").mkdir()
    fails(DataError, f"no category folders under {tmp_path}/bare", "mvtec3d", tmp_path / "bare")
    with pytest.raises(OptionError, match="mask_threshold"):
        Mvtec3dOptions(mask_threshold=255)


def test_vad(tmp_path):
    names = ("train/good/0.png", "train/good/1.png", "train/bad/0.png")
    draw(tmp_path / "vad", *names, *(f"test/{name}/9.png" for name in ("good", "bad", "bad_unseen_defects")))
    (tmp_path / "vad/low_shot_train.json").write_text("{}")
    expected = [
        ("vad/train/good/0.png", "vad", "train", 0, "good", None),
        ("vad/train/good/1.png", "vad", "train", 0, "good", None),
        ("vad/train/bad/0.png", "vad", "train", 1, "bad", None),
        ("vad/test/good/9.png", "vad", "test", 0, "good", None),
        ("vad/test/bad/9.png", "vad", "test", 1, "bad", None),
        ("vad/test/bad_unseen_defects/9.png", "vad", "test", 1, "bad_unseen_defects", None),
    ]
    assert facts(iter_samples("vad", tmp_path / "vad"), tmp_path / "vad") == expected
    assert facts(iter_samples("vad", tmp_path), tmp_path / "vad") == expected
    (tmp_path / "vad/test/bad_unseen_defects").rename(tmp_path / "vad/test/unseen")
    fails(
        DataError,
        f"no test/bad_unseen_defects under {tmp_path}/vad; found in test: bad/, good/, unseen/; expected the vad",
        "vad",
        tmp_path,
    )
    (tmp_path / "vad/test/unseen").rename(tmp_path / "vad/test/bad_unseen_defects")
    (tmp_path / "vad/train/bad/0.png").unlink()
    fails(DataError, f"no images in {tmp_path}/vad/train/bad; found: nothing", "vad", tmp_path)


# --- Medicine: APTOS 2019, OCT2017, ISIC 2018, polyps -----------------------------------------------------------------


def draw_aptos(root: Path) -> dict[str, int]:
    """Twelve normal images among six of other grades, in no order."""
    grades = {
        f"{number * 7919 % 1000:03x}": grade for number, grade in enumerate((0, 2, 0, 1, 0, 3, 0, 4, 0, 2, *[0] * 7, 1))
    }
    draw(root, *(f"train_images/{name}.png" for name in grades), "test_images/fff.png")
    (root / "train.csv").write_text(
        "id_code,diagnosis\n" + "".join(f"{name},{grade}\n" for name, grade in grades.items())
    )
    return grades


def test_aptos(tmp_path):
    grades = draw_aptos(tmp_path)
    samples = list(iter_samples("aptos", tmp_path, AptosOptions(train_normals=8)))
    # As the published script has it: the normal images in the order of the table, shuffled by the global generator.
    normal = [name for name, grade in grades.items() if grade == 0]
    random.seed(1)
    random.shuffle(normal)
    assert len(normal) == 12
    assert facts(samples, tmp_path) == [
        (
            f"aptos/train_images/{name}.png",
            "aptos",
            "train" if name in normal[:8] else "test",
            min(grade, 1),
            f"grade_{grade}" if grade else "good",
            None,
        )
        for name, grade in grades.items()
    ]
    assert Counter((sample.split, sample.label) for sample in samples) == {
        ("train", 0): 8,
        ("test", 0): 4,
        ("test", 1): 6,
    }
    assert {sample.crop for sample in samples} == {Crop("fundus", 512, threshold=30, margin=5)}
    other = list(iter_samples("aptos", tmp_path, AptosOptions(train_normals=8, seed=2, crop=False)))
    assert {sample.crop for sample in other} == {None}
    assert [sample.split for sample in other] != [sample.split for sample in samples]
    # An image that is not there does not change what is drawn, and is left for ingest to reject.
    (tmp_path / f"train_images/{normal[0]}.png").unlink()
    again = list(iter_samples("aptos", tmp_path, AptosOptions(train_normals=8)))
    assert [sample.split for sample in again] == [sample.split for sample in samples]
    assert [sample.sample_id for sample in again if sample.size is None] == [f"aptos/train_images/{normal[0]}.png"]


def test_aptos_wrong(tmp_path):
    fails(DataError, f"no train.csv in {tmp_path}; found: nothing; expected the aptos layout", "aptos", tmp_path)
    draw_aptos(tmp_path)
    table = tmp_path / "train.csv"
    fails(OptionError, f"train_normals=1000 leaves none of the 12 normal images of {table}", "aptos", tmp_path)
    fails(OptionError, "train_normals=12 leaves none", "aptos", tmp_path, AptosOptions(train_normals=12))
    for text, sentence in (
        ("id_code,grade\na,0\n", f"{table} lacks the column diagnosis; its header should be id_code,diagnosis"),
        ("id_code,diagnosis\n", f"{table} has a header but no rows"),
        ("id_code,diagnosis\na,0\na,1\n", f"line 3 of {table} names a a second time"),
        ("id_code,diagnosis\na,5\n", f"line 2 of {table} is not a row of id_code and diagnosis (0…4)"),
        ("id_code,diagnosis\na\n", f"line 2 of {table} is not a row"),
        ("id_code,diagnosis\nö,0\n".encode("latin-1"), f"{table} is not UTF-8 text"),
    ):
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        fails(DataError, sentence, "aptos", tmp_path)
    (tmp_path / "train_images").rename(tmp_path / "images")
    fails(DataError, f"no train_images under {tmp_path}; found: images/", "aptos", tmp_path)
    with pytest.raises(OptionError, match="train_normals=0 must be at least 1"):
        AptosOptions(train_normals=0)


def test_oct2017(tmp_path):
    draw(tmp_path, *(f"train/{name}/{n}.jpeg" for name in ("CNV", "NORMAL") for n in range(2)))
    draw(tmp_path, *(f"test/{name}/9.jpeg" for name in ("CNV", "DME", "DRUSEN", "NORMAL")))
    tested = [
        ("oct2017/test/CNV/9.jpeg", "oct2017", "test", 1, "CNV", None),
        ("oct2017/test/DME/9.jpeg", "oct2017", "test", 1, "DME", None),
        ("oct2017/test/DRUSEN/9.jpeg", "oct2017", "test", 1, "DRUSEN", None),
        ("oct2017/test/NORMAL/9.jpeg", "oct2017", "test", 0, "good", None),
    ]
    normal = [(f"oct2017/train/NORMAL/{n}.jpeg", "oct2017", "train", 0, "good", None) for n in range(2)]
    diseased = [(f"oct2017/train/CNV/{n}.jpeg", "oct2017", "train", 1, "CNV", None) for n in range(2)]
    assert facts(iter_samples("oct2017", tmp_path), tmp_path) == normal + tested
    keep = Oct2017Options(abnormal_train="keep")
    assert facts(iter_samples("oct2017", tmp_path, keep), tmp_path) == diseased + normal + tested
    draw(tmp_path, "val/NORMAL/5.jpeg", "val/DME/5.jpeg")
    held = [sample for sample in iter_samples("oct2017", tmp_path) if sample.split == "val"]
    assert [(sample.label, sample.defect) for sample in held] == [(1, "DME"), (0, "good")]


def test_oct2017_wrong(tmp_path):
    draw(tmp_path, "train/CNV/0.jpeg", "test/NORMAL/0.jpeg")
    fails(DataError, f"no train/NORMAL under {tmp_path}; found in train: CNV/", "oct2017", tmp_path)
    draw(tmp_path, "train/NORMAL/0.jpeg")
    fails(DataError, f"only NORMAL in {tmp_path}/test; expected the oct2017 layout", "oct2017", tmp_path)
    (tmp_path / "test/DME").mkdir()
    fails(DataError, f"no images in {tmp_path}/test/DME; found: nothing", "oct2017", tmp_path)


def draw_isic(root: Path) -> None:
    prefix = "ISIC2018_Task3_"
    classes = {"Training": {"a": "NV", "b": "MEL", "c": "NV"}, "Validation": {"d": "VASC", "e": "NV", "f": "MEL"}}
    # The columns lie in another order than that of the published files: names count.
    columns = ("VASC", "MEL", "BCC", "AKIEC", "NV", "BKL", "DF")
    for part, rows in classes.items():
        draw(root, *(f"{prefix}{part}_Input/{name}.jpg" for name in rows))
        (root / f"{prefix}{part}_Input/LICENSE.txt").write_text("…")
        lines = [",".join([name, *(f"{float(column == given)}" for column in columns)]) for name, given in rows.items()]
        folder = root / f"{prefix}{part}_GroundTruth"
        folder.mkdir()
        (folder / f"{folder.name}.csv").write_text("\n".join([",".join(["image", *columns]), *lines]))


def test_isic2018(tmp_path):
    draw_isic(tmp_path)
    training, validation = (f"isic2018/ISIC2018_Task3_{part}_Input" for part in ("Training", "Validation"))
    expected = [
        (f"{training}/a.jpg", "isic2018", "train", 0, "good", None),
        (f"{training}/c.jpg", "isic2018", "train", 0, "good", None),
        (f"{validation}/d.jpg", "isic2018", "test", 1, "VASC", None),
        (f"{validation}/e.jpg", "isic2018", "test", 0, "good", None),
        (f"{validation}/f.jpg", "isic2018", "test", 1, "MEL", None),
    ]
    assert facts(iter_samples("isic2018", tmp_path), tmp_path) == expected
    (tmp_path / "ISIC2018_Task3_Validation_Input/f.jpg").unlink()
    found = list(iter_samples("isic2018", tmp_path))
    assert [sample.size is None for sample in found] == [False] * 4 + [True]


def test_isic2018_wrong(tmp_path):
    draw_isic(tmp_path)
    folder = tmp_path / "ISIC2018_Task3_Validation_GroundTruth"
    table = folder / f"{folder.name}.csv"
    header = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    for text, sentence in (
        ("image,MEL,NV\n", f"{table} lacks the column BCC, AKIEC, BKL, DF, VASC"),
        (header + "d,1,1,0,0,0,0,0\n", f"line 2 of {table} is not an image with a 1 in one of the columns"),
        (header + "d,0,0,0,0,0,0,0\n", "is not an image with a 1"),
        (header + "d,0,1\n", "is not an image with a 1"),
        (header + "d,1,0,0,0,0,0,0\n", f"no row of class NV in {folder}"),
    ):
        table.write_text(text)
        fails(DataError, sentence, "isic2018", tmp_path)
    (folder / "second.csv").write_text(header)
    fails(DataError, f"{folder} should hold one CSV file, {folder.name}.csv, but holds 2", "isic2018", tmp_path)
    folder.rename(tmp_path / "elsewhere")
    fails(
        DataError,
        f"no {folder.name} under {tmp_path}; found: ISIC2018_Task3_Training_GroundTruth/",
        "isic2018",
        tmp_path,
    )


def test_polyps_divided(tmp_path):
    for name in ("CVC-ColonDB", "Kvasir"):
        draw(tmp_path / name, *(f"train/{kind}/{n}.png" for kind in ("images", "masks") for n in range(2)))
        draw(tmp_path / name, "test/images/9.jpg", "test/masks/9.jpg")
    samples = list(iter_samples("polyps", tmp_path))
    kvasir = [
        ("polyps/Kvasir/train/images/0.png", "Kvasir", "train", 1, "polyp", "Kvasir/train/masks/0.png"),
        ("polyps/Kvasir/train/images/1.png", "Kvasir", "train", 1, "polyp", "Kvasir/train/masks/1.png"),
        ("polyps/Kvasir/test/images/9.jpg", "Kvasir", "test", 1, "polyp", "Kvasir/test/masks/9.jpg"),
    ]
    assert facts(samples, tmp_path)[3:] == kvasir
    assert [sample.category for sample in samples[:3]] == ["CVC-ColonDB"] * 3
    assert {sample.mask_threshold for sample in samples} == {127}
    assert facts(iter_samples("polyps", tmp_path / "Kvasir"), tmp_path) == kvasir
    assert facts(iter_samples("polyps", tmp_path, PolypOptions(categories=("Kvasir",))), tmp_path) == kvasir
    draw(tmp_path, "Kvasir/val/images/5.png", "Kvasir/val/masks/5.png")
    assert [sample.split for sample in iter_samples("polyps", tmp_path / "Kvasir")] == ["train", "train", "val", "test"]


def draw_polyps(root: Path, images: str, masks: str, count: int, suffix: str = ".tif") -> list[str]:
    """An undivided set of links to two drawn files; gives the names of its images."""
    draw(root.parent, f"drawn{suffix}")
    for folder in (images, masks):
        (root / folder).mkdir(parents=True)
        for number in range(1, count + 1):
            (root / folder / f"{number}{suffix}").symlink_to(root.parent / f"drawn{suffix}")
    return [f"{number}{suffix}" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("Kvasir-SEG", 1000, (900, 0, 100)),
        ("CVC-ClinicDB", 612, (550, 0, 62)),
        ("CVC-ColonDB", 380, (304, 38, 38)),
        ("ETIS", 5, (3, 1, 1)),
    ],
)
def test_polyps_undivided(tmp_path, name, count, sizes):
    names = draw_polyps(tmp_path / name, "images", "masks", count)
    samples = list(iter_samples("polyps", tmp_path / name))
    splits = {Path(sample.uri).name: sample.split for sample in samples}
    assert sorted(splits) == sorted(names)
    assert tuple(Counter(splits.values())[split] for split in ("train", "val", "test")) == sizes
    drawn = lowest_hashes(names, sizes[1] + sizes[2])
    assert {name for name, split in splits.items() if split == "test"} == set(drawn[: sizes[2]])
    assert {name for name, split in splits.items() if split == "val"} == set(drawn[sizes[2] :])
    for sample in samples:
        assert (sample.category, sample.label, sample.defect, sample.mask_threshold) == (name, 1, "polyp", 127)
        assert Path(sample.mask_uri) == tmp_path / name / "masks" / Path(sample.uri).name
    # The split goes with the files, not with the folder that the set lies in.
    draw(tmp_path, "drawn.txt")
    alone = list(iter_samples("polyps", tmp_path, PolypOptions(dataset="other", categories=(name,))))
    assert [sample.split for sample in alone] == [sample.split for sample in samples]


@pytest.mark.parametrize("place", ["", "PNG/", "TIF/"])
def test_polyps_as_clinicdb_is_published(tmp_path, place):
    draw_polyps(tmp_path / "CVC-ClinicDB", f"{place}Original", f"{place}Ground Truth", 10)
    for root in (tmp_path / "CVC-ClinicDB", tmp_path):
        options = PolypOptions(categories=("CVC-ClinicDB",), split=(6, 3, 1), seed=3)
        samples = list(iter_samples("polyps", root, options))
        assert Counter(sample.split for sample in samples) == {"train": 6, "val": 3, "test": 1}
        assert samples[0].sample_id == f"polyps/CVC-ClinicDB/{place}Original/1.tif"
        assert samples[0].mask_uri == f"{tmp_path}/CVC-ClinicDB/{place}Ground Truth/1.tif"
    other = list(iter_samples("polyps", tmp_path, dataclasses.replace(options, seed=4)))
    assert [sample.split for sample in other] != [sample.split for sample in samples]


def test_polyps_wrong(tmp_path):
    (tmp_path / "bare").mkdir()
    fails(DataError, f"no sets under {tmp_path}/bare; found: nothing; expected", "polyps", tmp_path / "bare")
    fails(DataError, f"no images of {tmp_path}/bare; found: nothing; expected the polyps layout", "polyps", tmp_path)
    draw_polyps(tmp_path / "Kvasir", "images", "masks", 4)
    root = tmp_path / "Kvasir"
    fails(DataError, f"{root} has 4 images, which is not 900 + 100; name how to split them", "polyps", root)
    fails(DataError, f"{root} has only 4 images, too few", "polyps", root, PolypOptions(split=(0.1, 0.1, 0.8)))
    (root / "masks/3.tif").unlink()
    fails(DataError, f"no mask of {root}/images/3.tif in {root}/masks", "polyps", root)
    (root / "masks").rename(root / "labels")
    fails(DataError, f"no masks under {root}; found: images/, labels/", "polyps", root)
    (root / "train").mkdir()
    fails(DataError, f"no train/images under {root}; found in train: nothing", "polyps", root)
    for split in ((900,), (0, 1), (1, 0), (2, -1, 3), (1, 2, 3, 4)):
        with pytest.raises(OptionError, match="must be two or three numbers"):
            PolypOptions(split=split)
    for split in ((float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(OptionError, match="must be a list, each a finite number"):
            PolypOptions(split=split)
    for split in ((0.5, 0.6), (2.5, 1)):
        with pytest.raises(OptionError, match="whole numbers of images, or shares that add up to 1"):
            PolypOptions(split=split)
    assert make_options(LAYOUTS["polyps"], {"split": [900, 100]}) == PolypOptions(split=(900, 100))
    assert make_options(LAYOUTS["polyps"], {"split": [0.7, 0.1, 0.2]}).split == (0.7, 0.1, 0.2)


# --- UCSD Ped2 --------------------------------------------------------------------------------------------------------


def draw_frames(root: Path) -> list[str]:
    """Twelve test frames in three clips, the first of which lacks leading zeros as its frames do."""
    draw(root, *(f"training/frames/01/00{n}.jpg" for n in range(2)))
    tested = [f"testing/frames/1/{n}.jpg" for n in (*range(7, 12),)]
    tested += [f"testing/frames/{clip}/00{n}.jpg" for clip, count in (("02", 3), ("10", 4)) for n in range(count)]
    draw(root, *tested)
    return tested


LABELS = [0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1]


def save(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("labels.csv", "\n".join(map(str, LABELS)).encode()),
        ("labels.csv", b"\xef\xbb\xbflabel\r\n" + b"".join(b"%d.0\r\n" % label for label in LABELS)),
        ("labels.npy", save(np.array(LABELS, np.int8))),
        ("frame_labels_ped2.npy", save(np.array([LABELS], np.float64))),
        ("meta/mine.npy", save(np.array(LABELS, bool))),
    ],
)
def test_ped2_frames_with_labels(tmp_path, file, content):
    tested = draw_frames(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / file).write_bytes(content)
    options = Ped2Options(labels=file if "/" in file else "")
    assert facts(iter_samples("ped2", tmp_path, options), tmp_path) == [
        *((f"ped2/training/frames/01/00{n}.jpg", "ped2", "train", 0, "good", None) for n in range(2)),
        *(
            (f"ped2/{path}", "ped2", "test", label, "anomaly" if label else "good", None)
            for path, label in zip(tested, LABELS)
        ),
    ]


def draw_ped2(root: Path) -> None:
    draw(root, "Train/Train001/001.tif", "Train/Train001/002.tif", "Train/Train002/001.tif")
    draw(root, *(f"Test/Test00{clip}/00{n}.tif" for clip in (1, 2) for n in (1, 2)))
    draw(root, "Test/Test001_gt/001.bmp", "Test/Test002_gt/001.bmp", "Test/Test002_gt/002.bmp", value=0)
    draw(root, "Test/Test001_gt/002.bmp", value=255)
    (root / "Test/UCSDped2.m").write_text("…")


def test_ped2_as_published(tmp_path):
    root = tmp_path / "UCSDped2"
    draw_ped2(root)
    expected = [
        ("ped2/Train/Train001/001.tif", "ped2", "train", 0, "good", None),
        ("ped2/Train/Train001/002.tif", "ped2", "train", 0, "good", None),
        ("ped2/Train/Train002/001.tif", "ped2", "train", 0, "good", None),
        ("ped2/Test/Test001/001.tif", "ped2", "test", 0, "good", None),
        ("ped2/Test/Test001/002.tif", "ped2", "test", 1, "anomaly", "Test/Test001_gt/002.bmp"),
        ("ped2/Test/Test002/001.tif", "ped2", "test", 0, "good", None),
        ("ped2/Test/Test002/002.tif", "ped2", "test", 0, "good", None),
    ]
    assert facts(iter_samples("ped2", root), root) == expected
    assert facts(iter_samples("ped2", tmp_path), root) == expected
    # A file of labels outweighs the masks, which stay with the frames that it calls anomalous.
    (tmp_path / "labels.csv").write_text("0\n1\n1\n0\n")
    labelled = facts(iter_samples("ped2", tmp_path), root)[3:]
    assert [(row[3], row[5]) for row in labelled] == [
        (0, None),
        (1, "Test/Test001_gt/002.bmp"),
        (1, "Test/Test002_gt/001.bmp"),
        (0, None),
    ]


def test_ped2_wrong(tmp_path):
    fails(DataError, f"no training/frames under {tmp_path}; found: nothing; expected the ped2 layout", "ped2", tmp_path)
    draw_frames(tmp_path)
    fails(
        DataError,
        f"no labels of {tmp_path}/testing/frames/1: neither one of labels.csv, labels.npy, frame_labels_ped2.npy in "
        f"the root nor a folder of masks testing/frames/1_gt; name a file of labels with the layout's option labels",
        "ped2",
        tmp_path,
    )
    wanted = Ped2Options(labels="mine.npy")
    fails(DataError, f"no file of labels {tmp_path}/mine.npy", "ped2", tmp_path, wanted)
    for name, content, sentence in (
        ("labels.npy", save(np.array(LABELS[:-1])), "labels.npy holds 11 labels, but there are 12 test frames"),
        ("labels.npy", save(np.array([*LABELS[:-1], 2])), "labels.npy holds labels other than 0 (normal) and 1"),
        ("labels.npy", save(np.array([np.nan] * 12)), "holds labels other than 0"),
        ("labels.npy", b"no array", "labels.npy is not a NumPy array of numbers"),
        ("labels.csv", b"0\n1\nx\n", "labels.csv should hold one 0 or 1 a line"),
        ("labels.csv", b"", "labels.csv holds 0 labels"),
    ):
        (tmp_path / name).write_bytes(content)
        fails(DataError, sentence, "ped2", tmp_path)
    with pytest.raises(OptionError, match=r"must name a \.csv or \.npy file"):
        Ped2Options(labels="ped2.mat")
    (tmp_path / "testing/frames").rename(tmp_path / "testing/pictures")
    fails(DataError, f"no testing/frames under {tmp_path}; found in testing: pictures/", "ped2", tmp_path)


def test_ped2_labels_that_are_pickled_are_not_opened(tmp_path):
    draw_frames(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.array([*LABELS[:-1], Trap()], object), allow_pickle=True)
    (tmp_path / "labels.npy").write_bytes(buffer.getvalue())
    fails(DataError, "labels.npy is not a NumPy array of numbers: Object arrays cannot be loaded", "ped2", tmp_path)


class Trap:
    """An object that fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_ped2_needs_every_mask(tmp_path):
    draw_ped2(tmp_path)
    mask = tmp_path / "Test/Test002_gt/001.bmp"
    mask.write_bytes(b"BM damaged")
    fails(DataError, f"mask {mask} cannot be read, so the label is unknown", "ped2", tmp_path)
    mask.unlink()
    fails(DataError, f"no mask of {tmp_path}/Test/Test002/001.tif in {tmp_path}/Test/Test002_gt", "ped2", tmp_path)
    (tmp_path / "Train/Train002/001.tif").unlink()
    fails(DataError, f"no images in {tmp_path}/Train/Train002", "ped2", tmp_path)


# --- Classes: ImageNet-30, Species-60, CIFAR --------------------------------------------------------------------------


def draw_classes(root: Path, train: str = "one_class_train", test: str = "one_class_test") -> None:
    draw(root, *(f"{train}/{name}/{n}.JPEG" for name in ("cat", "ant", "bee") for n in range(2)))
    draw(root, *(f"{test}/{name}/9.JPEG" for name in ("cat", "ant", "bee")))


@pytest.mark.parametrize(("train", "test"), [("one_class_train", "one_class_test"), ("train", "test")])
@pytest.mark.parametrize("normal", ["bee", ("bee",), (1,)])
def test_one_class_is_normal(tmp_path, train, test, normal):
    draw_classes(tmp_path, train, test)
    options = ClassOptions(dataset="zoo", normal_classes=normal)
    assert facts(iter_samples("class_folders", tmp_path, options), tmp_path) == [
        (f"zoo/{train}/bee/0.JPEG", "zoo", "train", 0, "bee", None),
        (f"zoo/{train}/bee/1.JPEG", "zoo", "train", 0, "bee", None),
        (f"zoo/{test}/ant/9.JPEG", "zoo", "test", 1, "ant", None),
        (f"zoo/{test}/bee/9.JPEG", "zoo", "test", 0, "bee", None),
        (f"zoo/{test}/cat/9.JPEG", "zoo", "test", 1, "cat", None),
    ]


def test_several_classes_are_normal_or_none_is_chosen(tmp_path):
    draw_classes(tmp_path)
    many = list(iter_samples("class_folders", tmp_path, ClassOptions(normal_classes=("ant", 2))))
    assert Counter((sample.split, sample.label, sample.defect) for sample in many) == {
        ("train", 0, "ant"): 2,
        ("train", 0, "cat"): 2,
        ("test", 0, "ant"): 1,
        ("test", 1, "bee"): 1,
        ("test", 0, "cat"): 1,
    }
    kept = list(iter_samples("class_folders", tmp_path, ClassOptions(all_classes=True)))
    assert Counter((sample.split, sample.label, sample.defect) for sample in kept) == {
        (split, None, name): count for split, count in (("train", 2), ("test", 1)) for name in ("ant", "bee", "cat")
    }


def test_class_choices_that_do_not_fit(tmp_path):
    draw_classes(tmp_path)
    fails(OptionError, f"{tmp_path} holds 3 classes (ant, bee, cat): say which are normal", "class_folders", tmp_path)
    for wanted, sentence in (
        ("kat", f"no class 'kat' in {tmp_path} (did you mean 'cat'?); found: ant, bee, cat"),
        ((3,), "no class number 3"),
        ("split_A", "split_A is defined on the 60 classes of Species-60"),
    ):
        fails(OptionError, sentence, "class_folders", tmp_path, ClassOptions(normal_classes=wanted))
    with pytest.raises(OptionError, match="exclude each other"):
        ClassOptions(normal_classes="cat", all_classes=True)
    draw(tmp_path, "one_class_test/dog/0.JPEG")
    dog = ClassOptions(normal_classes="dog")
    fails(DataError, "no training images of the normal class dog in", "class_folders", tmp_path, dog)
    (tmp_path / "one_class_train/dog").mkdir()
    fails(
        DataError,
        f"no images in or below {tmp_path}/one_class_train/dog; found: nothing",
        "class_folders",
        tmp_path,
        dog,
    )
    fails(
        DataError,
        f"no training and test folder under {tmp_path}/one_class_test; found: ant/, bee/, cat/, dog/; expected",
        "class_folders",
        tmp_path / "one_class_test",
        dog,
    )


def test_species_60_splits(tmp_path):
    draw(tmp_path, *(f"{side}/{name}/0.jpg" for side in ("one_class_train", "one_class_test") for name in SPECIES_60))
    samples = list(iter_samples("class_folders", tmp_path, ClassOptions(normal_classes=("split_C",))))
    normal = {SPECIES_60[index] for index in SPECIES_60_SPLITS["split_C"]}
    assert Counter(sample.split for sample in samples) == {"train": 30, "test": 60}
    assert {sample.defect for sample in samples if sample.label == 0} == normal
    assert {sample.defect for sample in samples if sample.label == 1} == set(SPECIES_60) - normal


def test_class_lists():
    assert [len(classes) for classes in (CIFAR_10, CIFAR_100, IMAGENET_30, SPECIES_60)] == [10, 20, 30, 60]
    for classes in (CIFAR_10, tuple(CIFAR_100), IMAGENET_30, SPECIES_60):
        assert list(classes) == sorted(set(classes))
    fine = [name for names in CIFAR_100.values() for name in names]
    assert len(set(fine)) == 100
    assert all(len(names) == 5 for names in CIFAR_100.values())
    for split in SPECIES_60_SPLITS.values():
        assert len(set(split)) == 30
        assert set(split) <= set(range(60))


def cifar_record(labels: list[int], seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 32, 32), np.uint8)
    return bytes(labels) + pixels.tobytes(), pixels.transpose(1, 2, 0)


def draw_cifar_10(root: Path) -> dict[str, np.ndarray]:
    pixels = {}
    root.mkdir(parents=True, exist_ok=True)
    for file in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        records = [cifar_record([label], seed=len(pixels) + label) for label in (3, 8)]
        (root / file).write_bytes(b"".join(record for record, _ in records))
        pixels.update({f"cifar10/{file}#{index}": array for index, (_, array) in enumerate(records)})
    return pixels


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar_10(tmp_path, folder):
    pixels = draw_cifar_10(tmp_path / folder)
    samples = list(iter_samples("cifar", tmp_path, CifarOptions(normal_classes="ship")))
    assert [(s.sample_id, s.dataset, s.category, s.split, s.label, s.defect) for s in samples] == [
        *((f"cifar10/data_batch_{n}.bin#1", "cifar10", "cifar10", "train", 0, "ship") for n in range(1, 6)),
        ("cifar10/test_batch.bin#0", "cifar10", "cifar10", "test", 1, "cat"),
        ("cifar10/test_batch.bin#1", "cifar10", "cifar10", "test", 0, "ship"),
    ]
    for sample in samples:
        image = Image.open(io.BytesIO(sample.data))
        assert (image.format, image.mode, sample.size) == ("PNG", "RGB", len(sample.data))
        np.testing.assert_array_equal(np.asarray(image), pixels[sample.sample_id])
    assert samples[-1].uri == str(tmp_path / folder / "test_batch.bin#1")
    kept = list(iter_samples("cifar", tmp_path, CifarOptions(all_classes=True)))
    assert Counter((sample.split, sample.label) for sample in kept) == {("train", None): 10, ("test", None): 2}


def test_cifar_100(tmp_path):
    # Coarse label 1 is fish, fine labels 30 and 95 are dolphin and whale, both of coarse label 0.
    (tmp_path / "train.bin").write_bytes(b"".join(cifar_record(labels, 0)[0] for labels in ([0, 30], [1, 1])))
    (tmp_path / "test.bin").write_bytes(b"".join(cifar_record(labels, 1)[0] for labels in ([0, 95], [0, 30], [1, 1])))
    coarse = list(iter_samples("cifar", tmp_path, CifarOptions(normal_classes=(0,))))
    assert [(sample.sample_id, sample.label, sample.defect) for sample in coarse] == [
        ("cifar100/train.bin#0", 0, "aquatic_mammals"),
        ("cifar100/test.bin#0", 0, "aquatic_mammals"),
        ("cifar100/test.bin#1", 0, "aquatic_mammals"),
        ("cifar100/test.bin#2", 1, "fish"),
    ]
    fine = list(iter_samples("cifar", tmp_path, CifarOptions(normal_classes="dolphin", labels="fine")))
    assert [(sample.label, sample.defect) for sample in fine] == [
        (0, "dolphin"),
        (1, "whale"),
        (0, "dolphin"),
        (1, "aquarium_fish"),
    ]


def test_cifar_in_folders(tmp_path):
    draw(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test") for name in ("whale", "dolphin", "trout")))
    coarse = iter_samples("cifar", tmp_path, CifarOptions(normal_classes="aquatic_mammals"))
    assert facts(coarse, tmp_path) == [
        ("cifar100/train/dolphin/0.png", "cifar100", "train", 0, "aquatic_mammals", None),
        ("cifar100/train/whale/0.png", "cifar100", "train", 0, "aquatic_mammals", None),
        ("cifar100/test/dolphin/0.png", "cifar100", "test", 0, "aquatic_mammals", None),
        ("cifar100/test/trout/0.png", "cifar100", "test", 1, "fish", None),
        ("cifar100/test/whale/0.png", "cifar100", "test", 0, "aquatic_mammals", None),
    ]
    fine = list(iter_samples("cifar", tmp_path, CifarOptions(normal_classes="whale", labels="fine")))
    assert [sample.label for sample in fine] == [0, 1, 1, 0]
    draw(tmp_path, "train/unicorn/0.png")
    fails(DataError, "are neither those of CIFAR-10 nor those of CIFAR-100: dolphin, trout, unicorn", "cifar", tmp_path)


def test_cifar_incomplete_damaged_or_pickled(tmp_path):
    options = CifarOptions(normal_classes="cat")
    draw_cifar_10(tmp_path)
    whole = (tmp_path / "test_batch.bin").read_bytes()
    (tmp_path / "test_batch.bin").write_bytes(whole[:-1])
    fails(DataError, f"record 1 of {tmp_path}/test_batch.bin is no CIFAR image", "cifar", tmp_path, options)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + whole[1:])
    fails(DataError, "record 0 of", "cifar", tmp_path, options)
    (tmp_path / "test_batch.bin").write_bytes(b"")
    fails(DataError, "test_batch.bin is empty", "cifar", tmp_path, options)
    (tmp_path / "data_batch_4.bin").unlink()
    fails(DataError, f"{tmp_path} lacks data_batch_4.bin of the binary cifar10", "cifar", tmp_path, options)
    pickled = tmp_path / "python" / "cifar-10-batches-py"
    pickled.mkdir(parents=True)
    (pickled / "data_batch_1").write_bytes(b"\x80\x02")
    for root in (pickled, pickled.parent):
        fails(DataError, "fetch the binary version (cifar-10-binary.tar.gz", "cifar", root, options)
    (tmp_path / "none").mkdir()
    fails(DataError, f"no CIFAR in {tmp_path}/none; found: nothing", "cifar", tmp_path / "none", options)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folder_with_levels_and_flat_masks(tmp_path):
    root = tmp_path / "cookie"
    draw(root, "train/ok/0.jpg", "train/ok/deep/1.jpg", "val/ok/2.jpg", "train/cut/3.jpg", "train/unnamed/0.jpg")
    draw(root, "test/ok/4.jpg", "test/cut/5.jpg", "test/hole/6.jpg", "masks/3.png", "masks/6.png", "masks/0.png")
    options = FolderOptions(normal="ok", abnormal=("cut", "hole"), masks="masks")
    expected = [
        ("cookie/train/ok/0.jpg", "cookie", "train", 0, "good", None),
        ("cookie/train/ok/deep/1.jpg", "cookie", "train", 0, "good", None),
        ("cookie/val/ok/2.jpg", "cookie", "val", 0, "good", None),
        ("cookie/test/ok/4.jpg", "cookie", "test", 0, "good", None),
        ("cookie/train/cut/3.jpg", "cookie", "train", 1, "cut", "masks/3.png"),
        ("cookie/test/cut/5.jpg", "cookie", "test", 1, "cut", None),
        ("cookie/test/hole/6.jpg", "cookie", "test", 1, "hole", "masks/6.png"),
    ]
    assert facts(iter_samples("folder", root, options), root) == expected
    moved = dataclasses.replace(options, abnormal_train="test", category="biscuit", dataset="snack", mask_threshold=9)
    samples = list(iter_samples("folder", root, moved))
    assert [(sample.split, sample.category, sample.dataset) for sample in samples] == [
        ("test" if row[4] == "cut" else row[2], "biscuit", "snack") for row in expected
    ]
    assert [sample.mask_threshold for sample in samples] == [None, None, None, None, 9, None, 9]


def test_folder_without_levels(tmp_path):
    draw(tmp_path, *(f"ok/{number}.png" for number in range(10)), "ko/a.png", "ko/b.png")
    options = FolderOptions(dataset="set", normal="ok", abnormal=("ko",), train_fraction=0.7, seed=3)
    found = facts(iter_samples("folder", tmp_path, options), tmp_path)
    assert Counter(row[2:5] for row in found) == {
        ("train", 0, "good"): 7,
        ("test", 0, "good"): 3,
        ("test", 1, "ko"): 2,
    }
    tested = {row[0].removeprefix("set/") for row in found if row[2:4] == ("test", 0)}
    assert tested == set(lowest_hashes([f"ok/{number}.png" for number in range(10)], 3, seed=3))


@pytest.mark.parametrize("level", ["", "test/"])
@pytest.mark.parametrize(
    ("masks", "prefix", "suffix"),
    [
        (("{level}cut/1_label.png", "{level}hole/1_label.bmp"), "", "_label"),  # as below the root
        (("cut/m_1.png", "hole/m_1.png"), "m_", ""),  # as below train or test
        (("sub/1.png",), "", ""),  # as below the defect folder
        (("elsewhere/batch/one.png",), "", ""),  # anywhere: one mask of this stem, one image
    ],
)
def test_masks_are_found_by_place_then_by_stem(tmp_path, level, masks, prefix, suffix):
    draw(tmp_path, "train/ok/1.png" if level else "ok/1.png")
    draw(tmp_path, f"{level}cut/1.png", f"{level}hole/1.png", f"{level}cut/one.png", f"{level}hole/sub/1.png")
    masks = [mask.format(level=level) for mask in masks]
    draw(tmp_path, *(f"gt/{mask}" for mask in masks))
    options = FolderOptions(
        normal="ok", abnormal=("cut", "hole"), masks="gt", mask_prefix=prefix, mask_suffix=suffix, dataset="s"
    )
    found = {row[0]: row[5] for row in facts(iter_samples("folder", tmp_path, options), tmp_path) if row[5]}
    if len(masks) == 2:
        assert found == {f"s/{level}cut/1.png": f"gt/{masks[0]}", f"s/{level}hole/1.png": f"gt/{masks[1]}"}
    elif "sub" in masks[0]:
        assert found == {f"s/{level}hole/sub/1.png": "gt/sub/1.png"}
    else:
        assert found == {f"s/{level}cut/one.png": "gt/elsewhere/batch/one.png"}


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        (("1.png",), "fits both cut/1.png and hole/1.png"),
        (("x/2.png", "y/2.png"), "has more than one mask: gt/x/2.png, gt/y/2.png"),
        (("2.png", "2.bmp"), "two masks for '2'"),
        (("other.png",), "no mask in"),
    ],
)
def test_ambiguous_masks(tmp_path, masks, sentence):
    draw(tmp_path, "ok/0.png", "cut/1.png", "hole/1.png", "hole/2.png", *(f"gt/{mask}" for mask in masks))
    fails(DataError, sentence, "folder", tmp_path, FolderOptions(normal="ok", abnormal=("cut", "hole"), masks="gt"))


def test_a_mask_of_another_defect_is_not_borrowed(tmp_path):
    draw(tmp_path, "ok/0.png", "cut/1.png", "hole/1.png", "gt/hole/1.png")
    options = FolderOptions(normal="ok", abnormal=("cut", "hole"), masks="gt")
    masks = {sample.uri: sample.mask_uri for sample in iter_samples("folder", tmp_path, options) if sample.label}
    assert masks == {f"{tmp_path}/cut/1.png": None, f"{tmp_path}/hole/1.png": f"{tmp_path}/gt/hole/1.png"}


def test_unlabelled(tmp_path):
    root = tmp_path / "line7"
    draw(root, "a/x.png", "a/b/y.tiff", "c/z.WebP", "top.jpe")
    (root / "a/notes.txt").write_text("…")
    assert facts(iter_samples("folder", root, FolderOptions(unlabelled=True)), root) == [
        ("line7/a/b/y.tiff", "a", "test", None, None, None),
        ("line7/a/x.png", "a", "test", None, None, None),
        ("line7/c/z.WebP", "c", "test", None, None, None),
        ("line7/top.jpe", "line7", "test", None, None, None),
    ]
    fixed = list(iter_samples("folder", root, FolderOptions(unlabelled=True, category="cap", split="train")))
    assert {(sample.category, sample.split) for sample in fixed} == {("cap", "train")}
    (tmp_path / "bare/x").mkdir(parents=True)
    fails(DataError, "no samples in", "folder", tmp_path / "bare", FolderOptions(unlabelled=True))


def test_folder_is_lazy(tmp_path):
    draw(tmp_path, "a/0.png", "b/0.png")
    samples = iter_samples("folder", tmp_path, FolderOptions(unlabelled=True))
    next(samples)
    draw(tmp_path, "b/1.png")
    assert len(list(samples)) == 2


def test_folder_wrong_roots_and_options(tmp_path):
    draw(tmp_path, "train/ok/0.png", "test/ok/1.png", "test/ko/2.png")
    fails(OptionError, f"name the folder of normal images in {tmp_path} with normal", "folder", tmp_path)
    fails(
        DataError,
        f"no train/good under {tmp_path}; found in train: ok/; expected {{train,test}}/{{good,ko}}",
        "folder",
        tmp_path,
        FolderOptions(normal="good", abnormal=("ko",)),
    )
    fails(
        DataError,
        f"no folder bad in train, test of {tmp_path}; found in train: ok/; test: ko/, ok/",
        "folder",
        tmp_path,
        FolderOptions(normal="ok", abnormal=("bad",)),
    )
    fails(
        DataError,
        f"no folder {tmp_path}/gt",
        "folder",
        tmp_path,
        FolderOptions(normal="ok", abnormal=("ko",), masks="gt"),
    )
    draw(tmp_path, "gt/2.png")
    suffixed = FolderOptions(normal="ok", abnormal=("ko",), masks="gt", mask_suffix="_m")
    fails(DataError, f"no mask in {tmp_path}/gt is named <stem>_m", "folder", tmp_path, suffixed)
    fails(DataError, f"no ko under {tmp_path}/test/ok", "folder", tmp_path / "test/ok", FolderOptions(normal="ko"))
    for bad, word in (
        ({"unlabelled": True, "normal": "ok"}, "excludes"),
        ({"normal": "ok", "masks": "gt"}, "needs abnormal"),
        ({"normal": "ok", "abnormal": ("ok",)}, "twice"),
        ({"train_fraction": 0}, "train_fraction"),
        ({"mask_threshold": -1}, "mask_threshold"),
        ({"dataset": "a/b"}, "plain name"),
    ):
        with pytest.raises(OptionError, match=word):
            FolderOptions(**bad)


# --- Manifests --------------------------------------------------------------------------------------------------------


def write_rows(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")


TRAIN_ROW = {
    "filename": "candle/Data/Images/0.JPG",
    "label": 0,
    "label_name": "good",
    "clsname": "candle",
    "maskname": "",
}
TEST_ROW = {
    "filename": "bottle/test/cut/0.png",
    "label": 1,
    "label_name": "defective",
    "maskname": "bottle/ground_truth/cut/0_mask.png",
}


def test_manifest_of_the_uniad_family(tmp_path, caplog):
    root = tmp_path / "images"
    root.mkdir()
    write_rows(tmp_path / "meta/train.json", TRAIN_ROW, TRAIN_ROW, {**TRAIN_ROW, "filename": "1.png"}, TRAIN_ROW)
    write_rows(tmp_path / "meta/test.json", TEST_ROW)
    options = ManifestOptions(dataset="mv", train="../meta/train.json", test=f"{tmp_path}/meta/test.json")
    with caplog.at_level(logging.WARNING):
        found = facts(iter_samples("manifest", root, options), root)
    assert found == [
        ("mv/candle/Data/Images/0.JPG", "candle", "train", 0, "good", None),
        ("mv/1.png", "candle", "train", 0, "good", None),
        ("mv/bottle/test/cut/0.png", "bottle", "test", 1, "defective", "bottle/ground_truth/cut/0_mask.png"),
    ]
    assert "2 repeated rows of ../meta/train.json dropped" in caplog.text
    strict = dataclasses.replace(options, deduplicate=False)
    fails(DataError, "line 2 of", "manifest", root, strict)
    write_rows(tmp_path / "meta/test.json", {**TEST_ROW, "filename": TRAIN_ROW["filename"], "clsname": "candle"})
    fails(DataError, "again with another split, label, category or mask", "manifest", root, options)


def test_manifest_with_its_own_splits(tmp_path):
    write_rows(
        tmp_path / "all.jsonl",
        "\ufeff" + json.dumps({"filename": "./a/1.png", "split": "train", "category": "x", "label": 0}),
        {"filename": "a/2.png", "split": "val", "category": "x", "label": None, "extra": [1]},
        {"filename": "a/3.png", "split": "test", "category": "y", "label": 1, "defect": "dent", "mask": "m/3.png"},
        {"filename": "s3://bucket/b/4.png", "split": "test", "category": "y", "label": 1},
        {"filename": "/data/5.png", "split": "test", "category": "y"},
    )
    samples = list(iter_samples("manifest", tmp_path, ManifestOptions(manifest="all.jsonl", dataset="d")))
    assert [(s.sample_id, s.category, s.split, s.label, s.defect, s.uri, s.mask_uri) for s in samples] == [
        ("d/a/1.png", "x", "train", 0, "good", f"{tmp_path}/a/1.png", None),
        ("d/a/2.png", "x", "val", None, None, f"{tmp_path}/a/2.png", None),
        ("d/a/3.png", "y", "test", 1, "dent", f"{tmp_path}/a/3.png", f"{tmp_path}/m/3.png"),
        ("d/bucket/b/4.png", "y", "test", 1, None, "s3://bucket/b/4.png", None),
        ("d/data/5.png", "y", "test", None, None, "/data/5.png", None),
    ]
    assert list(iter_samples("manifest", tmp_path / "all.jsonl", ManifestOptions(dataset="d"))) == samples
    assert next(iter_samples("manifest", tmp_path / "all.jsonl")).dataset == tmp_path.name


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({"label": 0}, "has no filename"),
        ({"filename": 3}, "filename 3 must be text"),
        ({"filename": "../up.png", "category": "a", "split": "test"}, "leads out of the root"),
        ({"filename": "a/b.png", "split": "test"}, "names no category or clsname"),
        ({"filename": "a.png", "category": "a"}, "split '' must be train, val, test"),
        ({"filename": "a.png", "category": "a", "split": "test", "label": 2}, "label 2 must be 0"),
        ({"filename": "a.png", "category": "a", "split": "test", "label": True}, "label True must be 0"),
        ("", "has no rows"),
    ],
)
def test_manifest_rows_that_are_wrong(tmp_path, row, sentence):
    write_rows(tmp_path / "all.jsonl", row)
    fails(DataError, sentence, "manifest", tmp_path, ManifestOptions(manifest="all.jsonl"))


def test_manifest_missing(tmp_path):
    fails(OptionError, f"name the manifests of {tmp_path}: train and test, or manifest", "manifest", tmp_path)
    fails(DataError, f"no manifest {tmp_path}/all.jsonl", "manifest", tmp_path, ManifestOptions(manifest="all.jsonl"))
    write_rows(tmp_path / "train.jsonl", {**TEST_ROW, "split": "test"})
    options = ManifestOptions(train="train.jsonl")
    fails(DataError, "split 'test' must be train", "manifest", tmp_path, options)
    fails(OptionError, "is a file and so the manifest itself", "manifest", tmp_path / "train.jsonl", options)


# --- Several sources --------------------------------------------------------------------------------------------------


def test_merged(tmp_path):
    draw_mvtec(tmp_path / "sets/mvtec")
    draw(tmp_path / "sets/btad", "01/train/ok/0.bmp", "01/test/ko/0.bmp")
    (tmp_path / "meta").mkdir()
    file = tmp_path / "meta/all.yaml"
    file.write_text(
        f"""
        - {{layout: mvtec, source: ../sets/mvtec, options: {{categories: [wood]}}}}
        - {{layout: btad, source: {tmp_path}/sets/btad, dataset: beantech, category_prefix: btad_}}
        """
    )
    samples = list(iter_samples("merged", file))
    assert [(sample.sample_id, sample.dataset, sample.category, sample.uri) for sample in samples] == [
        ("mvtec/wood/train/good/000.jpg", "mvtec", "wood", f"{tmp_path}/sets/mvtec/wood/train/good/000.jpg"),
        ("mvtec/wood/test/scratch/000.jpg", "mvtec", "wood", f"{tmp_path}/sets/mvtec/wood/test/scratch/000.jpg"),
        ("beantech/01/train/ok/0.bmp", "beantech", "btad_01", f"{tmp_path}/sets/btad/01/train/ok/0.bmp"),
        ("beantech/01/test/ko/0.bmp", "beantech", "btad_01", f"{tmp_path}/sets/btad/01/test/ko/0.bmp"),
    ]
    renamed = list(iter_samples("merged", file, MergedOptions(dataset="all")))
    assert [sample.sample_id for sample in renamed] == [f"all/{sample.sample_id}" for sample in samples]
    assert {sample.dataset for sample in renamed} == {"all"}


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("a: [", DataError, "is not YAML"),
        ("layout: mvtec", DataError, "does not name sources"),
        ("[]", DataError, "does not name sources"),
        ("- {layout: mvtec}", DataError, "source 1 of"),
        ("- {layout: mvtek, source: x}", OptionError, "no layout 'mvtek' to merge (did you mean 'mvtec'?)"),
        ("- {layout: merged, source: x}", OptionError, "no layout 'merged' to merge"),
        ("- {layout: mvtec, source: x, option: {}}", OptionError, "unknown key 'option' (did you mean 'options'?)"),
        ("- {layout: mvtec, source: [3]}", OptionError, "source cannot be [3]"),
        (
            "- {layout: mvtec, source: x, options: {category: [a]}}",
            OptionError,
            "layout mvtec has no option 'category' (did you mean 'categories'?); its options: dataset, categories",
        ),
        (
            "- {layout: mvtec, source: x, options: {categories: bottle}}",
            OptionError,
            "option categories of layout mvtec cannot be 'bottle'; it takes a list of text",
        ),
        ("- {layout: mvtec, source: x, dataset: a, options: {dataset: b}}", OptionError, "names its dataset twice"),
        (
            "[{layout: mvtec, source: m}, {layout: mvtec, source: m}]",
            DataError,
            "sources 1 and 2 of",
        ),
    ],
)
def test_merged_wrong(tmp_path, text, error, sentence):
    draw_mvtec(tmp_path / "m")
    (tmp_path / "all.yaml").write_text(text)
    fails(error, sentence, "merged", tmp_path / "all.yaml")


def test_merged_missing(tmp_path):
    fails(DataError, f"no file {tmp_path}/all.yaml", "merged", tmp_path / "all.yaml")


# --- All layouts ------------------------------------------------------------------------------------------------------


def test_registry():
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert dataclasses.is_dataclass(layout.options)
        for field in dataclasses.fields(layout.options):
            assert f"{field.name}: " in layout.options.__doc__, f"{name}.{field.name} is not documented"
    with pytest.raises(OptionError, match=re.escape("no layout 'visaa' (did you mean 'visa'?)")):
        iter_samples("visaa", ".")
    with pytest.raises(OptionError, match="layout visa takes VisaOptions, not MvtecOptions"):
        iter_samples("visa", ".", MvtecOptions())
    with pytest.raises(DataError, match="no file system for 'nosuch://'"):
        iter_samples("visa", "nosuch://bucket")


def test_a_number_that_names_a_class_is_its_name():
    classes = ["1", "2", "3"]
    for given, normal in ([(1,), {"1"}], [("1", 2), {"1", "2"}], [(0,), {"1"}]):
        assert choose_task(classes, ClassOptions(normal_classes=given), "x").normal == normal


def test_options_from_plain_values():
    assert make_options(LAYOUTS["class_folders"], {"normal_classes": [3, "cat"]}) == ClassOptions(
        normal_classes=(3, "cat")
    )
    assert make_options(LAYOUTS["class_folders"], {"normal_classes": "split_A"}).normal_classes == "split_A"
    assert make_options(LAYOUTS["mtd"], {"train_fraction": 1, "seed": 4}) == MtdOptions(train_fraction=1, seed=4)
    for values, sentence in (
        ({"seed": True}, "option seed of layout folder cannot be True; it takes a whole number"),
        ({"train_fraction": "0.5"}, "it takes a number"),
        ({"split": "tests"}, "it takes 'train' or 'val' or 'test'"),
        ({"unlabelled": 1}, "it takes true or false"),
    ):
        with pytest.raises(OptionError, match=re.escape(sentence)):
            make_options(LAYOUTS["folder"], values)


# --- The real thing ---------------------------------------------------------------------------------------------------


def counts(samples) -> Counter:
    return Counter((sample.split, sample.label, sample.defect, sample.mask_uri is not None) for sample in samples)


@pytest.mark.real
def test_real_magnetic_tiles(real_data):
    found = list(iter_samples("mtd", real_data / "images/magnetic_tile"))
    assert counts(found) == {
        ("train", 0, "good", False): 762,
        ("test", 0, "good", False): 190,
        ("test", 1, "blowhole", True): 115,
        ("test", 1, "break", True): 85,
        ("test", 1, "crack", True): 57,
        ("test", 1, "fray", True): 32,
        ("test", 1, "uneven", True): 103,
    }


@pytest.mark.real
def test_real_commutators(real_data):
    found = list(iter_samples("kolektor", real_data / "images/kolektor_sdd"))
    assert len(found) == 400
    assert Counter(sample.label for sample in found) == {0: 348, 1: 52}
    items = {
        split: {s.sample_id.split("/")[1] for s in found if s.split == split and not s.label}
        for split in ("train", "test")
    }
    assert {split: len(names) for split, names in items.items()} == {"train": 25, "test": 25}
    assert not items["train"] & items["test"]


@pytest.mark.real
def test_real_cookies(real_data):
    options = FolderOptions(normal="normal", abnormal=("anomaly",), masks="masks", abnormal_train="test")
    assert counts(iter_samples("folder", real_data / "images/cookie", options)) == {
        ("train", 0, "good", False): 31,
        ("test", 1, "anomaly", True): 32,
        ("test", 0, "good", False): 14,
        ("test", 1, "anomaly", False): 8,
    }


@pytest.mark.real
def test_real_castings(real_data):
    options = FolderOptions(normal="ok_front", abnormal=("def_front",))
    assert counts(iter_samples("folder", real_data / "images/casting", options)) == {
        ("train", 0, "good", False): 400,
        ("train", 1, "def_front", False): 150,
        ("test", 0, "good", False): 150,
        ("test", 1, "def_front", False): 200,
    }


@pytest.mark.real
def test_real_classes(real_data):
    options = ClassOptions(normal_classes=("snail", 0))
    found = Counter(
        (sample.split, sample.label, sample.defect if sample.label == 0 else "")
        for sample in iter_samples("class_folders", real_data / "images/tiny_imagenet", options)
    )
    assert found == {
        ("train", 0, "alp"): 150,
        ("train", 0, "snail"): 150,
        ("test", 0, "alp"): 50,
        ("test", 0, "snail"): 50,
        ("test", 1, ""): 18 * 50,
    }


# ---- names and folders as people have them --------------------------------------------------------------------------


def left_out(layout, root, options=None):
    """What a listing left out, and the paths of its samples relative to the root."""
    seen = LeftOut()
    samples = list(iter_samples(layout, root, options, seen))
    return seen.summary(), [sample.sample_id.split("/", 1)[1] for sample in samples]


FOLDERS = FolderOptions(normal="good", abnormal=("bad",))


def test_a_set_without_oddities_leaves_nothing_out(tmp_path):
    draw(tmp_path, "good/0.png", "bad/1.png", "masks/1.png")
    assert left_out("folder", tmp_path, dataclasses.replace(FOLDERS, masks="masks"))[0] == {}


@pytest.mark.parametrize("target", ["..", ".", "../good", "../bad/deep"])
def test_a_folder_is_never_entered_from_inside_itself(tmp_path, target):
    root = tmp_path / "set"
    draw(root, "good/0.png", "good/1.png", "bad/2.png")
    (root / "good/back").symlink_to(target)
    expected = ["good/0.png", "good/1.png", "bad/2.png"]
    if target == "../bad/deep":  # there and back again by two links; from bad, good is another place
        (root / "bad/deep").mkdir()
        (root / "bad/deep/again").symlink_to("../../good")
        expected += ["bad/deep/again/0.png", "bad/deep/again/1.png"]
    summary, paths = left_out("folder", root, FOLDERS)
    assert sorted(paths) == sorted(expected)
    assert summary["links"]["count"] >= 1
    assert summary["links"]["examples"][0].startswith(str(root))
    whole, everything = left_out("folder", root, FolderOptions(unlabelled=True))
    assert len(everything) == len(set(everything)) <= 3 * 2
    assert whole["links"]["count"] >= 1


def test_links_to_other_places_are_followed(tmp_path):
    draw(tmp_path / "elsewhere", "x.png", "deep/y.png")
    root = tmp_path / "set"
    draw(root, "good/0.png", "bad/2.png")
    (root / "good/more").symlink_to("../../elsewhere")
    (root / "good/same").symlink_to("../bad")  # beside it, not above
    summary, paths = left_out("folder", root, FOLDERS)
    assert summary == {}
    assert paths == ["good/0.png", "good/more/deep/y.png", "good/more/x.png", "good/same/2.png", "bad/2.png"]


def test_a_link_to_a_folder_above_the_root_is_not_followed(tmp_path):
    draw(tmp_path, "other/0.png", "set/good/0.png", "set/bad/1.png")
    (tmp_path / "set/good/all").symlink_to(tmp_path)
    assert left_out("folder", tmp_path / "set", FOLDERS)[1] == ["good/0.png", "bad/1.png"]


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "System Volume Information", "#recycle", "@Recycle",
     ".ipynb_checkpoints", ".Trash-1000", "__MACOSX", "#snapshot"],
)  # fmt: skip
def test_what_systems_leave_in_folders_is_no_data(tmp_path, name):
    draw(tmp_path, "good/0.png", "bad/1.png", f"good/{name}/0.png/SYNOPHOTO_THUMB_M.jpg", f"{name}/x.png")
    assert left_out("folder", tmp_path, FOLDERS) == ({}, ["good/0.png", "bad/1.png"])
    draw_mvtec(tmp_path / "mvtec")
    _, paths = left_out("mvtec", tmp_path / "mvtec")
    draw(tmp_path / "mvtec", f"{name}/train/good/0.png", f"bottle/{name}/0.png", f"bottle/test/{name}/0.png")
    assert left_out("mvtec", tmp_path / "mvtec")[1] == paths


def test_other_endings_are_read_or_counted(tmp_path):
    draw(tmp_path, "good/0.png", "good/a.jfif", "good/b.JPE", "good/c.dib", "bad/deep/d.mpo", "bad/e.apng")
    draw(tmp_path, "good/x.GIF", "good/y.gif", "bad/deep/z.gif", "bad/w.avif", "bad/noending", "bad/list.csv")
    summary, paths = left_out("folder", tmp_path, FOLDERS)
    assert paths == ["good/0.png", "good/a.jfif", "good/b.JPE", "good/c.dib", "bad/deep/d.mpo", "bad/e.apng"]
    assert {ending: found["count"] for ending, found in summary["files"].items()} == {
        "": 1, ".avif": 1, ".csv": 1, ".gif": 3,
    }  # fmt: skip
    assert summary["files"][".avif"]["example"] == str(tmp_path / "bad/w.avif")
    assert set(summary) == {"files"}


def test_folders_and_images_that_a_layout_passes_over_are_counted(tmp_path):
    draw_mvtec(tmp_path)
    draw(
        tmp_path, "bottle/train/good/more/0.png", "bottle/train/good/more/deep/1.png", "bottle/test/broken/again/0.png"
    )
    draw(tmp_path, "bottle/rejected/0.png", "bottle/rejected/1.png", "wood/test/loose.bmp")
    (tmp_path / "bottle/empty").mkdir()
    summary, paths = left_out("mvtec", tmp_path)
    assert not any("more" in path or "again" in path for path in paths)
    assert summary["folders"]["count"] == 3
    assert summary["folders"]["images"] == 5
    assert summary["folders"]["examples"] == [
        str(tmp_path / "bottle" / name) for name in ("rejected", "test/broken/again", "train/good/more")
    ]
    assert summary["files"][".bmp"] == {"count": 1, "example": str(tmp_path / "wood/test/loose.bmp")}


def test_folders_that_no_option_names_are_counted(tmp_path):
    draw(tmp_path, "good/0.png", "bad/1.png", "ugly/2.png", "ugly/3.png", "masks/1.png", "loose.png")
    summary, _ = left_out("folder", tmp_path, dataclasses.replace(FOLDERS, masks="masks"))
    assert summary["folders"] == {"count": 1, "images": 2, "examples": [str(tmp_path / "ugly")]}
    assert summary["files"] == {".png": {"count": 1, "example": str(tmp_path / "loose.png")}}


def test_merged_sources_tell_what_each_leaves_out(tmp_path):
    draw(tmp_path, "a/good/0.png", "a/good/1.gif", "b/good/0.png", "b/good/1.gif")
    options = "{normal: good}"
    lines = [f"- {{layout: folder, source: {name}, options: {options}}}" for name in ("a", "b")]
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    assert left_out("merged", tmp_path / "all.yaml")[0]["files"][".gif"]["count"] == 2


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_composed_otherwise_are_the_same_name(tmp_path, forms):
    image, mask = (functools.partial(unicodedata.normalize, form) for form in forms)
    draw(tmp_path, "good/0.png", image("kaputt-ü/Gerät é.png"), mask("masken-ö/kaputt-ü/Gerät é_mask.png"))
    options = FolderOptions(normal="good", abnormal=(mask("kaputt-ü"),), masks=image("masken-ö"), mask_suffix="_mask")
    (bad,) = (sample for sample in iter_samples("folder", tmp_path, options) if sample.label)
    assert bad.uri == str(tmp_path / image("kaputt-ü/Gerät é.png"))
    assert bad.mask_uri == str(tmp_path / mask("masken-ö/kaputt-ü/Gerät é_mask.png"))
    draw(
        tmp_path,
        "m/cat/train/good/0.png",
        f"m/cat/test/{image('ö')}/{image('é')}.png",
        f"m/cat/ground_truth/{mask('ö')}/{mask('é')}.png",
    )
    (bad,) = (sample for sample in iter_samples("mvtec", tmp_path / "m") if sample.label)
    assert bad.mask_uri == str(tmp_path / f"m/cat/ground_truth/{mask('ö')}/{mask('é')}.png")


def test_two_images_of_one_stem_have_masks_by_their_whole_names(tmp_path):
    draw(tmp_path, "good/0.png", "bad/a.png", "bad/a.jpg", "masks/a.png")
    options = dataclasses.replace(FOLDERS, masks="masks")
    fails(
        DataError, "name each mask by the whole name of its image, a.jpg.png and a.png.png", "folder", tmp_path, options
    )
    (tmp_path / "masks/a.png").rename(tmp_path / "masks/a.jpg.png")
    draw(tmp_path, "masks/a.png.png")
    masks = {sample.uri: sample.mask_uri for sample in iter_samples("folder", tmp_path, options) if sample.label}
    assert masks == {str(tmp_path / f"bad/{name}"): str(tmp_path / f"masks/{name}.png") for name in ("a.png", "a.jpg")}


def test_mvtec_loco(tmp_path):
    """A folder of masks an image, and normal images for validation."""
    box = "breakfast_box"
    draw(tmp_path, f"{box}/train/good/000.png", f"{box}/validation/good/000.png", f"{box}/test/good/000.png")
    bad, masks = f"{box}/test/logical_anomalies", f"{box}/ground_truth/logical_anomalies"
    draw(tmp_path, f"{bad}/000.png", f"{bad}/001.png")
    draw(tmp_path, f"{masks}/000/000.png", f"{masks}/000/001.png", f"{masks}/001/000.png")
    seen = LeftOut()
    samples = list(iter_samples("mvtec", tmp_path, left_out=seen))
    assert seen.summary() == {}
    assert [(s.sample_id, s.split, s.label) for s in samples] == [
        (f"mvtec/{box}/train/good/000.png", "train", 0),
        (f"mvtec/{box}/validation/good/000.png", "val", 0),
        (f"mvtec/{box}/test/good/000.png", "test", 0),
        (f"mvtec/{box}/test/logical_anomalies/000.png", "test", 1),
        (f"mvtec/{box}/test/logical_anomalies/001.png", "test", 1),
    ]
    masks = str(tmp_path / box / "ground_truth/logical_anomalies")
    assert [(s.mask_uri, s.more_masks) for s in samples[3:]] == [
        (f"{masks}/000/000.png", (f"{masks}/000/001.png",)),
        (f"{masks}/001/000.png", ()),
    ]


def test_a_folder_of_masks_without_one_is_left_out_and_its_image_has_none(tmp_path):
    draw(tmp_path, "box/train/good/0.png", "box/test/cut/0.png", "box/test/cut/1.png")
    draw(tmp_path, "box/ground_truth/cut/0/0.png", "box/ground_truth/cut/1/0.gif")
    samples = [sample for sample in iter_samples("mvtec", tmp_path) if sample.label]
    masks = str(tmp_path / "box/ground_truth/cut")
    assert [sample.mask_uri for sample in samples] == [f"{masks}/0/0.png", None]


def test_a_root_whose_name_has_two_colons(tmp_path):
    draw(tmp_path / "cam::1", "good/12::30.png", "bad/a::b.png")
    _, paths = left_out("folder", tmp_path / "cam::1", FOLDERS)
    assert paths == ["good/12::30.png", "bad/a::b.png"]


def test_what_is_left_out_is_counted_in_few_listings(tmp_path):
    draw(tmp_path, "good/0.png", "bad/1.png", *(f"archive/{number:03d}/0.png" for number in range(60)))
    archive = tmp_path / "archive"
    (archive / "999").mkdir(mode=0o000)
    summary, _ = left_out("folder", tmp_path, FOLDERS)
    assert summary["folders"] == {"count": 1, "images": MOST_LISTED - 1, "examples": [str(archive)]}

"""Finding the layout of a folder: what names are taken for, and what is asked where they do not tell."""

import json
import shlex
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import test_layouts as drawn
from tests.data.test_layouts import draw
from unianom.data.layout_detection import detect_layout
from unianom.data.layout_detection.tree import MOST_FOLDERS
from unianom.data.layout_detection.words import condition, meaning
from unianom.data.layouts import LAYOUTS, iter_samples, make_options
from unianom.data.layouts.source import Source
from unianom.errors import DataError, OptionError
from unianom.written import Argument


def found(root):
    """What is detected, checked against what its layout lists, by the options and by the command line it prints."""
    detected = detect_layout(root)
    layout = LAYOUTS[detected.layout]
    options = make_options(layout, detected.options)
    program, verb, source, *arguments = shlex.split(detected.command())
    assert (program, verb, source, arguments[:2]) == (
        "unianom", "inspect", detected.source, ["--layout", detected.layout],
    )  # fmt: skip
    names = [name.removeprefix("--layout_options.") for name in arguments[2::2]]
    assert make_options(layout, dict(zip(names, map(Argument, arguments[3::2]), strict=True))) == options
    refs = list(iter_samples(detected.layout, detected.source, options))
    assert len({ref.sample_id for ref in refs}) == len(refs) == sum(detected.counts.values())
    names = {0: "normal", 1: "anomalous"}
    expected = Counter("unlabelled" if r.label is None else f"{r.split}_{names[r.label]}" for r in refs)
    assert detected.counts == expected
    assert detected.masks == sum(ref.mask_uri is not None for ref in refs)
    assert detected.categories == Counter(ref.category for ref in refs)
    return detected, refs


def samples(root, categories=False):
    """(split, label, defect) by path, or with the category before."""
    detected, refs = found(root)
    rows = {}
    for ref in refs:
        row = (ref.split, ref.label, ref.defect)
        rows[ref.uri.removeprefix(f"{detected.source}/")] = (ref.category, *row) if categories else row
    return rows


def numbers(root):
    return found(root)[0].counts


def some(folder, count=10, ending=".png"):
    return [f"{folder}/{number}{ending}" for number in range(count)]


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words():
    for name in ("good", "OK", "ok_front", "MT_Free", "Normal", "not-defective", "defect_free", "noDefects", "i.O."):
        assert condition(name) == "normal", name
    for name in ("NG", "nok", "not_ok", "no good", "def_front", "MT_Crack", "Anomalies", "n.i.O.", "Ausschuss"):
        assert condition(name) == "abnormal", name
    for name in ("screw", "2024-01-31", "good_and_bad", "bottle", "goods", "ä"):
        assert condition(name) is None, name
    assert [meaning(name).split for name in ("Train", "TESTING", "validation", "good-train", "train2")] == [
        "train", "test", "val", "train", None,
    ]  # fmt: skip
    assert all(meaning(name).role == "mask" for name in ("masks", "GroundTruth", "ground truth", "gt", "bad_mask"))


# ---- normal and defective folders -----------------------------------------------------------------------------------


def test_two_folders(tmp_path):
    draw(tmp_path, *some("good"), *some("bad", 3))
    detected, _ = found(tmp_path)
    assert detected.options == {"normal": "good", "abnormal": ["bad"], "train_fraction": 0.8}
    assert detected.counts == {"train_normal": 8, "test_normal": 2, "test_anomalous": 3}
    assert detected.decisions[:2] == ("good/ → normal (10 images)", "bad/ → defective (3 images)")
    assert "20% of the normal ones are tested, drawn by seed and name" in detected.decisions[2]
    assert any("no masks" in warning for warning in detected.warnings)
    assert [ref.dataset for ref in found(tmp_path)[1]] == [tmp_path.name] * 13


def test_everything_beside_normal_is_a_defect_of_its_name(tmp_path):
    draw(tmp_path, *some("OK"), *some("scratch", 2), *some("colour", 2), *some("kaputt ü", 1), *some("unknown", 3))
    rows = samples(tmp_path)
    assert Counter(row[1:] for row in rows.values()) == {
        (0, "good"): 10, (1, "scratch"): 2, (1, "colour"): 2, (1, "kaputt ü"): 1, (None, None): 3,
    }  # fmt: skip
    decisions = found(tmp_path)[0].decisions
    assert "colour/ → defective, beside normal images (2 images)" in decisions
    assert "unknown/ → unlabelled (3 images)" in decisions


def test_divided_as_castings_are(tmp_path):
    draw(tmp_path, *some("train/ok_front"), *some("train/def_front", 4), *some("test/ok_front", 3))
    draw(tmp_path, *some("test/def_front", 2))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 10, "test_normal": 3, "test_anomalous": 6}
    assert detected.options["abnormal_train"] == "test"
    assert any("defective images in train are tested" in decision for decision in detected.decisions)


def test_divided_with_other_names_and_validation(tmp_path):
    draw(tmp_path, *some("Training/OK"), *some("Testing/Fine OK", 2), *some("Testing/NG", 2), *some("Valid/OK", 1))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 10, "val_normal": 1, "test_normal": 2, "test_anomalous": 2}
    names = {"train_folder": "Training", "val_folder": "Valid", "test_folder": "Testing"}
    assert names.items() <= detected.options.items()


def test_validation_is_tested_where_there_is_no_test(tmp_path):
    draw(tmp_path, *some("train/good"), *some("val/good", 2), *some("val/bad", 2))
    assert numbers(tmp_path) == {"train_normal": 10, "test_normal": 2, "test_anomalous": 2}


def test_divided_without_normal_images_to_test(tmp_path):
    draw(tmp_path, *some("train/good"), *some("test/scratch", 2), *some("test/dent", 1))
    assert numbers(tmp_path) == {"train_normal": 8, "test_normal": 2, "test_anomalous": 3}
    assert samples(tmp_path)["test/dent/0.png"] == ("test", 1, "dent")


def test_images_loose_in_train(tmp_path):
    draw(tmp_path, *some("train"), *some("test/good", 2), *some("test/hole", 2))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 10, "test_normal": 2, "test_anomalous": 2}
    assert "train/ → normal, to train on, all there is in train (10 images)" in detected.decisions
    new = tmp_path / "new"
    draw(new, *some("train"), *some("test", 4))
    assert numbers(new) == {"train_normal": 8, "test_normal": 2, "unlabelled": 4}


def test_one_folder_of_any_name_in_train(tmp_path):
    draw(tmp_path, *some("train/bolts"), *some("test/bolts", 2), *some("test/rusty", 2))
    assert numbers(tmp_path) == {"train_normal": 10, "test_normal": 2, "test_anomalous": 2}


def test_folders_that_name_their_split(tmp_path):
    draw(tmp_path, *some("train_good"), *some("test_good", 2), *some("test_bad", 2))
    detected, _ = found(tmp_path)
    assert detected.options["test_normal"] == ["test_good"]
    assert detected.counts == {"train_normal": 10, "test_normal": 2, "test_anomalous": 2}


def test_only_a_test_folder_is_the_whole_set(tmp_path):
    draw(tmp_path, *some("test/ok"), *some("test/ng", 2))
    assert numbers(tmp_path) == {"train_normal": 8, "test_normal": 2, "test_anomalous": 2}


def test_images_in_the_root_beside_a_folder_of_defects(tmp_path):
    draw(tmp_path, *(f"{number}.jpg" for number in range(10)), *some("Defects", 2))
    detected, _ = found(tmp_path)
    assert detected.options["normal"] == "."
    assert detected.counts == {"train_normal": 8, "test_normal": 2, "test_anomalous": 2}


def test_a_folder_around_everything(tmp_path):
    draw(tmp_path, *some("Parts 2024/data/good"), *some("Parts 2024/data/bad", 2))
    detected, refs = found(tmp_path)
    assert detected.source == f"{tmp_path}/Parts 2024/data"
    assert refs[0].sample_id == "data/good/0.png"


def test_number_folders(tmp_path):
    draw(tmp_path, *some("0"), *some("1", 2))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 8, "test_normal": 2, "test_anomalous": 2}
    assert "0 was taken for normal and 1 for anomalous" in detected.warnings[0]
    assert (detected.options["normal"], detected.options["abnormal"]) == ("0", ["1"])


@pytest.mark.parametrize(
    "name", ["NO good", "[bad]", "a, b defect", "'bad'", "Fehler ü/ö", "-bad", "n.i.O.", "null bad"]
)
def test_names_that_shells_and_yaml_take_for_something_else(tmp_path, name):
    draw(tmp_path, *some("ok parts"), *some(name, 2))
    assert numbers(tmp_path)["test_anomalous"] == 2


# ---- categories -----------------------------------------------------------------------------------------------------


def test_categories(tmp_path):
    for category, defects in (("bolt", ("rust", "bent")), ("nut", ("rust",)), ("washer x", ())):
        draw(
            tmp_path, *some(f"{category}/ok"), *(path for defect in defects for path in some(f"{category}/{defect}", 1))
        )
    draw(tmp_path, *some("manuals", 2), "masks/bolt/rust/0.png")
    detected, _ = found(tmp_path)
    assert detected.options == {
        "categories": ["bolt", "nut", "washer x"], "normal": "ok", "abnormal": ["bent", "rust"], "train_fraction": 0.8,
        "masks": "masks",
    }  # fmt: skip
    assert detected.categories == {"bolt": 12, "nut": 11, "washer x": 10}
    assert detected.masks == 1
    assert "<category>/ok/ → normal (30 images)" in detected.decisions
    assert "not taken for anything: manuals/ (2 images)" in detected.warnings


@pytest.mark.parametrize("split_first", [False, True])
def test_divided_categories(tmp_path, split_first):
    for category in ("bolt", "nut"):
        for split, name, count in (("train", "OK", 10), ("test", "OK", 2), ("test", "scratched", 3)):
            draw(tmp_path, *some(f"{split}/{category}/{name}" if split_first else f"{category}/{split}/{name}", count))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 20, "test_normal": 4, "test_anomalous": 6}
    assert detected.categories == {"bolt": 15, "nut": 15}


def test_divided_categories_without_normal_images_to_test(tmp_path):
    for category in ("bolt", "nut"):
        draw(tmp_path, *some(f"{category}/train/good"), *some(f"{category}/test/bad", 2))
    assert numbers(tmp_path) == {"train_normal": 16, "test_normal": 4, "test_anomalous": 4}


def test_sets_of_different_kinds_are_no_categories(tmp_path):
    draw(tmp_path, *some("a/ok"), *some("a/ng", 1), *some("b/good"), *some("b/bad", 1))
    with pytest.raises(OptionError, match="b is laid out or named otherwise than a, so they are no categories"):
        detect_layout(tmp_path)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_masks_by_stem_as_those_of_cookies(tmp_path):
    draw(tmp_path, *some("train/normal"), *(f"train/anomaly/a{n}.jpg" for n in range(3)), "test/normal/8.jpg")
    draw(tmp_path, "test/anomaly/b.jpg", *(f"masks/a{n}.png" for n in range(3)))
    detected, _ = found(tmp_path)
    assert detected.masks == 3
    assert "masks/ → masks (3), named like their images" in detected.decisions
    assert "1 of 4 anomalous images have no mask; pixel metrics leave them out" in detected.warnings


@pytest.mark.parametrize(
    ("masks", "options"),
    [
        ("Ground Truth/{}_mask.png", {"masks": "Ground Truth", "mask_suffix": "_mask"}),
        ("labels/GT-{}.png", {"masks": "labels", "mask_prefix": "GT-"}),
        ("bad/masks/{}.bmp", {"masks": "bad/masks"}),
        ("bad/{}_label.bmp", {"mask_beside": True, "mask_suffix": "_label"}),
        ("bad/{}.png", {"mask_beside": True}),
    ],
)
def test_names_and_places_of_masks(tmp_path, masks, options):
    draw(tmp_path, *some("good"), *(f"bad/p{n}.jpg" for n in range(3)), *(masks.format(f"p{n}") for n in range(3)))
    detected, _ = found(tmp_path)
    assert detected.options.items() >= options.items()
    assert (detected.masks, detected.counts["test_anomalous"]) == (3, 3)


def test_masks_within_defects(tmp_path):
    for defect in ("scratch", "dent"):
        draw(tmp_path, *some(f"{defect}/images", 2), *some(f"{defect}/masks", 2))
    draw(tmp_path, *some("good"))
    detected, _ = found(tmp_path)
    assert detected.masks == detected.counts["test_anomalous"] == 4


def test_masks_that_fit_nothing_are_told(tmp_path):
    draw(tmp_path, *some("good"), *some("bad", 2), "masks/x.png")
    detected, _ = found(tmp_path)
    assert detected.masks == 0
    assert (
        "masks/ (1 image) was not taken for masks: no file in it is named like a defective image" in detected.warnings
    )


@pytest.mark.parametrize("form", ["beside", "folders", "divided"])
def test_masks_that_alone_tell_labels(tmp_path, form):
    image, mask = {
        "beside": ("item{item}/part{n}.jpg", "item{item}/part{n}_label.png"),
        "folders": ("images/{item}-{n}.jpg", "masks/{item}-{n}.png"),
        "divided": ("{split}/{item}{n}.png", "{split}/{item}{n}_GT.png"),
    }[form]
    for item in range(4):
        for n in range(5):
            names = {"item": item, "n": n, "split": "test" if item == 3 else "train"}
            draw(tmp_path, image.format(**names))
            draw(tmp_path, mask.format(**names), value=255 if n == 0 else 0)
    detected, _ = found(tmp_path)
    assert detected.options["label_by_mask"] is True
    assert sum(detected.counts.values()) == 20
    assert detected.counts["test_anomalous"] == detected.masks == 4
    assert detected.counts["test_normal"] == (4 if form == "divided" else 3)


# ---- nothing but images, and what cannot be told --------------------------------------------------------------------


def test_a_flat_folder_is_normal(tmp_path):
    draw(tmp_path, *(f"Bild {number}.JPG" for number in range(10)))
    detected, _ = found(tmp_path)
    assert detected.counts == {"train_normal": 8, "test_normal": 2}
    assert detected.decisions[0] == "all images → normal, since no folder and no table says otherwise (10 images)"
    assert "no anomalous images: how well they are found cannot be measured" in detected.warnings


def asks(root, sentence, *commands):
    with pytest.raises(OptionError) as caught:
        detect_layout(root)
    message = str(caught.value)
    assert sentence in message
    for command in commands:
        assert command in message
    return message


def test_file_names_that_speak_of_defects(tmp_path):
    draw(tmp_path, "cast_def_0.png", "cast_ok_1.png", "cast_ok_2.png")
    asks(tmp_path, "the names of 1 of 3 images in the folder speak of defects (cast_def_0.png)",
         f"unianom inspect {tmp_path} --layout folder --layout_options.normal .")  # fmt: skip


def test_folders_whose_names_say_nothing(tmp_path):
    root = tmp_path / "my parts"
    draw(root, *some("left", 3), *some("right", 2))
    message = asks(root, "no folder name says what is normal; found: left/ (3 images), right/ (2 images)")
    assert f"'{root}' --layout folder --layout_options.normal left --layout_options.abnormal '[right]'" in message
    draw(root, *some("broken", 2))
    asks(root, "broken sounds defective, but no folder name says what is normal")


def test_classes_are_asked_for(tmp_path):
    draw(
        tmp_path,
        *(path for name in ("cat", "dog") for split in ("train", "test") for path in some(f"{split}/{name}", 2)),
    )
    asks(tmp_path, "no name of a folder in train and test says what is normal",
         "--layout class_folders --layout_options.normal_classes '[cat]'")  # fmt: skip
    root = tmp_path / "species"
    drawn.draw_classes(root)
    asks(root, "holds 3 classes (ant, bee, cat)", "--layout class_folders --layout_options.normal_classes '[ant]'")


def test_only_defects(tmp_path):
    draw(tmp_path, *some("bad", 3), *some("ng", 2))
    asks(tmp_path, "there are only defective images (bad, ng) and no normal ones to learn from")


def test_splits_that_are_named_twice(tmp_path):
    draw(tmp_path, *some("train/ok"), *some("test/ok"), *some("Testing/ok"))
    asks(tmp_path, "Testing, test both sound like the split 'test'")


def test_normal_images_beside_a_set(tmp_path):
    draw(tmp_path, *some("good"), *some("more/good"), *some("more/bad"))
    asks(tmp_path, "more lies beside normal images in the root and holds more/bad, more/good itself")


def test_what_holds_no_images(tmp_path):
    for make, sentence in (
        (lambda: None, "no images in"),
        (lambda: (tmp_path / "a/b").mkdir(parents=True), "nor in the 2 folders below it; found: a/"),
        (lambda: (tmp_path / "notes.txt").write_text("…"), "found: a/, notes.txt; images are files that end in .png"),
    ):
        make()
        with pytest.raises(DataError, match=sentence):
            detect_layout(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        detect_layout(tmp_path / "none")
    draw(tmp_path, "one.png")
    with pytest.raises(DataError, match=r"one\.png is one image; name the folder"):
        detect_layout(tmp_path / "one.png")
    (tmp_path / "all.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is an archive; unpack it"):
        detect_layout(tmp_path / "all.zip")


def test_what_is_not_taken_is_told(tmp_path):
    draw(
        tmp_path, *some("train/good"), *some("test/good", 2), *some("test/bad", 2), "test/loose.png", "test/good/a.gif"
    )
    draw(tmp_path, *some("results", 4))
    warnings = "\n".join(found(tmp_path)[0].warnings)
    assert "not taken for anything: results/ (4 images)" in warnings
    assert "1 image beside the folders in test: not taken" in warnings
    assert "files that are no images that can be read: 1 .gif" in warnings


def test_a_loop_of_links(tmp_path):
    draw(tmp_path, *some("good"), *some("bad", 2))
    (tmp_path / "good/back").symlink_to("..")
    detected, _ = found(tmp_path)
    assert sum(detected.counts.values()) == 12
    assert "links that lead back to a folder they lie in, not followed: good/back" in detected.warnings


def test_every_folder_is_listed_once(tmp_path, monkeypatch):
    draw(tmp_path, *some("train/good"), *some("test/good"), *some("test/bad"), *some("masks"))
    listed = Counter()
    infos = Source._infos
    monkeypatch.setattr(Source, "_infos", lambda self, path: listed.update([self.uri(path)]) or infos(self, path))
    detect_layout(tmp_path)
    assert listed == dict.fromkeys(listed, 1)
    assert len(listed) == 7


def test_a_whole_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unianom.data.layout_detection.tree.MOST_FOLDERS", 3)
    draw(tmp_path, *(f"{name}/0.png" for name in "abcd"))
    with pytest.raises(DataError, match="holds more than 3 folders; name that of one data set"):
        detect_layout(tmp_path)
    assert MOST_FOLDERS > 1000


def test_object_store(tmp_path):
    fs = fsspec.filesystem("memory")
    draw(tmp_path, *some("good"), *some("bad", 2))
    for file in tmp_path.rglob("*.png"):
        fs.pipe_file(f"/bucket/set/{file.relative_to(tmp_path)}", file.read_bytes())
    try:
        detected, refs = found("memory://bucket/set")
        assert detected.counts == {"train_normal": 8, "test_normal": 2, "test_anomalous": 2}
        assert detected.decisions[0] == "good/ → normal (10 images)"
        assert refs[0].uri == "memory:///bucket/set/good/0.png"
    finally:
        fs.rm("/bucket", recursive=True)


# ---- tables ---------------------------------------------------------------------------------------------------------


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        mark = {".csv": ";", ".tsv": "\t"}[path.suffix]
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\ufeff" + "\n".join(mark.join(map(str, line)) for line in lines))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("name", "label", "values", "normal"),
    [
        ("{}.png", "label", ("ok", "scratch"), ["ok"]),
        ("pictures/{}.png", "is_good", (True, False), None),
        ("{}", "anomaly", (0, 1), ["0"]),
        ("{}.png", "class", (0, 1), ["0"]),
    ],
)
def test_a_table_of_labels(tmp_path, ending, name, label, values, normal):
    draw(tmp_path, *some("pictures", 12))
    rows = [{"file": name.format(n), label: values[n >= 10], "remark": "x"} for n in range(12)]
    write_table(tmp_path / f"table{ending}", rows)
    for source in (tmp_path, tmp_path / f"table{ending}"):
        detected, refs = found(source)
        assert detected.layout == "labels"
        assert detected.counts == {"train_normal": 8, "test_normal": 2, "test_anomalous": 2}
        if normal:
            assert detected.options["normal"] == normal
        anomalous = {ref.uri.rpartition("/")[2]: ref.defect for ref in refs if ref.label}
        assert anomalous == dict.fromkeys(("10.png", "11.png"), "scratch" if label == "label" else "anomaly")
    assert any("as usual" in warning for warning in detected.warnings) == (label == "class")


def test_further_columns_of_a_table(tmp_path):
    draw(tmp_path, *some("a", 4), *some("b", 2), "m/3.png")
    write_table(tmp_path / "all.csv", [
        {"path": "a/0.png", "status": "pass", "split": "Train", "product": "p", "defect_type": "", "mask": ""},
        {"path": "a/1.png", "status": "pass", "split": "test", "product": "p", "defect_type": "", "mask": ""},
        {"path": "a/2.png", "status": "fail", "split": "train", "product": "p", "defect_type": "dent", "mask": ""},
        {"path": "a/3.png", "status": "fail", "split": "test", "product": "p", "defect_type": "cut", "mask": "m/3.png"},
        {"path": "b/0.png", "status": "pass", "split": "train", "product": "q", "defect_type": "", "mask": ""},
        {"path": "b/1.png", "status": "", "split": "test", "product": "q", "defect_type": "", "mask": ""},
    ])  # fmt: skip
    assert samples(tmp_path, categories=True) == {
        "a/0.png": ("p", "train", 0, "good"),
        "a/1.png": ("p", "test", 0, "good"),
        "a/2.png": ("p", "test", 1, "dent"),
        "a/3.png": ("p", "test", 1, "cut"),
        "b/0.png": ("q", "train", 0, "good"),
        "b/1.png": ("q", "test", None, None),
    }
    assert found(tmp_path)[0].masks == 1


def test_tables_that_leave_something_open(tmp_path):
    draw(tmp_path, *(f"{number}.png" for number in range(4)))

    def table(**columns):
        rows = [
            dict(zip(["image", *columns], [f"{n}.png", *(values[n] for values in columns.values())])) for n in range(4)
        ]
        write_table(tmp_path / "t.csv", rows)

    table(label="aabb")
    asks(tmp_path, "the values of t.csv do not say what is normal: label (a, b)",
         "--layout labels --layout_options.table t.csv --layout_options.image image")  # fmt: skip
    table(colour="abab")
    asks(tmp_path, "no column of t.csv is named like one of labels; its columns: colour")
    table(ok="0011", anomaly="0011")
    asks(tmp_path, "several columns of t.csv could be the labels: ok, anomaly")
    table(label="0011")
    write_table(tmp_path / "u.tsv", [{"image": f"{n}.png", "label": 0} for n in range(4)])
    asks(tmp_path, "more than one table names the images: t.csv, u.tsv")
    (tmp_path / "u.tsv").write_text("part\tprice\nx\t3\n")  # names no images: none of ours
    assert numbers(tmp_path) == {"train_normal": 1, "test_normal": 1, "test_anomalous": 2}
    (tmp_path / "x.csv").write_text("part,price\nx,3\n")
    with pytest.raises(DataError, match=r"no column of .*x\.csv names images"):
        detect_layout(tmp_path / "x.csv")


def test_a_table_beside_folders_of_normal_and_defective_images(tmp_path):
    draw(tmp_path, *some("good"), *some("bad", 2))
    rows = [{"file": f"good/{n}.png", "label": "ok"} for n in range(10)]
    rows += [{"file": f"bad/{n}.png", "label": "ng"} for n in range(2)]
    write_table(tmp_path / "t.csv", rows)
    detected, _ = found(tmp_path)
    assert detected.layout == "folder"
    assert "t.csv says the same of the images that it names" in detected.decisions
    rows[0]["label"] = "ng"
    write_table(tmp_path / "t.csv", rows)
    asks(tmp_path, "folder names and t.csv label images differently", "--layout labels", "--layout folder")


# ---- published layouts ----------------------------------------------------------------------------------------------


def draw_btad(root):
    draw(root, *(f"0{n}/{place}/0.png" for n in (1, 2, 3) for place in ("train/ok", "test/ok", "test/ko")))


def draw_vad(root):
    draw(root, "train/good/0.png", "train/bad/0.png")
    draw(root, *(f"test/{name}/9.png" for name in ("good", "bad", "bad_unseen_defects")))


def draw_oct(root):
    draw(root, "train/NORMAL/0.jpeg", "train/CNV/0.jpeg")
    draw(root, *(f"test/{name}/9.jpeg" for name in ("CNV", "DME", "DRUSEN", "NORMAL")))


def draw_polyps(root):
    for name in ("Kvasir", "CVC-ClinicDB"):
        draw(root, *(f"{name}/{split}/{kind}/0.png" for split in ("train", "test") for kind in ("images", "masks")))


def draw_aptos(root):
    draw(root, "train_images/a.png", *(f"train_images/n{number}.png" for number in range(1001)))
    (root / "train.csv").write_text("id_code,diagnosis\na,3\n" + "".join(f"n{n},0\n" for n in range(1001)))


def draw_manifest(root):
    drawn.write_rows(root / "train.json", {**drawn.TRAIN_ROW, "filename": "a/0.png"})
    drawn.write_rows(root / "test.json", {**drawn.TRAIN_ROW, "filename": "a/1.png"})
    draw(root, "a/0.png", "a/1.png")


PUBLISHED = {
    "mvtec": drawn.draw_mvtec,
    "visa": drawn.draw_visa,
    "btad": draw_btad,
    "mtd": drawn.draw_mtd,
    "kolektor": drawn.draw_kolektor,
    "mvtec3d": drawn.draw_mvtec3d,
    "vad": draw_vad,
    "aptos": draw_aptos,
    "oct2017": draw_oct,
    "isic2018": drawn.draw_isic,
    "polyps": draw_polyps,
    "ped2": drawn.draw_ped2,
    "manifest": draw_manifest,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(tmp_path, name):
    PUBLISHED[name](tmp_path / "set")
    detected, refs = found(tmp_path / "set")
    assert detected.layout == name
    assert detected.decisions
    if name not in ("aptos", "manifest"):  # their names are those of the layout, as without detection
        assert refs == list(iter_samples(name, tmp_path / "set", make_options(LAYOUTS[name], detected.options)))
    if name not in ("mvtec", "manifest"):
        assert {ref.dataset for ref in refs} == {name}


def test_one_category_of_mvtec_and_own_ones_of_its_shape(tmp_path):
    drawn.draw_mvtec(tmp_path / "mvtec")
    assert found(tmp_path / "mvtec/bottle")[1] == found(tmp_path / "mvtec")[1][:6]
    for name in (
        "train/good/0.png",
        "train/good/1.png",
        "test/good/0.png",
        "test/cut/0.png",
        "ground_truth/cut/0_mask.png",
    ):
        draw(tmp_path / "own/gears", name)
    draw(tmp_path / "own/photos", "0.png")
    detected, refs = found(tmp_path / "own")
    assert (detected.layout, detected.options) == ("mvtec", {"dataset": "own", "categories": ["gears"]})
    assert refs[0].sample_id == "own/gears/train/good/0.png"
    assert found(tmp_path / "own/gears")[0].counts == detected.counts
    assert [(ref.category, ref.mask_uri) for ref in refs if ref.label] == [
        ("gears", f"{tmp_path}/own/gears/ground_truth/cut/0_mask.png")
    ]
    # Without normal images to test the folder layout reads it, which holds some out.
    (tmp_path / "own/gears/test/good").rename(tmp_path / "elsewhere")
    detected, refs = found(tmp_path / "own/gears")
    assert detected.layout == "folder"
    assert detected.counts == {"train_normal": 1, "test_normal": 1, "test_anomalous": 1}
    assert detected.masks == 1


def test_cifar_and_merged_files(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="pickles can run code and are not opened"):
        detect_layout(tmp_path)
    drawn.draw_mvtec(tmp_path / "sets/mvtec")
    (tmp_path / "all.yaml").write_text("- {layout: mvtec, source: sets/mvtec}")
    assert found(tmp_path / "all.yaml")[0].layout == "merged"


def test_a_manifest_file(tmp_path):
    rows = [{"filename": f"{n}.png", "split": "train", "category": "x", "label": 0} for n in range(3)]
    drawn.write_rows(tmp_path / "all.jsonl", *rows)
    assert found(tmp_path / "all.jsonl")[0].layout == "manifest"


# ---- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "layout", "counts", "masks"),
    [
        ("casting", "folder", {"train_normal": 400, "test_normal": 150, "test_anomalous": 350}, 0),
        ("cookie", "folder", {"train_normal": 31, "test_normal": 14, "test_anomalous": 40}, 32),
        ("kolektor_sdd", "kolektor", {"train_normal": 175, "test_normal": 173, "test_anomalous": 52}, 52),
        ("magnetic_tile", "mtd", {"train_normal": 762, "test_normal": 190, "test_anomalous": 392}, 392),
        ("photos", "folder", {"train_normal": 64, "test_normal": 16}, 0),
    ],
)
def test_real_sets(real_data, name, layout, counts, masks):
    detected = detect_layout(real_data / "images" / name)
    assert (detected.layout, detected.counts, detected.masks) == (layout, counts, masks)

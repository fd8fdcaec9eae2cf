"""The `folder` layout on folders that are divided, named and masked in many ways, read as they lie."""

from collections import Counter

import pytest

from tests.data.test_layouts import draw, facts, fails, left_out, lowest_hashes
from unianom.data.layouts import iter_samples
from unianom.data.layouts.folder import FolderOptions
from unianom.errors import DataError, OptionError


def read(root, **options):
    """(path, split, label, defect, mask) of each sample; the category where there are several."""
    found = facts(iter_samples("folder", root, FolderOptions(**options)), root)
    shown = slice(1, None) if options.get("categories") else slice(2, None)
    return {row[0].partition("/")[2]: row[shown] for row in found}


def test_divided_folders_of_other_names(tmp_path):
    draw(tmp_path, "train/good/0.png", "test/normal/1.png", "test/bad/2.png", "test/new/3.png", "val/good/4.png")
    assert read(tmp_path, normal=("good", "normal"), abnormal=("bad",), unknown=("new",)) == {
        "train/good/0.png": ("train", 0, "good", None),
        "val/good/4.png": ("val", 0, "good", None),
        "test/normal/1.png": ("test", 0, "good", None),
        "test/bad/2.png": ("test", 1, "bad", None),
        "test/new/3.png": ("test", None, None, None),
    }


def test_folders_of_splits_of_other_names(tmp_path):
    draw(tmp_path, "Training/OK/0.png", "Testing/OK/1.png", "Testing/NG/2.png", "Valid/OK/3.png", "Training/NG/4.png")
    names = {"train_folder": "Training", "test_folder": "Testing", "val_folder": "Valid"}
    assert read(tmp_path, normal="OK", abnormal=("NG",), abnormal_train="test", **names) == {
        "Training/OK/0.png": ("train", 0, "good", None),
        "Valid/OK/3.png": ("val", 0, "good", None),
        "Testing/OK/1.png": ("test", 0, "good", None),
        "Training/NG/4.png": ("test", 1, "NG", None),
        "Testing/NG/2.png": ("test", 1, "NG", None),
    }


def test_folders_that_name_their_split_themselves(tmp_path):
    draw(tmp_path, "ok_train/0.png", "ok_test/1.png", "ok_val/a/2.png", "bad/3.png")
    options = {"normal": "ok_train", "test_normal": ("ok_test",), "val_normal": ("ok_val",), "abnormal": ("bad",)}
    assert read(tmp_path, **options) == {
        "ok_train/0.png": ("train", 0, "good", None),
        "ok_val/a/2.png": ("val", 0, "good", None),
        "ok_test/1.png": ("test", 0, "good", None),
        "bad/3.png": ("test", 1, "bad", None),
    }


def test_normal_images_that_lie_loose_in_train(tmp_path):
    """Paths are taken where no folder of splits has such a name; their first part is the split."""
    draw(tmp_path, "train/0.png", "test/ok/1.png", "test/dent/2.png", "train/odd/3.png", "val/4.png")
    found = read(tmp_path, normal=("train", "test/ok", "val"), abnormal=("test/dent", "train/odd"))
    assert found == {
        "train/0.png": ("train", 0, "good", None),
        "test/ok/1.png": ("test", 0, "good", None),
        "val/4.png": ("val", 0, "good", None),
        "test/dent/2.png": ("test", 1, "dent", None),
        "train/odd/3.png": ("train", 1, "odd", None),
    }


def test_a_share_is_tested_where_no_folder_holds_normal_images_to_test(tmp_path):
    paths = [f"train/ok/{number}.png" for number in range(10)]
    draw(tmp_path, *paths, "test/bad/0.png")
    found = read(tmp_path, normal="train/ok", abnormal=("test/bad",), train_fraction=0.7, seed=2)
    assert {path for path, row in found.items() if row[:2] == ("test", 0)} == set(lowest_hashes(paths, 3, seed=2))
    assert found["test/bad/0.png"] == ("test", 1, "bad", None)
    # By its name in train the folder is taken whole, as before there were paths.
    assert {row[0] for row in read(tmp_path, normal="ok", abnormal=("bad",)).values() if row[1] == 0} == {"train"}


def test_normal_images_loose_in_the_root_with_folders_of_defects(tmp_path):
    draw(tmp_path, *(f"{number}.png" for number in range(5)), "old/5.png", "bad/6.png", "masks/6.png")
    found = read(tmp_path, normal=".", abnormal=("bad",), masks="masks")
    assert Counter(row[:2] for row in found.values()) == {("train", 0): 5, ("test", 0): 1, ("test", 1): 1}
    assert found["bad/6.png"] == ("test", 1, "bad", "masks/6.png")


@pytest.mark.parametrize("split_first", [False, True])
def test_categories(tmp_path, split_first):
    def place(category, split, rest):
        return f"{split}/{category}/{rest}" if split_first else f"{category}/{split}/{rest}"

    draw(tmp_path, *(place(name, split, "ok/0.png") for name in ("bolt", "nut") for split in ("train", "test")))
    draw(tmp_path, place("bolt", "test", "dent/0.png"), place("nut", "test", "rust/0.png"))
    draw(tmp_path, "masks/bolt/dent/0.png", "masks/nut/rust/0.png")
    expected = {
        place("bolt", "train", "ok/0.png"): ("bolt", "train", 0, "good", None),
        place("bolt", "test", "ok/0.png"): ("bolt", "test", 0, "good", None),
        place("bolt", "test", "dent/0.png"): ("bolt", "test", 1, "dent", "masks/bolt/dent/0.png"),
        place("nut", "train", "ok/0.png"): ("nut", "train", 0, "good", None),
        place("nut", "test", "ok/0.png"): ("nut", "test", 0, "good", None),
        place("nut", "test", "rust/0.png"): ("nut", "test", 1, "rust", "masks/nut/rust/0.png"),
    }
    for abnormal in (("*",), ("dent", "rust")):
        assert read(tmp_path, categories=("*",), normal="ok", abnormal=abnormal, masks="masks") == expected
    one = read(tmp_path, categories=("nut",), normal="ok", abnormal=("*",))
    assert {row[0] for row in one.values()} == {"nut"}
    unnamed, _ = left_out("folder", tmp_path, FolderOptions(categories=("nut",), normal="ok", abnormal=("rust",)))
    assert unnamed["folders"]["images"] == 3 + 2  # of the other category, and masks that nothing names
    options = FolderOptions(categories=("*",), normal="ok", abnormal=("rust", "hole"), masks="masks")
    fails(DataError, "no folder hole in", "folder", tmp_path, options)
    fails(OptionError, "no category 'nuts'", "folder", tmp_path, FolderOptions(categories=("nuts",), normal="ok"))


def test_categories_that_are_not_divided(tmp_path):
    draw(tmp_path, *(f"{name}/ok/{number}.png" for name in "ab" for number in range(5)), "a/ng/0.png", "a/gt/0_m.png")
    found = read(tmp_path, categories=("*",), normal="ok", abnormal=("ng",), masks="gt", mask_suffix="_m")
    assert Counter(row[:3] for row in found.values()) == {
        ("a", "train", 0): 4, ("a", "test", 0): 1, ("a", "test", 1): 1, ("b", "train", 0): 4, ("b", "test", 0): 1,
    }  # fmt: skip
    assert found["a/ng/0.png"][-1] == "a/gt/0_m.png"


def test_images_in_a_folder_of_their_own_and_masks_within_defects(tmp_path):
    draw(tmp_path, "images/ok/0.png", "images/ok/1.png", "images/dent/images/0.png", "images/hole/images/0.png")
    draw(tmp_path, "images/dent/masks/0.png", "images/hole/masks/0.png")
    masks = ("images/dent/masks", "images/hole/masks")
    found = read(tmp_path, images="images", normal="ok", abnormal=("dent", "hole"), masks=masks)
    assert found["images/dent/images/0.png"] == ("test", 1, "dent", masks[0] + "/0.png")
    assert found["images/hole/images/0.png"] == ("test", 1, "hole", masks[1] + "/0.png")
    assert len(found) == 4


def test_a_mask_of_a_normal_image_is_not_borrowed(tmp_path):
    draw(tmp_path, "ok/0.png", "cut/0.png", "cut/1.png", "gt/ok/0.png", "gt/cut/1.png")
    found = read(tmp_path, normal="ok", abnormal=("cut",), masks="gt")
    assert (found["cut/0.png"][-1], found["cut/1.png"][-1]) == (None, "gt/cut/1.png")


def test_masks_beside_their_images(tmp_path):
    draw(tmp_path, "ok/0.jpg", "ok/0.png", "bad/1.jpg", "bad/1.png", "bad/2.jpg", "bad/3.bmp", "ok/4.png")
    found = read(tmp_path, normal="ok", abnormal=("bad",), mask_beside=True)
    assert {path: row[-1] for path, row in found.items()} == {
        "ok/0.jpg": None, "ok/4.png": None, "bad/1.jpg": "bad/1.png", "bad/2.jpg": None, "bad/3.bmp": None,
    }  # fmt: skip
    named = tmp_path / "named"
    draw(named, "ok/0.png", "bad/gt_1_m.png", "bad/1.png", "bad/gt_9_m.png")
    found = read(named, normal="ok", abnormal=("bad",), mask_beside=True, mask_prefix="gt_", mask_suffix="_m")
    assert {path: row[-1] for path, row in found.items()} == {"ok/0.png": None, "bad/1.png": "bad/gt_1_m.png"}
    draw(tmp_path, "bad/1.bmp")
    options = FolderOptions(normal="ok", abnormal=("bad",), mask_beside=True)
    fails(DataError, "it is not clear which is the mask of which: bad/1.bmp, bad/1.jpg, bad/1.png", "folder", tmp_path,
          options)  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_labels_from_masks(tmp_path, beside):
    images = [f"images/{number}.jpg" for number in range(6)]
    draw(tmp_path, *images)
    masks = [f"images/{number}_GT.png" if beside else f"masks/{number}_GT.png" for number in range(6)]
    draw(tmp_path, *masks[:4], value=0)
    draw(tmp_path, masks[4], value=255)
    options = {"mask_beside": True} if beside else {"masks": "masks"}
    found = read(tmp_path, images="images", label_by_mask=True, mask_suffix="_GT", **options)
    (tested,) = lowest_hashes([*images[:4], images[5]], 1)  # the last has no mask at all
    assert found == {
        path: ("test", 1, "anomaly", masks[4]) if number == 4
        else ("test" if path == tested else "train", 0, "good", None)
        for number, path in enumerate(images)
    }  # fmt: skip
    (tmp_path / masks[0]).write_bytes(b"no image")
    fails(DataError, "cannot be read, so the label is unknown", "folder", tmp_path,
          FolderOptions(images="images", label_by_mask=True, mask_suffix="_GT", **options))  # fmt: skip


def test_labels_from_masks_of_divided_images(tmp_path):
    draw(tmp_path, "train/0.png", "train/1.png", "test/2.png", "test/3.png")
    draw(tmp_path, "train/0_GT.png", "test/2_GT.png", value=0)
    draw(tmp_path, "train/1_GT.png", "test/3_GT.png", value=255)
    options = {"label_by_mask": True, "mask_beside": True, "mask_suffix": "_GT"}
    assert {path: row[:2] for path, row in read(tmp_path, **options).items()} == {
        "train/0.png": ("train", 0), "train/1.png": ("train", 1), "test/2.png": ("test", 0), "test/3.png": ("test", 1),
    }  # fmt: skip
    assert read(tmp_path, abnormal_train="test", **options)["train/1.png"][0] == "test"


def test_what_does_not_go_together(tmp_path):
    draw(tmp_path, "train/ok/0.png", "test/ok/1.png", "test/ko/2.png")
    named = FolderOptions(normal=("ok", "train/ok"))
    fails(OptionError, f"two names mean one folder, {tmp_path}/train/ok", "folder", tmp_path, named)
    fails(DataError, f"no train/test/ok under {tmp_path}", "folder", tmp_path, FolderOptions(normal="test/ok"))
    fails(DataError, "no folder good in train, test of", "folder", tmp_path,
          FolderOptions(normal="ok", test_normal=("good",)))  # fmt: skip
    fails(DataError, f"no folder {tmp_path}/none", "folder", tmp_path, FolderOptions(normal="ok", images="none"))
    for bad, word in (
        ({"unlabelled": True, "unknown": ("new",)}, "excludes"),
        ({"label_by_mask": True}, "needs masks"),
        ({"label_by_mask": True, "masks": "m", "normal": "ok"}, "excludes"),
        ({"normal": "ok", "abnormal": ("ko",), "masks": "m", "mask_beside": True}, "exclude each other"),
        ({"normal": "ok", "mask_beside": True}, "needs abnormal"),
        ({"normal": "ok", "category": "a", "categories": ("b",)}, "exclude each other"),
        ({"normal": "ok", "test_normal": ("ok",)}, "twice"),
    ):
        with pytest.raises(OptionError, match=word):
            FolderOptions(**bad)


def test_what_no_option_names_is_told_at_every_depth(tmp_path):
    draw(tmp_path, "set/train/ok/0.png", "set/test/ok/1.png", "set/test/ko/2.png", "set/test/3.png", "loose.png")
    draw(tmp_path, "set/extra/4.png", "other/deep/5.png", "masks/2.png")
    options = FolderOptions(images="set", normal="ok", abnormal=("ko",), masks="masks")
    summary, paths = left_out("folder", tmp_path, options)
    assert len(paths) == 3
    assert summary["folders"]["examples"] == [f"{tmp_path}/other", f"{tmp_path}/set/extra"]
    assert summary["files"][".png"]["count"] == 2

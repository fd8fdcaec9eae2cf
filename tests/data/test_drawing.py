from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from unianom.data.drawing import DEFECTS, draw_corpus, draw_sample
from unianom.errors import DataError, OptionError

SIZE = 64
ALL_DEFECTS = [(category, defect) for category, defects in DEFECTS.items() for defect in defects]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("corpus")
    draw_corpus(root, train=3, good=2, per_defect=2, size=SIZE, seed=4)
    return contents(root)


def test_layout_is_that_of_mvtec(corpus: dict[str, bytes]) -> None:
    expected = set()
    for category, defects in DEFECTS.items():
        expected |= {f"{category}/train/good/00{i}.png" for i in range(3)}
        expected |= {f"{category}/test/good/00{i}.png" for i in range(2)}
        for defect in defects:
            expected |= {f"{category}/test/{defect}/00{i}.png" for i in range(2)}
            expected |= {f"{category}/ground_truth/{defect}/00{i}_mask.png" for i in range(2)}
    assert set(corpus) == expected
    assert len(DEFECTS) >= 4
    assert all(2 <= len(defects) <= 3 for defects in DEFECTS.values())


def test_pictures_are_rgb_and_masks_black_and_white(corpus: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "file.png"
    for name, content in corpus.items():
        file.write_bytes(content)
        with Image.open(file) as image:
            assert image.size == (SIZE, SIZE)
            assert image.mode == ("L" if "ground_truth" in name else "RGB")
            if image.mode == "L":
                assert set(np.unique(np.asarray(image))) == {0, 255}, name


def test_no_picture_comes_twice(corpus: dict[str, bytes]) -> None:
    pictures = [content for name, content in corpus.items() if "ground_truth" not in name]
    assert len(set(pictures)) == len(pictures)


def test_bytes_depend_neither_on_counts_nor_on_order(corpus: dict[str, bytes], tmp_path: Path) -> None:
    draw_corpus(tmp_path, categories=("cap", "weave"), train=1, good=3, per_defect=1, size=SIZE, seed=4)
    again = contents(tmp_path)
    shared = set(again) & set(corpus)
    assert len(shared) == 2 * (1 + 2 + 3 + 3)
    assert all(again[name] == corpus[name] for name in shared)


def test_drawing_again_changes_nothing_and_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        draw_corpus(tmp_path, categories=["grain"], train=2, good=0, per_defect=0, size=SIZE)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"train/good/001\.png does not belong"):
        draw_corpus(tmp_path, categories=["grain"], train=1, good=0, per_defect=0, size=SIZE, seed=1)
    assert contents(tmp_path) == before
    assert len(before) == 2


def test_a_file_holds_what_draw_sample_gives(corpus: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(corpus["cog/train/good/002.png"])
    image, mask = draw_sample("cog", 2, seed=4, size=SIZE)
    assert image.dtype == np.uint8
    assert mask.dtype == bool
    assert not mask.any()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "0.png")), image)


@pytest.mark.parametrize(("category", "defect"), ALL_DEFECTS)
def test_a_defect_changes_its_mask_and_nothing_else(category: str, defect: str) -> None:
    for index, size in [(0, SIZE), (1, SIZE), (2, SIZE), (3, 101), (4, 160)]:
        clean, nothing = draw_sample(category, index, None, size=size)
        image, mask = draw_sample(category, index, defect, size=size)
        assert image.shape == clean.shape == (size, size, 3)
        assert mask.shape == (size, size)
        assert not nothing.any()
        assert 3 <= mask.sum() < 0.1 * mask.size

        difference = np.abs(image.astype(int) - clean).max(axis=-1)
        assert (difference[mask] > 0).mean() > 0.95
        assert difference[mask].mean() > 3, "a defect that cannot be seen"
        beyond = ~binary_dilation(mask, np.ones((3, 3), bool))
        assert not difference[beyond].any(), "the picture changes away from the mask"


@pytest.mark.parametrize(("category", "defect"), [("weave", "hole"), ("grain", "wormhole"), ("cog", "crack")])
def test_openings_are_darker_than_what_they_open(category: str, defect: str) -> None:
    clean, _ = draw_sample(category, 5, size=SIZE)
    image, mask = draw_sample(category, 5, defect, size=SIZE)
    assert image[mask].mean() < 0.8 * clean[mask].mean()


@pytest.mark.parametrize("category", DEFECTS)
def test_index_seed_and_defect_each_vary_the_picture(category: str) -> None:
    first, _ = draw_sample(category, 0, size=SIZE)
    for other, _ in (draw_sample(category, 1, size=SIZE), draw_sample(category, 0, seed=1, size=SIZE)):
        assert np.abs(first.astype(int) - other).mean() > 4
    masks = [draw_sample(category, index, DEFECTS[category][0], size=SIZE)[1] for index in (0, 1)]
    assert (masks[0] != masks[1]).any()


def test_categories_lie_further_apart_than_their_pictures() -> None:
    def summary(category: str, index: int) -> np.ndarray:
        image, _ = draw_sample(category, index, size=SIZE)
        detail = (
            np.abs(np.diff(image.astype(float), axis=0)).mean(),
            np.abs(np.diff(image.astype(float), axis=1)).mean(),
        )
        return np.array([*image.mean(axis=(0, 1)), *image.std(axis=(0, 1)), *detail])

    summaries = {category: np.stack([summary(category, index) for index in range(4)]) for category in DEFECTS}
    spread = {c: np.linalg.norm(s - s.mean(axis=0), axis=1).max() for c, s in summaries.items()}
    for a in DEFECTS:
        for b in DEFECTS:
            if a < b:
                apart = np.linalg.norm(summaries[a].mean(axis=0) - summaries[b].mean(axis=0))
                assert apart > spread[a] + spread[b], (a, b)


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown category 'weaves'; did you mean 'weave'\?"):
        draw_sample("weaves", 0)
    with pytest.raises(OptionError, match=r"unknown category 'cat'; did you mean 'cap'\?"):
        draw_corpus(tmp_path, categories=("weave", "cat"))
    with pytest.raises(OptionError, match=r"unknown defect of cog 'cracks'; did you mean 'crack'\?"):
        draw_sample("cog", 0, "cracks")
    assert not contents(tmp_path)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    for size in (63, 1025):
        with pytest.raises(OptionError, match=rf"size is {size}; give a number from 64 to 1024"):
            draw_sample("weave", 0, size=size)
        with pytest.raises(OptionError, match="size is"):
            draw_corpus(tmp_path, size=size)
    with pytest.raises(OptionError, match="per_defect is -1"):
        draw_corpus(tmp_path, per_defect=-1)
    with pytest.raises(OptionError, match="seed is -1; give a number of 0 or more"):
        draw_sample("weave", 0, seed=-1)
    with pytest.raises(OptionError, match="index is -1"):
        draw_sample("weave", -1)
    assert not contents(tmp_path)

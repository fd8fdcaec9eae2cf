"""The order of training images, and what batches are made of."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.data import reader
from pipelines.data.cache_writer import CacheWriter, range_task
from pipelines.data.extractors import Extractor
from pipelines.data.feature_cache import CachedFeatures
from pipelines.data.image_source import SampleSource
from pipelines.training.augment import flip_and_turn
from pipelines.training.dataset import (
    PreparedFeatures,
    PreparedImages,
    ShardImages,
    TrainingSet,
    descriptors,
    to_input,
)
from pipelines.training.loader import BatchLoader
from pipelines.training.prepared import FrozenFeatures, PreparedPixels, learnable, normals
from pipelines.training.sampler import NEAREST_PROMPTS, ReferenceSampler, StepSampler
from pipelines.training.samples import TrainingImages
from tests.methods.test_trained import flat
from tests.pipelines.sharded import (
    CATEGORIES,
    LABELLED,
    LABELLED_PARTS,
    LIMITS,
    NORMALS,
    POLICY,
    SIDE,
    sample,
    truth,
    write_shards,
)
from unianom.configs.synthesis import SynthesisConfig
from unianom.configs.training import Augmentation
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.shards import Selection, ShardSet
from unianom.data.synthesis import Synthesiser
from unianom.data.tensors import normalise
from unianom.errors import DataError, OptionError
from unianom.execution import CPU
from unianom.methods.trained import BatchSpec, FeatureMaps, TrainedMethod, TrainingBatch

# ---- order --------------------------------------------------------------------------------------------------------


def run_of(order: StepSampler, steps: int) -> list[tuple[int, int]]:
    return [place for number in range(steps) for place in order.step(number)]


def by_epoch(places: list[tuple[int, int]]) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for epoch, index in places:
        epochs.setdefault(epoch, []).append(index)
    return epochs


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (13, 4), (5, 8), (1, 3)])
def test_every_epoch_holds_every_image_once_and_has_an_order_of_its_own(count, batch_size):
    steps = 4 * count // batch_size + 1
    places = run_of(StepSampler(count, 7, batch_size), steps)[: 4 * count]
    assert [epoch for epoch, _ in places] == [epoch for epoch in range(4) for _ in range(count)]
    epochs = by_epoch(places)
    assert all(sorted(indices) == list(range(count)) for indices in epochs.values())
    if count > 10:
        assert len({tuple(indices) for indices in epochs.values()}) == 4


def test_the_seed_decides_the_order():
    first, again, other = (run_of(StepSampler(20, seed, 4), 10) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_the_workers_share_out_what_one_worker_would_take(workers):
    """8 images a step on 3 workers are 2 + 3 + 3."""
    alone = StepSampler(21, 5, 8)
    together = [StepSampler(21, 5, 8, rank, workers) for rank in range(workers)]
    assert sum(order.share for order in together) == 8
    assert max(order.share for order in together) - min(order.share for order in together) <= 1
    for number in range(12):
        steps = [order.step(number) for order in together]
        assert [len(step) for step in steps] == [order.share for order in together]
        assert [place for step in steps for place in step] == alone.step(number)


GROUPS = np.repeat(np.arange(12), [5, 3, 4, 6, 1, 5, 5, 4, 3, 6, 2, 4])[np.random.default_rng(0).permutation(48)]
"""Twelve row groups of uneven size, their images in no order."""


def grouped(rank: int = 0, workers: int = 1, seed: int = 5, batch_size: int = 4, window: int = 2) -> StepSampler:
    return StepSampler(len(GROUPS), seed, batch_size, rank, workers, GROUPS, window)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_starts_at_a_step_goes_on_as_if_it_had_taken_those_before(groups, rank):
    def order() -> StepSampler:
        return StepSampler(48, 5, 6, rank, 2, groups)

    straight = order()
    steps = [straight.step(number) for number in range(60)]
    late, back = order(), order()
    assert [late.step(number) for number in range(37, 60)] == steps[37:]
    assert [back.step(number) for number in reversed(range(60))] == steps[::-1]
    assert pickle.loads(pickle.dumps(straight)).step(11) == steps[11]


@pytest.mark.parametrize("workers", [1, 2, 4, 5])
def test_row_group_by_row_group_every_image_comes_once_an_epoch_over_all_workers(workers):
    """Five workers do not divide the 48 images."""
    shares = []
    for rank in range(workers):
        order = grouped(rank, workers, batch_size=workers)  # one image a step
        epochs = by_epoch(run_of(order, 3 * -(-48 // workers)))
        shares.append([epochs[0], epochs[1]])
    for epoch in range(2):
        assert sorted(index for share in shares for index in share[epoch]) == list(range(48))
        lengths = [len(share[epoch]) for share in shares]
        assert max(lengths) - min(lengths) <= 1
    assert [share[0] for share in shares] != [share[1] for share in shares]


def runs(values: list[int]) -> list[int]:
    """The values without repeats of the one before."""
    return [value for n, value in enumerate(values) if n == 0 or value != values[n - 1]]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_reads_its_own_stretch_of_the_row_groups(workers):
    """Windows of one group show in which order groups come."""
    stretches = []
    for rank in range(workers):
        indices = by_epoch(run_of(grouped(rank, workers, batch_size=workers, window=1), 48 // workers))[0]
        stretches.append(runs(GROUPS[indices].tolist()))
        assert len(set(stretches[-1])) == len(stretches[-1])  # no group is come back to
    # neighbours share at most the group at the border between them
    whole = runs([group for stretch in stretches for group in stretch])
    assert sorted(whole) == list(range(12))
    assert whole != sorted(whole)
    assert whole == runs(GROUPS[by_epoch(run_of(grouped(window=1), 12))[0]].tolist())


def test_workers_of_uneven_share_end_their_epochs_together():
    """4 images a step on 3 workers are 1 + 1 + 2, so an epoch of 48 is 12 + 12 + 24."""
    orders = [grouped(rank, 3) for rank in range(3)]
    for epoch in range(3):
        places = [place for order in orders for step in range(12) for place in order.step(12 * epoch + step)]
        assert sorted(places) == [(epoch, index) for index in range(48)]


def test_fewer_images_than_streaming_workers_are_refused():
    three = np.arange(3)
    with pytest.raises(OptionError, match=r"3 training images are too few to stream to 4 workers; lower"):
        [StepSampler(3, 0, 8, rank, 4, three) for rank in range(4)]
    assert sorted(StepSampler(3, 0, 9, rank, 3, three).step(0)[0][1] for rank in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_few_row_groups_are_read_at_a_time(window):
    """Windows follow each other, so that a step sees at most two of them."""
    indices = by_epoch(run_of(grouped(window=window), 12))[0]
    of_images = GROUPS[indices].tolist()
    order_of_groups = runs(GROUPS[by_epoch(run_of(grouped(window=1), 12))[0]].tolist())
    places = [order_of_groups.index(group) // window for group in of_images]
    assert places == sorted(places)
    if window == 5:
        first = [group for group, place in zip(of_images, places, strict=True) if place == 0]
        assert len(runs(first)) > 8  # five groups, shuffled among each other


def test_row_group_orders_depend_on_seed_epoch_and_number_of_workers_alone():
    assert run_of(grouped(1, 2), 30) == run_of(grouped(1, 2), 30)
    assert run_of(grouped(1, 2), 30) != run_of(grouped(1, 2, seed=6), 30)
    orders = [runs(GROUPS[by_epoch(run_of(grouped(window=1), 36))[epoch]].tolist()) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3


# ---- which images -------------------------------------------------------------------------------------------------

LEFT_OUT = {NORMALS[0][1]["sample_id"], NORMALS[0][9]["sample_id"], NORMALS[2][0]["sample_id"]}
LEARN = frozenset(row["sample_id"] for rows in NORMALS for row in rows) - LEFT_OUT
PLACES = [(part, row) for part, rows in enumerate(NORMALS) for row in range(len(rows))]
PLACES = [(part, row) for part, row in PLACES if NORMALS[part][row]["sample_id"] in LEARN]
LEARNED = [NORMALS[part][row] for part, row in PLACES]
"""The rows that are learned from, and where they lie among the normals of their part."""

DECODED = [decode_prepared(row["image"], POLICY) for row in LEARNED]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def images(shards: ShardSet) -> TrainingImages:
    return TrainingImages.choose(shards, CATEGORIES, LEARN)


def test_the_chosen_images_are_those_to_learn_from_in_the_order_of_the_parts(shards, images, tmp_path):
    assert len(images) == len(LEARNED) == 30
    assert [CATEGORIES[number] for number in images.category] == [row["category"] for row in LEARNED]
    assert list(zip(images.part, images.row, strict=True)) == PLACES
    for index, row in enumerate(LEARNED):
        part, group = shards.parts[images.part[index]], images.group[index]
        assert row["sample_id"] in shards.read_group(part, group, normals([]), ["sample_id"])[0].to_pylist()
    images.save(str(tmp_path / "images.parquet"))
    loaded = TrainingImages.load(str(tmp_path / "images.parquet"))
    for field in dataclasses.fields(images):
        was, now = getattr(images, field.name), getattr(loaded, field.name)
        assert now.dtype == was.dtype == np.int64
        assert np.array_equal(now, was)


def test_all_normals_or_the_first_of_them_can_be_chosen(shards, images):
    whole = TrainingImages.choose(shards, CATEGORIES, None)
    assert list(zip(whole.part, whole.row, strict=True)) == [
        (part, row) for part, rows in enumerate(NORMALS) for row in range(len(rows))
    ]
    some = images.first(20)
    kept = [index for index, (part, row) in enumerate(PLACES) if part == 0 or (part == 2 and row < 6)]
    assert 0 < len(some) == len(kept) < len(images)
    for field in dataclasses.fields(images):
        assert np.array_equal(getattr(some, field.name), getattr(images, field.name)[kept])


def test_images_of_other_categories_are_not_chosen(shards):
    chosen = TrainingImages.choose(shards, ["nut"], LEARN)
    nuts = [row["sample_id"] for rows in NORMALS for row in rows if row["category"] == "nut"]
    assert len(chosen) == len(set(nuts) & LEARN)
    assert not chosen.category.any()
    # `row` counts the normals of the chosen categories alone, as prepared sets do
    assert list(zip(chosen.part, chosen.row, strict=True)) == [
        *((0, row) for row in range(7) if nuts[row] in LEARN),
        *((2, row) for row in range(5) if nuts[7 + row] in LEARN),
    ]


# ---- pixels -------------------------------------------------------------------------------------------------------


class Pooled(TrainedMethod):
    """Its features are block means of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def input(self) -> InputPolicy:
        return POLICY

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        return {"coarse": nn.functional.avg_pool2d(images, 16), "fine": nn.functional.avg_pool2d(images, 8)[:, :1]}


def write_cache(shards: ShardSet, folder: str, selection: Selection, extractor: Extractor, masks: bool = False) -> None:
    """Fill the parts of a cache in this process; the model of features is `Pooled`."""
    source = SampleSource(shards, selection, LIMITS, masks=masks)
    writer = CacheWriter(folder, {"": source}, {"": extractor}, 4, CPU, 1)
    writer._functions._methods[POOLED] = Pooled()
    for within in source.ranges():
        writer.run(range_task(within, ""))


POOLED = "folder of the model"


def cached(folder: str) -> CachedFeatures:
    parts = sorted(path.stem.removeprefix("_") for path in Path(folder).glob("_part-*.json"))
    return CachedFeatures(folder, Path("nowhere"), parts)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Folders of caches."""

    pixels: str
    features: str
    full: str


@pytest.fixture(scope="module")
def kept(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    made = Kept(*(str(tmp_path_factory.mktemp(name)) for name in ("pixels", "features", "full")))
    write_cache(shards, made.pixels, normals(CATEGORIES), PreparedPixels(POLICY))
    write_cache(shards, made.features, normals(CATEGORIES), FrozenFeatures(POOLED, half=True))
    write_cache(shards, made.full, normals(CATEGORIES), FrozenFeatures(POOLED, half=False))
    return made


def from_shards(shards: ShardSet, images: TrainingImages, keep: int = 2) -> ShardImages:
    return ShardImages(shards, CATEGORIES, images, POLICY, LIMITS, keep)


def from_prepared(shards: ShardSet, images: TrainingImages, kept: Kept) -> PreparedImages:
    return PreparedImages(cached(kept.pixels), images)


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_pixels_from_shards_and_from_a_prepared_set_are_the_decoded_images(shards, images, kept, order):
    indices = list(range(len(images)))
    if order != "forward":
        indices = indices[::-1] if order == "backward" else np.random.default_rng(0).permutation(indices).tolist()
    shard_images, prepared = from_shards(shards, images), from_prepared(shards, images, kept)
    for index in indices:
        assert np.array_equal(shard_images.pixels(index), DECODED[index])
        assert np.array_equal(prepared.pixels(index), DECODED[index])
    travelled = pickle.loads(pickle.dumps(shard_images))
    assert np.array_equal(travelled.pixels(indices[0]), DECODED[indices[0]])
    assert not any(row["image"] in pickle.dumps(shard_images) for row in LEARNED)


def test_an_epoch_reads_every_row_group_once(shards, images, monkeypatch):
    read: list[tuple[str, int]] = []
    real = ShardSet.read_group

    def counted(self: ShardSet, part: str, group: int, selection: Any, columns: Any) -> Any:
        if "image" in columns:
            read.append((part, group))
        return real(self, part, group, selection, columns)

    monkeypatch.setattr(ShardSet, "read_group", counted)
    groups = np.unique(np.stack([images.part, images.group], 1), axis=0, return_inverse=True)[1].ravel()
    order = StepSampler(len(images), 3, 5, groups=groups, window=2)
    pixels = from_shards(shards, images, keep=4)
    for _, index in run_of(order, 6):
        pixels.pixels(index)
    assert set(Counter(read).values()) == {1}
    assert len(read) == len(set(groups)) == 16


def test_threads_may_share_the_shards(shards, images, monkeypatch):
    """Validation asks for images while the next batch is being made."""
    tables = {
        (shards.parts[part], group, column): shards.read_group(shards.parts[part], group, normals(CATEGORIES), [column])
        for part, count in enumerate(map(shards.groups, shards.parts))
        for group in range(count)
        for column in ("image", "sample_id")
    }
    # only what threads could do to each other takes time
    monkeypatch.setattr(ShardSet, "read_group", lambda self, part, group, _, columns: tables[part, group, columns[0]])
    monkeypatch.setattr("pipelines.training.dataset.decode_row", lambda row, policy, limits: row["image"])
    pixels = from_shards(shards, images, keep=1)

    def look(seed: int) -> bool:
        indices = np.random.default_rng(seed).integers(0, len(images), 10000).tolist()
        return all(pixels.pixels(index) == LEARNED[index]["image"] for index in indices)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(look, range(3)))
    finally:
        sys.setswitchinterval(interval)


# ---- flips and turns ----------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)
DIHEDRAL = {
    "same": PICTURE,
    "mirrored": PICTURE[:, ::-1],
    "upside down": PICTURE[::-1],
    "both": PICTURE[::-1, ::-1],
    "left": PICTURE.transpose(1, 0, 2)[::-1],
    "right": PICTURE.transpose(1, 0, 2)[:, ::-1],
}


def outcomes(augmentation: Augmentation, category: str = "nut", draws: int = 400) -> dict[str, int]:
    rng, found = np.random.default_rng(0), Counter[str]()
    for _ in range(draws):
        changed, _ = flip_and_turn(PICTURE, None, category, augmentation, rng)
        (name,) = [name for name, image in DIHEDRAL.items() if np.array_equal(image, changed)]
        found[name] += 1
    return dict(found)


@pytest.mark.parametrize("named", [("nut",), ("*",), ("bolt", "nut")])
def test_named_categories_are_changed_as_often_as_asked(named):
    flips = outcomes(Augmentation(horizontal=named, probability=0.3))
    assert set(flips) == {"same", "mirrored"}
    assert abs(flips["mirrored"] - 120) < 30  # more than three standard deviations
    assert set(outcomes(Augmentation(vertical=named))) == {"same", "upside down"}
    both = outcomes(Augmentation(horizontal=named, vertical=named, probability=0.5))
    assert set(both) == {"same", "mirrored", "upside down", "both"}
    assert all(abs(count - 100) < 30 for count in both.values())
    assert outcomes(Augmentation(horizontal=named, vertical=named, probability=1)) == {"both": 400}
    assert outcomes(Augmentation(horizontal=named, vertical=named, probability=0)) == {"same": 400}
    turns = outcomes(Augmentation(turns=named, probability=0))
    assert set(turns) == {"same", "left", "both", "right"}
    assert all(abs(count - 100) < 30 for count in turns.values())


def test_other_categories_are_left_alone():
    changes = Augmentation(horizontal=("bolt",), vertical=("bolt",), turns=("bolt", "washer"), probability=1)
    assert outcomes(changes, "nut", 20) == {"same": 20}


def test_masks_are_flipped_and_turned_with_their_images():
    every = Augmentation(horizontal=("*",), vertical=("*",), turns=("*",), probability=0.5)
    mask = PICTURE[:, :, 0] > 128
    seen = set()
    for seed in range(60):
        image, marked = flip_and_turn(PICTURE, mask, "nut", every, np.random.default_rng(seed))
        assert marked.dtype == bool
        assert np.array_equal(marked, image[:, :, 0] > 128)
        seen.add(marked.tobytes())
        alone, nothing = flip_and_turn(PICTURE, None, "nut", every, np.random.default_rng(seed))
        assert np.array_equal(alone, image)
        assert nothing is None
    assert len(seen) == 8


def rotated_by_loops(values: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """An S×S image turned counter-clockwise about its centre, by nearest neighbours and bilinearly."""
    side = len(values)
    angle, centre = np.radians(degrees), side / 2
    nearest, bilinear = np.zeros((side, side)), np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            x, y = column + 0.5 - centre, row + 0.5 - centre
            across = np.cos(angle) * x - np.sin(angle) * y + centre  # where this pixel was before, y pointing down
            down = np.sin(angle) * x + np.cos(angle) * y + centre
            if not (0 <= across < side and 0 <= down < side):
                continue
            nearest[row, column] = values[int(down), int(across)]
            left, top = int(np.floor(across - 0.5)), int(np.floor(down - 0.5))
            for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                weight = (1 - abs(down - 0.5 - r)) * (1 - abs(across - 0.5 - c))
                bilinear[row, column] += weight * values[min(max(r, 0), side - 1), min(max(c, 0), side - 1)]
    return nearest, bilinear


@pytest.mark.parametrize("seed", range(4))
def test_rotation_is_bilinear_for_images_and_nearest_for_masks_about_the_same_centre(seed):
    side = 24
    image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    mask = np.kron(np.random.default_rng(seed).random((6, 6)) > 0.5, np.ones((4, 4))).astype(bool)
    degrees = np.random.default_rng(seed).uniform(-90, 90)
    turned, marked = flip_and_turn(image, mask, "nut", Augmentation(rotation=90), np.random.default_rng(seed))
    assert (turned.dtype, turned.shape, marked.dtype, marked.shape) == (np.uint8, image.shape, bool, mask.shape)
    for channel in range(3):
        expected = rotated_by_loops(image[:, :, channel], degrees)[1]
        assert np.abs(turned[:, :, channel] - expected).max() <= 1.01  # Pillow cuts off what is behind the point
    assert (marked != rotated_by_loops(mask, degrees)[0].astype(bool)).mean() < 0.01  # ties


def test_angles_are_drawn_evenly_to_both_sides():
    spot, centre = np.zeros((65, 65, 3), np.uint8), 32
    spot[centre - 2 : centre + 3, 52:57] = 255
    rng, angles = np.random.default_rng(0), []
    for _ in range(400):
        turned, _ = flip_and_turn(spot, None, "nut", Augmentation(rotation=60), rng)
        rows, columns = np.nonzero(turned[:, :, 0] > 100)
        angles.append(np.degrees(np.arctan2(centre - rows.mean(), columns.mean() - centre)))
    assert max(np.abs(angles)) < 61
    counts = np.histogram(angles, [-61, -30, 0, 30, 61])[0]
    assert all(abs(count - 100) < 30 for count in counts)


# ---- samples ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """Makes training sets of the corpus."""

    shards: ShardSet
    images: TrainingImages
    kept: Kept

    def make(
        self,
        needs: BatchSpec | None = None,
        stream: bool = False,
        features: str | None = None,
        pixels: bool = True,
        seed: int = 4,
    ) -> TrainingSet:
        needs = needs or BatchSpec()
        source: Any = None
        if pixels:
            source = from_shards(self.shards, self.images) if stream else self.prepared()
        arrays = None if features is None else self.arrays(features)
        near = self.descriptors() if needs.prompts == "nearest" else None
        synthesiser = None if needs.synthetic is None else Synthesiser(needs.synthetic)
        references = ReferenceSampler(self.images, stream, near)
        return TrainingSet(self.images, CATEGORIES, needs, source, arrays, references, synthesiser, seed)

    def prepared(self) -> PreparedImages:
        return from_prepared(self.shards, self.images, self.kept)

    def arrays(self, uri: str) -> PreparedFeatures:
        return PreparedFeatures(cached(uri), ("coarse", "fine"), self.images)

    def descriptors(self) -> np.ndarray:
        return descriptors(cached(self.kept.features), self.images)


@pytest.fixture(scope="module")
def bench(shards: ShardSet, images: TrainingImages, kept: Kept) -> Bench:
    return Bench(shards, images, kept)


def same(first: TrainingBatch, second: TrainingBatch) -> bool:
    ours, theirs = flat(first), flat(second)
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


ALL = BatchSpec(
    synthetic=SynthesisConfig(),
    prompts="category",
    augmentation=Augmentation(horizontal=("nut",), turns=("*",), probability=0.5),
)
PLACES_ASKED = [(0, 3), (2, 17), (0, 29), (1, 3), (-1, 8), (-1, 3)]


def names_of(tensors: Tensor) -> list[int]:
    """Which of the corpus' images these are."""
    known = {image.tobytes(): index for index, image in enumerate(DECODED)}
    return [known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in tensors]


@pytest.mark.parametrize("stream", [False, True])
def test_images_and_categories_are_those_of_the_places(bench, stream):
    batch = bench.make(stream=stream).batch(PLACES_ASKED)
    assert set(flat(batch)) == {"category", "images"}
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (6, 3, SIDE, SIDE))
    assert names_of(batch.images) == [index for _, index in PLACES_ASKED]
    assert batch.category.dtype == torch.int64
    assert [CATEGORIES[number] for number in batch.category] == [LEARNED[i]["category"] for _, i in PLACES_ASKED]


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_depends_on_seed_epoch_and_image_alone(bench, stream):
    data, other_seed = bench.make(ALL, stream), bench.make(ALL, stream, seed=5)
    batch = data.batch(PLACES_ASKED)
    fields = {"category", "images", "prompt_images", "synthetic_images", "synthetic_mask"}
    assert set(flat(batch)) == fields
    fresh = bench.make(ALL, stream)
    backwards = fresh.batch(PLACES_ASKED[::-1])
    assert same(batch, backwards.map(lambda tensor: tensor.flip(0)))
    for place, alone in zip(PLACES_ASKED, batch.split(len(PLACES_ASKED)), strict=True):
        assert same(fresh.batch([place]), alone)
    assert same(data[PLACES_ASKED], batch)
    # image 3 in epochs 0, 1 and −1, and with another seed
    copies = [batch.synthetic_images[number] for number in (0, 3, 5)]
    copies.append(other_seed.batch([(0, 3)]).synthetic_images[0])
    assert not any(torch.equal(a, b) for n, a in enumerate(copies) for b in copies[:n])


def test_prepared_and_streamed_images_make_the_same_batches_where_no_companion_is_needed(bench):
    needs = BatchSpec(augmentation=ALL.augmentation)
    assert same(bench.make(needs).batch(PLACES_ASKED), bench.make(needs, stream=True).batch(PLACES_ASKED))


def test_images_are_changed_where_their_category_allows_but_never_for_fixed_batches(bench):
    needs = BatchSpec(augmentation=Augmentation(vertical=("bolt",), probability=1))
    data = bench.make(needs)
    places = [(0, index) for index in range(len(LEARNED))]
    batch = data.batch(places)
    for index, row in enumerate(LEARNED):
        expected = DECODED[index][::-1] if row["category"] == "bolt" else DECODED[index]
        assert np.array_equal(batch.images[index].permute(1, 2, 0).numpy(), expected)
    assert names_of(data.batch(places, augment=False).images) == list(range(len(LEARNED)))


@pytest.mark.parametrize("stream", [False, True])
def test_synthetic_copies_differ_from_their_images_only_under_their_masks(bench, stream):
    batch = bench.make(ALL, stream).batch([(epoch, index) for epoch in range(2) for index in range(30)])
    assert (batch.synthetic_images.dtype, batch.synthetic_images.shape) == (torch.uint8, (60, 3, SIDE, SIDE))
    assert (batch.synthetic_mask.dtype, batch.synthetic_mask.shape) == (torch.float32, (60, 1, SIDE, SIDE))
    assert set(batch.synthetic_mask.unique().tolist()) == {0.0, 1.0}
    changed = (batch.synthetic_images != batch.images).any(1, keepdim=True)
    assert not (changed & (batch.synthetic_mask == 0)).any()
    assert (changed.flatten(1).any(1)).float().mean() > 0.5


def test_textures_come_from_the_same_row_group_where_images_are_streamed(bench, monkeypatch):
    seen: list[tuple[int, int]] = []
    real = Synthesiser.__call__

    def watched(self: Synthesiser, image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Any:
        known = {pixels.tobytes(): index for index, pixels in enumerate(DECODED)}
        seen.append((known[image.tobytes()], known[other.tobytes()]))
        return real(self, image, rng, other)

    monkeypatch.setattr(Synthesiser, "__call__", watched)
    needs = BatchSpec(synthetic=SynthesisConfig())
    places = [(epoch, index) for epoch in range(5) for index in range(30)]
    spread = {}
    for stream in (False, True):
        seen.clear()
        bench.make(needs, stream).batch(places)
        assert [index for index, _ in seen] == [index for _, index in places]
        spread[stream] = {(where(bench, image), where(bench, other)) for image, other in seen}
        assert len({other for _, other in seen}) > 20
    assert all(own == other for own, other in spread[True])
    assert not all(own == other for own, other in spread[False])


def where(bench: Bench, index: int) -> tuple[int, int]:
    return int(bench.images.part[index]), int(bench.images.group[index])


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_of_the_same_category(bench, stream):
    places = [(epoch, index) for epoch in range(40) for index in (0, 8, 25)]
    batch = bench.make(BatchSpec(prompts="category"), stream).batch(places)
    assert (batch.prompt_images.dtype, batch.prompt_images.shape) == (torch.uint8, batch.images.shape)
    found: dict[int, set[int]] = {}
    for (_, index), prompt in zip(places, names_of(batch.prompt_images), strict=True):
        found.setdefault(index, set()).add(prompt)
    for index, prompts in found.items():
        alike = {n for n, row in enumerate(LEARNED) if row["category"] == LEARNED[index]["category"]}
        if stream:
            assert prompts == {n for n in alike if where(bench, n) == where(bench, index)}
        else:
            assert prompts <= alike
            assert len(prompts) > len(alike) / 2


def test_prompts_by_nearness_are_among_the_nearest_descriptors(bench):
    vectors = bench.descriptors().astype(np.float64)
    assert vectors.shape == (30, 4)
    with torch.inference_mode():
        features = Pooled().frozen_features(normalise(DECODED, POLICY))
    means = np.concatenate([features[name].mean((2, 3)).numpy() for name in ("coarse", "fine")], axis=1)
    np.testing.assert_allclose(vectors, means, rtol=1e-5, atol=1e-6)
    nearest = {}
    for index, vector in enumerate(vectors):
        cosines = [v @ vector / np.linalg.norm(v) / np.linalg.norm(vector) for v in vectors]
        nearest[index] = set(np.argsort(cosines)[::-1][:NEAREST_PROMPTS].tolist())
    places = [(epoch, index) for epoch in range(60) for index in (0, 13, 29)]
    batch = bench.make(BatchSpec(prompts="nearest")).batch(places)
    found: dict[int, set[int]] = {}
    for (_, index), prompt in zip(places, names_of(batch.prompt_images), strict=True):
        found.setdefault(index, set()).add(prompt)
    assert found == {index: nearest[index] for index in (0, 13, 29)}
    assert any(LEARNED[n]["category"] != LEARNED[0]["category"] for n in found[0])


def test_a_corpus_smaller_than_the_number_of_nearest_prompts_is_taken_whole():
    few = TrainingImages(*(np.zeros(3, np.int64) for _ in range(6)))
    references = ReferenceSampler(few, False, np.eye(3, dtype=np.float32))
    rng = np.random.default_rng(0)
    assert {references.prompt(1, rng) for _ in range(50)} == {0, 1, 2}


# ---- labels and masks ---------------------------------------------------------------------------------------------

LEARNED_LABELLED = [row for rows in LABELLED for row in rows if row["sample_id"] != LABELLED[2][3]["sample_id"]]
"""What is learned from; the fourth anomalous nut is left out."""

MARKED = BatchSpec(labels=True, masks=True)


@dataclasses.dataclass
class Labelled:
    """Makes training sets of images with labels and masks."""

    shards: ShardSet
    images: TrainingImages
    pixels: str
    features: str

    def make(self, needs: BatchSpec = MARKED, stream: bool = False, features: str | None = None) -> TrainingSet:
        source: Any = PreparedImages(cached(self.pixels), self.images)
        if stream:
            source = ShardImages(self.shards, ["nut", "bolt"], self.images, POLICY, LIMITS, 2, True, needs.masks)
        kept = None
        if features is not None:
            kept = PreparedFeatures(cached(features), ("coarse", "fine"), self.images)
        return TrainingSet(self.images, ["nut", "bolt"], needs, source, kept, None, None, 4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    shards = write_shards(tmp_path_factory.mktemp("labelled"), LABELLED_PARTS)
    learn = frozenset(row["sample_id"] for row in LEARNED_LABELLED)
    images = TrainingImages.choose(shards, ["nut", "bolt"], learn, labels=True)
    pixels, features = (str(tmp_path_factory.mktemp(name)) for name in ("pixels", "features"))
    selection = learnable(["nut", "bolt"], labels=True)
    write_cache(shards, pixels, selection, PreparedPixels(POLICY, masks=True), masks=True)
    write_cache(shards, features, selection, FrozenFeatures(POOLED, half=False))
    return Labelled(shards, images, pixels, features)


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_that_takes_too_long_is_named(labelled, monkeypatch, masks):
    """It or its mask; the others are read after it."""
    named = LEARNED_LABELLED[1]["sample_id"]
    release = threading.Event()
    real = {"decode_row": reader.decode_row, "decode_row_mask": reader.decode_row_mask}
    name = "decode_row_mask" if masks else "decode_row"

    def decode(row: dict[str, Any], *rest: Any) -> Any:
        if row["sample_id"] == named:
            release.wait()
        return real[name](row, *rest)

    monkeypatch.setattr(f"pipelines.training.dataset.{name}", decode)
    limits = ImageLimits(seconds=1)
    source = ShardImages(
        labelled.shards, ["nut", "bolt"], labelled.images, POLICY, limits, keep=4, labels=True, masks=masks
    )
    read = source.mask if masks else source.pixels
    with pytest.raises(
        DataError, match=f"^{LEARNED_LABELLED[1]['sample_id']}: .* took more than 1 s.*; raise it, or leave"
    ):
        read(1)
    release.set()
    for number in (0, 2):
        expected = (
            truth(LEARNED_LABELLED[number]) if masks else decode_prepared(LEARNED_LABELLED[number]["image"], POLICY)
        )
        np.testing.assert_array_equal(read(number), expected)
    assert pickle.loads(pickle.dumps(source)).pixels(0).shape == (SIDE, SIDE, 3)


def test_anomalous_training_images_are_learned_from_in_the_order_of_the_parts(labelled, tmp_path):
    images = labelled.images
    assert [["nut", "bolt"][number] for number in images.category] == [row["category"] for row in LEARNED_LABELLED]
    assert images.label.tolist() == [row["label"] for row in LEARNED_LABELLED]
    assert (images.label.dtype, images.label.sum()) == (np.int64, 8)
    places = [(0, row) for row in range(7)] + [(2, row) for row in range(11) if row != 3]
    assert list(zip(images.part, images.row, strict=True)) == places
    images.save(str(tmp_path / "images.parquet"))
    assert np.array_equal(TrainingImages.load(str(tmp_path / "images.parquet")).label, images.label)
    assert images.number.tolist() == [number for number in range(18) if number != 10]
    normal = TrainingImages.choose(labelled.shards, ["nut", "bolt"], None)
    assert (len(normal), normal.label.any()) == (11, False)  # nine to learn from and two for validation


@pytest.mark.parametrize("stream", [False, True])
def test_labels_and_masks_are_those_of_their_images(labelled, stream):
    indices = np.random.default_rng(3).permutation(len(LEARNED_LABELLED)).tolist()
    data = pickle.loads(pickle.dumps(labelled.make(stream=stream)))
    batch = data.batch([(0, index) for index in indices])
    assert set(flat(batch)) == {"category", "images", "label", "mask"}
    assert (batch.label.dtype, batch.label.shape) == (torch.int64, (17,))
    assert (batch.mask.dtype, batch.mask.shape) == (torch.float32, (17, 1, SIDE, SIDE))
    for number, index in enumerate(indices):
        row = LEARNED_LABELLED[index]
        expected = decode_prepared(row["image"], POLICY)
        assert np.array_equal(batch.images[number].permute(1, 2, 0).numpy(), expected)
        assert batch.label[number] == row["label"]
        assert np.array_equal(batch.mask[number, 0].numpy(), truth(row).astype(np.float32))
    ready = to_input(batch, torch.device("cpu"), POLICY)
    assert torch.equal(ready.mask, batch.mask)
    assert torch.equal(ready.label, batch.label)


@pytest.mark.parametrize("stream", [False, True])
def test_labels_come_without_masks_and_images_beside_kept_features(labelled, stream):
    places = [(0, 3), (0, 9), (1, 16)]
    assert set(flat(labelled.make(BatchSpec(labels=True), stream).batch(places))) == {"category", "images", "label"}
    needs = BatchSpec(labels=True, images=True)
    both = labelled.make(needs, stream, labelled.features).batch(places)
    assert set(flat(both)) == {"category", "images", "label", "features.coarse", "features.fine"}
    with torch.inference_mode():
        now = Pooled().frozen_features(to_input(both, torch.device("cpu"), POLICY).images)
    for name, value in now.items():
        torch.testing.assert_close(both.features[name], value, rtol=1e-6, atol=1e-7)
    alone = labelled.make(dataclasses.replace(MARKED, images=False), stream, labelled.features).batch(places)
    assert set(flat(alone)) == {"category", "label", "mask", "features.coarse", "features.fine"}


@pytest.mark.parametrize("stream", [False, True])
def test_masks_are_changed_with_their_images_but_never_for_fixed_batches(labelled, stream):
    everything = Augmentation(("*",), ("nut",), ("*",), 0.5, rotation=30)
    needs = dataclasses.replace(MARKED, augmentation=everything)
    data, places = labelled.make(needs, stream), [(epoch, index) for epoch in range(2) for index in range(17)]
    batch = data.batch(places)
    changed = 0
    for number, (epoch, index) in enumerate(places):
        row, rng = LEARNED_LABELLED[index], np.random.default_rng([4, epoch + 1, index, 1])
        image, mask = flip_and_turn(decode_prepared(row["image"], POLICY), truth(row), row["category"], everything, rng)
        assert np.array_equal(batch.images[number].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(batch.mask[number, 0].numpy(), mask)
        changed += not np.array_equal(mask, truth(row))
    assert changed > 12  # of 16
    assert same(data.batch(places[:17], augment=False), labelled.make(stream=stream).batch(places[:17]))


def test_a_streamed_anomalous_image_without_mask_is_named(tmp_path):
    shards = write_shards(tmp_path, [[sample("nut", "train", 0), sample("nut", "train", 1, 1)]])
    images = TrainingImages.choose(shards, ["nut"], None, labels=True)
    pixels = ShardImages(shards, ["nut"], images, POLICY, LIMITS, 2, labels=True, masks=True)
    assert not pixels.mask(0).any()
    with pytest.raises(DataError, match=r"^set/nut/train/1/001.png is anomalous but has no mask"):
        pixels.mask(1)


@pytest.mark.parametrize("others", [{"prompts": "category"}, {"synthetic": SynthesisConfig()}])
def test_prompts_and_synthetic_anomalies_of_anomalous_images_are_refused(labelled, others):
    with pytest.raises(ValueError, match="neither prompts nor synthetic"):
        labelled.make(BatchSpec(labels=True, **others))


# ---- frozen features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_kept_features_are_those_that_would_be_computed_now(bench, half):
    folder = bench.kept.features if half else bench.kept.full
    data = bench.make(BatchSpec(prompts="category"), features=folder, pixels=False)
    raw = data.batch(PLACES_ASKED)
    kinds = {tensor.dtype for tensor in raw.features.values()} | {t.dtype for t in raw.prompt_features.values()}
    assert kinds == {torch.float16 if half else torch.float32}
    batch = to_input(raw, torch.device("cpu"), POLICY)
    assert (batch.images, batch.prompt_images) == (None, None)
    pictures = bench.make(BatchSpec(prompts="category")).batch(PLACES_ASKED)
    with torch.inference_mode():
        for features, wanted in ((batch.features, pictures.images), (batch.prompt_features, pictures.prompt_images)):
            indices = names_of(wanted)  # the same prompts are drawn
            expected = Pooled().frozen_features(normalise([DECODED[index] for index in indices], POLICY))
            assert features.keys() == expected.keys()
            for name, value in expected.items():
                assert features[name].dtype == torch.float32
                tolerance = {"rtol": 2**-11, "atol": 1e-7} if half else {"rtol": 1e-6, "atol": 1e-7}
                torch.testing.assert_close(features[name], value, **tolerance)


def test_synthetic_copies_stand_beside_kept_features(bench):
    data = bench.make(BatchSpec(synthetic=SynthesisConfig()), features=bench.kept.features)
    batch = data.batch(PLACES_ASKED)
    assert set(flat(batch)) == {
        "category",
        "features.coarse",
        "features.fine",
        "synthetic_images",
        "synthetic_mask",
    }
    pictures = bench.make(BatchSpec(synthetic=SynthesisConfig())).batch(PLACES_ASKED)
    assert torch.equal(batch.synthetic_images, pictures.synthetic_images)


def test_input_is_normalised_as_everywhere_else_to_the_bit(bench):
    batch = bench.make(ALL).batch(PLACES_ASKED)
    ready = to_input(batch, torch.device("cpu"), POLICY)
    for name in ("images", "synthetic_images", "prompt_images"):
        raw = flat(batch)[name].permute(0, 2, 3, 1).numpy()
        assert torch.equal(flat(ready)[name], normalise(list(raw), POLICY))
    assert torch.equal(ready.synthetic_mask, batch.synthetic_mask)
    assert (ready.category.dtype, ready.category.tolist()) == (torch.int64, batch.category.tolist())
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    every = to_input(TrainingBatch(torch.zeros(1), levels), torch.device("cpu"), POLICY).images
    assert torch.equal(every, normalise([levels[0].permute(1, 2, 0).numpy()], POLICY))


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0, 9), (5, 9), (8, 9), (4, 4)])
def test_batches_from_any_step_on_are_those_of_the_steps(bench, start, end):
    order = StepSampler(len(bench.images), 4, 6, rank=1, workers=2)
    data = bench.make(ALL, stream=True)
    made = list(BatchLoader(data, order, processes=0, pin=False)(start, end))
    assert len(made) == end - start
    for number, batch in enumerate(made, start):
        assert same(batch, bench.make(ALL, stream=True).batch(order.step(number)))


@pytest.mark.parametrize("repeats", [2, 3])
def test_successive_steps_take_the_same_batch_which_is_made_once(labelled, repeats, monkeypatch):
    order, data = StepSampler(17, 4, 3), labelled.make()
    straight = [labelled.make().batch(order.step(number // repeats)) for number in range(14)]
    made: list[Any] = []
    real = TrainingSet.batch

    def counted(self: TrainingSet, places: Any, augment: bool = True) -> TrainingBatch:
        made.append(places)
        return real(self, places, augment)

    monkeypatch.setattr(TrainingSet, "batch", counted)
    batches = BatchLoader(data, order, processes=0, pin=False, repeats=repeats)
    for start, end in ((0, 14), (1, 14), (5, 8), (6, 7), (4, 4)):
        made.clear()
        found = list(batches(start, end))
        assert len(found) == end - start
        assert all(same(batch, wanted) for batch, wanted in zip(found, straight[start:end], strict=True))
        if found:
            assert made == [order.step(n) for n in sorted({step // repeats for step in range(start, end)})]


def test_an_error_in_making_a_batch_reaches_the_loop(bench, monkeypatch):
    def fail(self: TrainingSet, places: Any, augment: bool = True) -> TrainingBatch:
        raise ValueError("no such image")

    monkeypatch.setattr(TrainingSet, "batch", fail)
    with pytest.raises(ValueError, match="no such image"):
        list(BatchLoader(bench.make(), StepSampler(30, 4, 6), processes=0, pin=False)(0, 3))


def test_another_process_makes_the_same_batches(bench):
    order = StepSampler(len(bench.images), 4, 5)
    data = bench.make(dataclasses.replace(ALL, prompts="nearest"), stream=True)
    before = torch.get_rng_state()
    aside = list(BatchLoader(data, order, processes=1, pin=False, repeats=2)(7, 11))
    assert torch.equal(torch.get_rng_state(), before), "loading drew from the random state of training"
    beside = list(BatchLoader(data, order, processes=0, pin=False)(3, 6))
    assert len(aside) == 4
    assert all(same(aside[n], beside[m]) for n, m in enumerate((0, 1, 1, 2)))

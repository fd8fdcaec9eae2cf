"""The cache of what networks compute of images: its key, its files, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data import feature_cache, image_source
from pipelines.data.cache_writer import CacheWriter, array_name, range_task
from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch
from pipelines.data.feature_cache import CachedFeatures, FeatureCache, JoinedRows
from pipelines.data.image_source import SampleSource, ValidationSource
from pipelines.data.options import ValidationOptions
from pipelines.data.validation_set import ValidationSet, build_validation_set
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from tests.pipelines.sharded import LIMITS, POLICY, masked, samples, write_shards
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.execution import CPU
from unianom.methods import Method

NORMAL = Selection(("train",), (), (0,))

PARTS = [
    samples("bolt", "train", 5) + samples("bolt", "test", 2),
    samples("nut", "test", 3),  # nothing selected
    samples("nut", "train", 4) + masked("nut", "train", 1),
    samples("bolt", "train", 3, first=5),
]

FIRST, SECOND, THIRD = (f"part-{number}-000000000" for number in (0, 2, 3))
"""Parts of a cache of the normal training images."""

ONE = RuntimeOptions(workers=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards") / "set", PARTS)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums of the channels of images; and of each image as many rows as its first pixel says, four at most."""

    factor: float = 1.0

    def policy(self) -> InputPolicy:
        return POLICY

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        def arrays(batch: ImageBatch, _: Arrays) -> Arrays:
            pixels = batch.pixels
            ragged = np.concatenate([image[0, : 1 + int(image[0, 0, 0]) % 4] for image in pixels])
            return {"sums": self.factor * pixels.sum((1, 2), dtype=np.float64), "ragged": ragged.astype(np.float32)}

        return BatchFunction(POLICY, arrays)


def make(shards: ShardSet, folder: Path | str, group: str = "", **changes: Any) -> FeatureCache:
    source = SampleSource(shards, NORMAL, LIMITS)
    given: dict[str, Any] = {"images": {group: source}, "computed": {"factor": 1.0}, "runtime": ONE, "batch_size": 2}
    return FeatureCache.below(str(folder), "features", **{**given, **changes})


def fill(cache: FeatureCache, runtime: RuntimeOptions = ONE, factor: float = 1.0) -> CachedFeatures:
    cache.fill(dict.fromkeys(cache.images, Statistics(factor)), 2, runtime, "statistics")
    return cache.open()


def content(cache: FeatureCache) -> dict[str, bytes]:
    """All files but the lock of who was here."""
    return {path.name: path.read_bytes() for path in Path(cache.uri).iterdir() if path.is_file()}


def expected(rows: list[dict[str, Any]]) -> Arrays:
    """By a plain loop over the images of a part that are selected."""
    sums, ragged = [], []
    for row in rows:
        if (row["split"], row["label"]) == ("train", 0):
            pixels = decode_prepared(row["image"], POLICY)
            sums.append([float(pixels[:, :, channel].astype(int).sum()) for channel in range(3)])
            ragged += [pixels[0, n].astype(np.float32) for n in range(1 + int(pixels[0, 0, 0]) % 4)]
    return {"sums": np.array(sums), "ragged": np.array(ragged)}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(CacheWriter, "run", never)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_arrays_are_those_of_a_plain_loop_in_plain_npy_files(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    cache = make(shards, tmp_path)
    features = fill(cache)
    assert features.parts == [FIRST, SECOND, THIRD]  # of one part nothing is selected
    assert [features.rows(part) for part in features.parts] == [5, 4, 3]
    for number, part in zip((0, 2, 3), features.parts, strict=True):
        for name, array in expected(PARTS[number]).items():
            path = Path(cache.uri, array_name(part, name))
            assert features.has(part, name)
            np.testing.assert_array_equal(features.array(part, name), array)
            np.save(tmp_path / "plain.npy", array)
            assert path.read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert isinstance(features.array(FIRST, "sums"), np.memmap)
    manifest = features.manifest()
    assert (manifest["names"], manifest["rows"]) == (["sums", "ragged"], 12)
    assert manifest["bytes"] == sum(path.stat().st_size for path in Path(cache.uri).glob("*.npy"))
    assert not list(Path(cache.uri).glob("*.tmp"))


def test_groups_lie_beside_each_other(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    images = {"normal": SampleSource(shards, NORMAL, LIMITS), "all": SampleSource(shards, Selection(), LIMITS)}
    cache = make(shards, tmp_path, images=images)
    features = fill(cache)
    assert features.parts_of("all") == [f"part-{number}-000000000-all" for number in range(4)]
    assert features.parts == [*features.parts_of("normal"), *features.parts_of("all")]
    rows = {name: sum(features.rows(part) for part in features.parts_of(name)) for name in images}
    assert rows == {"normal": 12, "all": 18}
    alone = fill(make(shards, tmp_path / "alone"))
    for one, other in zip(alone.arrays("sums"), features.arrays("sums", features.parts_of("normal")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_do_not_depend_on_the_number_of_workers(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    one, two = make(shards, tmp_path / "one"), make(shards, tmp_path / "two")
    fill(one)
    fill(two, RuntimeOptions(workers=2))
    assert content(one) == content(two)


def test_a_killed_run_continues_to_the_same_bytes(
    inline: None, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = make(shards, tmp_path / "whole"), make(shards, tmp_path / "killed")
    fill(whole)
    real, ran = CacheWriter.run, []

    def mortal(self: CacheWriter, task: dict[str, Any]) -> dict[str, Any]:
        ran.append(task["part"])
        if len(ran) == 2:
            # as a process that dies while it writes leaves it
            Path(killed.uri, f"{SECOND}-sums.npy.0123abcd.tmp").write_bytes(b"half")
            Path(killed.uri, f"{SECOND}-ragged.npy").write_bytes(b"written, but not declared")
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(CacheWriter, "run", mortal)
    with pytest.raises(KeyboardInterrupt):
        fill(killed)
    with pytest.raises(DataError, match=r"is not finished; run the same command again"):
        killed.open()
    fill(killed)
    assert ran == ["part-0.parquet", "part-2.parquet", "part-2.parquet", "part-3.parquet"]
    assert content(killed) == content(whole)


def test_two_runs_share_one_cache(
    inline: None, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(shards, tmp_path)
    fill(first)
    before = content(first)
    forbid(monkeypatch)
    again = make(shards, tmp_path)
    assert again.uri == first.uri
    assert again.fill({"": Statistics()}, 2, ONE, "statistics") == 0.0
    assert content(first) == before
    with pytest.raises(AssertionError, match="computed again"):
        fill(make(shards, tmp_path, batch_size=3))


def test_all_that_results_depend_on_is_in_the_key(shards: ShardSet, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", PARTS[:1])

    def of(source: SampleSource) -> dict[str, Any]:
        return {"images": {"": source}}

    chosen = frozenset(row["sample_id"] for row in PARTS[0][:2])
    changes: list[dict[str, Any]] = [
        {},
        {"computed": {"factor": 2.0}},
        {"computed": {"factor": 1.0, "weights": "0" * 64}},
        of(SampleSource(other, NORMAL, LIMITS)),
        of(SampleSource(shards, Selection(("train",)), LIMITS)),
        of(SampleSource(shards, NORMAL, ImageLimits(max_pixels=10**6))),
        of(SampleSource(shards, NORMAL, LIMITS, chosen)),
        of(SampleSource(shards, NORMAL, LIMITS, frozenset(list(chosen)[:1]))),
        of(SampleSource(shards, NORMAL, LIMITS, frozenset())),
        {"images": {"normal": SampleSource(shards, NORMAL, LIMITS)}},
        {"batch_size": 3},
        {"runtime": RuntimeOptions(workers=1, cpus_per_worker=2)},
        {"runtime": None},
    ]
    uris = [make(shards, tmp_path, **change).uri for change in changes]
    assert len(set(uris)) == len(uris)
    # how many work on it does not count
    assert make(shards, tmp_path, runtime=RuntimeOptions(workers=7)).uri == uris[0]


def test_another_format_has_another_key(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make(shards, tmp_path).uri
    monkeypatch.setattr(feature_cache, "FORMAT", feature_cache.FORMAT + 1)
    assert make(shards, tmp_path).uri != uri


def test_rows_of_another_shape_are_a_fault_of_the_extractor(shards: ShardSet, tmp_path: Path) -> None:
    class Growing(Statistics):
        def open(self, load: Callable[[str], Method]) -> BatchFunction:
            counts = iter(range(1, 9))
            return BatchFunction(POLICY, lambda batch, _: {"x": np.zeros((len(batch), next(counts)))})

    source = SampleSource(shards, NORMAL, LIMITS)
    writer = CacheWriter(str(tmp_path), {"": source}, {"": Growing()}, 2, CPU, 1)
    with pytest.raises(ValueError, match=r"rows of float64 \(2,\) after rows of float64 \(1,\)"):
        writer.run(range_task(source.ranges()[0], ""))
    assert not list(tmp_path.rglob("*.npy"))


# ---- what is refused ------------------------------------------------------------------------------------------------


def other_bytes(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)


def other_shape(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def other_type(path: Path) -> None:
    np.save(path, np.load(path).view(np.int64))


FAULTS: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "no array": lambda path: path.write_bytes(b"something else" * 20),
    "other bytes": other_bytes,
    "other shape": other_shape,
    "other type": other_type,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused_and_named(inline: None, shards: ShardSet, tmp_path: Path, fault: str) -> None:
    cache = make(shards, tmp_path)
    fill(cache)
    FAULTS[fault](Path(cache.uri, f"{SECOND}-sums.npy"))
    features = cache.open()
    features.array(FIRST, "sums")
    file = f"{cache.uri}/{SECOND}-sums.npy"
    message = rf"^{file} is missing, damaged or another one .*; remove the folder {cache.uri} and"
    with pytest.raises(DataError, match=message):
        features.arrays("sums")


def test_the_file_of_another_part_is_refused(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    """Though it is whole, and of the right type."""
    cache, other = make(shards, tmp_path), make(shards, tmp_path, computed={"factor": 2.0})
    fill(cache)
    fill(other, factor=2.0)
    path = Path(cache.uri, f"{FIRST}-sums.npy")
    path.write_bytes(Path(other.uri, f"{FIRST}-sums.npy").read_bytes())
    with pytest.raises(DataError, match=rf"{FIRST}-sums.npy is missing, damaged or another one"):
        cache.open().array(FIRST, "sums")


@pytest.mark.parametrize("name", ["_manifest.json", "_part-0-000000000.json"])
def test_a_damaged_record_is_refused(inline: None, shards: ShardSet, tmp_path: Path, name: str) -> None:
    cache = make(shards, tmp_path)
    fill(cache)
    Path(cache.uri, name).write_bytes(b"{")
    with pytest.raises(DataError, match=rf"{name} is missing, damaged or another one"):
        cache.open().array(FIRST, "sums")


def test_what_the_cache_does_not_hold_is_refused(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    features = fill(make(shards, tmp_path))
    with pytest.raises(DataError, match=f"holds no products of {FIRST}"):
        features.array(FIRST, "products")
    with pytest.raises(DataError, match="has no part part-9"):
        features.rows("part-9")
    with pytest.raises(DataError, match="holds no products; remove"):
        features.row_shape("products")
    assert features.row_shape("sums") == (3,)


def test_a_folder_of_something_else_is_not_taken(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    cache = make(shards, tmp_path)
    Path(cache.uri).mkdir(parents=True)
    Path(cache.uri, "letters.txt").write_text("of somebody")
    with pytest.raises(DataError, match=r"holds other files \(letters.txt\)"):
        fill(cache)
    assert Path(cache.uri, "letters.txt").read_text() == "of somebody"


def test_a_cache_of_another_plan_is_not_taken(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    """Should two plans ever meet in one folder."""
    old = dataclasses.replace(make(shards, tmp_path), plan={"shards": shards.digest, "half": True})
    with outputs.open_cache(old.uri, "features", old.plan):
        outputs.finish(old.uri, {"names": ["pixels"], "bytes": 0, "rows": 0})
    with pytest.raises(DataError, match="of another run"):
        fill(make(shards, tmp_path))


def test_parts_recorded_by_an_earlier_version_are_refused(tmp_path: Path) -> None:
    outputs.commit_part(str(tmp_path), "part-0", {"part": "part-0.parquet", "rows": 3, "names": ["x"], "bytes": 9})
    with pytest.raises(DataError, match="has no part part-0; remove that folder"):
        CachedFeatures(str(tmp_path), parts=["part-0"]).rows("part-0")


# ---- reading --------------------------------------------------------------------------------------------------------


def test_readers_travel_without_their_maps(inline: None, shards: ShardSet, tmp_path: Path) -> None:
    features = fill(make(shards, tmp_path))
    before = [np.array(array) for array in features.arrays("sums")]
    travelled = pickle.dumps(features)
    assert len(travelled) < 4000
    for one, other in zip(before, pickle.loads(travelled).arrays("sums"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_copies_of_an_object_store_are_removed_with_their_reader(inline: None, shards: ShardSet) -> None:
    uri = "memory://test-feature-cache"
    try:
        features = fill(make(shards, uri))
        array = features.array(FIRST, "sums")
        np.testing.assert_array_equal(array, expected(PARTS[0])["sums"])
        copies = Path(array.filename).parent  # type: ignore[attr-defined]
        assert len(list(copies.iterdir())) == 1
        again = pickle.loads(pickle.dumps(features))
        again.array(FIRST, "sums")
        del features
        gc.collect()
        assert not copies.exists()
        np.testing.assert_array_equal(again.array(FIRST, "sums"), array)
    finally:
        files.remove(uri)


def test_joined_rows_are_those_of_one_array() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.random((count, 2, 3)).astype(np.float16) for count in (4, 0, 1, 7)]
    joined, whole = JoinedRows(arrays), np.concatenate(arrays)
    assert joined.rows == 12
    for indices in ([0], [11, 4, 4, 0, 3], rng.permutation(12), np.arange(12), np.array([], int)):
        taken = joined.take(np.asarray(indices, int))
        assert taken.dtype == np.float16
        np.testing.assert_array_equal(taken, whole[np.asarray(indices, int)])


# ---- validation images ----------------------------------------------------------------------------------------------


def test_validation_images_are_cached_in_parts(inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_source, "RANGE_ROWS", 4)
    rows = samples("nut", "val", 3) + masked("nut", "val", 3)
    held_out = frozenset(row["sample_id"] for row in rows if row["label"] == 0)
    uri = build_validation_set(
        write_shards(tmp_path / "shards", [rows]), ["nut"], held_out, POLICY, ValidationOptions(), LIMITS, str(tmp_path)
    )
    cache = FeatureCache.below(str(tmp_path), "validation outputs", {"": ValidationSource(uri)}, {}, ONE, 3)
    seen: list[int] = []

    class Sums(Statistics):
        def open(self, load: Callable[[str], Method]) -> BatchFunction:
            def arrays(batch: ImageBatch, _: Arrays) -> Arrays:
                seen.append(len(batch))
                return {"sums": np.array([int(pixels.sum()) for pixels in batch.pixels])}

            return BatchFunction(InputPolicy("stretch", 8, None), arrays)  # the images are input already

    writer = CacheWriter(cache.uri, cache.images, {"": Sums()}, 3, CPU, 1)
    records = [writer.run(range_task(within, "")) for within in cache.images[""].ranges()]
    parts = ["images-000000000", "images-000000004"]
    assert [(record["part"], record["rows"]) for record in records] == [(parts[0], 4), (parts[1], 2)]
    assert seen == [3, 1, 2]
    sums = np.concatenate(CachedFeatures(cache.uri, parts=parts).arrays("sums"))
    np.testing.assert_array_equal(sums, ValidationSet(uri).pixels.astype(int).sum((1, 2, 3)))
    # another set of validation images is another cache
    assert FeatureCache.below(str(tmp_path), cache.kind, {"": ValidationSource(f"{uri}0")}, {}, ONE, 3).uri != cache.uri

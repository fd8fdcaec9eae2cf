"""Prepared pixels and frozen features, part by part, without Ray."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.data.cache_writer import CacheWriter, array_name, part_name, range_task
from pipelines.data.extractors import Extractor
from pipelines.data.feature_cache import CachedFeatures
from pipelines.data.image_source import SampleSource
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.prepared import (
    DESCRIPTOR,
    MASKS,
    PIXELS,
    FrozenFeatures,
    PreparedPixels,
    feature_names,
    learnable,
    normals,
    prepare_pixels,
)
from tests.methods.conftest import TINY
from tests.pipelines.sharded import (
    CATEGORIES,
    LABELLED,
    LABELLED_PARTS,
    LIMITS,
    NORMALS,
    POLICY,
    SIDE,
    forbid_test_rows,
    masked,
    sample,
    samples,
    truth,
    write_shards,
)
from unianom import files
from unianom.data.image import InputPolicy, decode_prepared
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError
from unianom.execution import CPU
from unianom.methods import METHODS
from unianom.methods.trained import FeatureMaps, TrainedMethod
from unianom.model import Model


class Pooled(TrainedMethod):
    """Its features are block means of the image, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    @property
    def input(self) -> InputPolicy:
        return POLICY

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        coarse, fine = nn.functional.avg_pool2d(images, 16), nn.functional.avg_pool2d(images, 8)[:, :1]
        return {"fine": fine * self.factor, "coarse": coarse}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards"))


class Preparer:
    """Writes parts of a cache of prepared images, or of frozen features where a model is named."""

    def __init__(
        self,
        shards: ShardSet,
        output: Any,
        selection: Selection | None = None,
        policy: InputPolicy = POLICY,
        model: str | None = None,
        half: bool = True,
        masks: bool = False,
        batch_size: int = 4,
    ) -> None:
        images = SampleSource(shards, selection or normals(CATEGORIES), LIMITS, masks=masks)
        extractor: Extractor = PreparedPixels(policy, masks) if model is None else FrozenFeatures(model, half)
        self.writer = CacheWriter(str(output), {"": images}, {"": extractor}, batch_size, CPU, 2)
        self.ranges = {within.part: within for within in images.ranges()}
        """One of each part that holds a row of the splits."""

    def run(self, part: str) -> dict[str, Any]:
        return self.writer.run(range_task(self.ranges[part], ""))


def pooling(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> Pooled:
    """The method that preparers find in whatever model folder they are given."""
    method = Pooled(factor)
    monkeypatch.setattr("pipelines.data.cache_writer.load_model", lambda folder, device: SimpleNamespace(method=method))
    return method


def prepared(part: int) -> list[np.ndarray]:
    return [decode_prepared(row["image"], POLICY) for row in NORMALS[part]]


def all_of(folder: Any, part: str, name: str) -> np.ndarray:
    (path,) = Path(folder).glob(f"{part.removesuffix('.parquet')}-?????????-{name}.npy")
    return np.load(path, allow_pickle=False)


# ---- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_pixels_are_those_of_the_normal_images_in_the_order_of_the_part(shards, tmp_path, batch_size, monkeypatch):
    forbid_test_rows(monkeypatch)
    worker = Preparer(shards, tmp_path, batch_size=batch_size)
    assert list(worker.ranges) == [part for part, rows in zip(shards.parts, NORMALS, strict=True) if rows]
    for part, within in worker.ranges.items():
        record, name, expected = worker.run(part), part_name(within), np.stack(prepared(shards.parts.index(part)))
        path = tmp_path / array_name(name, PIXELS)
        size = path.stat().st_size
        pixels = np.load(path, allow_pickle=False)
        told = {"shape": list(pixels.shape), "dtype": "|u1", "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
        arrays = {PIXELS: {**told, "bytes": size}}
        assert record == {"part": name, "rows": len(expected), "arrays": arrays, "bytes": size}
        assert (pixels.dtype, pixels.shape) == (np.uint8, (len(expected), SIDE, SIDE, 3))
        assert np.array_equal(pixels, expected)
        assert outputs.part_record(str(tmp_path), name) == record
    assert [len(rows) for rows in NORMALS] == [14, 0, 11, 8]
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_selected_categories_are_prepared(shards, tmp_path):
    worker = Preparer(shards, tmp_path, selection=normals(["nut"]))
    assert [worker.run(part)["rows"] for part in worker.ranges] == [7, 5, 0]
    assert worker.run("part-3.parquet") == {"part": "part-3-000000000", "rows": 0, "arrays": {}, "bytes": 0}
    expected = [decode_prepared(row["image"], POLICY) for row in NORMALS[2] if row["category"] == "nut"]
    assert np.array_equal(all_of(tmp_path, "part-2.parquet", PIXELS), np.stack(expected))


# ---- labels and masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 100])
def test_anomalous_training_images_and_masks_lie_in_the_order_of_the_part(tmp_path, batch_size, monkeypatch):
    shards = write_shards(tmp_path / "shards", LABELLED_PARTS)
    forbid_test_rows(monkeypatch)
    selection = learnable(CATEGORIES, labels=True)
    worker = Preparer(shards, tmp_path / "set", selection=selection, masks=True, batch_size=batch_size)
    assert list(worker.ranges) == ["part-0.parquet", "part-2.parquet"]
    for part in worker.ranges:
        record, rows = worker.run(part), LABELLED[shards.parts.index(part)]
        assert (record["rows"], list(record["arrays"])) == (len(rows), [PIXELS, MASKS])
        pixels, masks = (all_of(tmp_path / "set", part, name) for name in (PIXELS, MASKS))
        assert (masks.dtype, masks.shape) == (bool, (len(rows), SIDE, SIDE))
        for row, image, mask in zip(rows, pixels, masks, strict=True):
            assert np.array_equal(image, decode_prepared(row["image"], POLICY))
            assert np.array_equal(mask, truth(row))
            assert mask.any() == bool(row["label"])
    assert [len(rows) for rows in LABELLED] == [7, 0, 11]


def test_features_of_anomalous_training_images_are_kept_in_the_same_rows(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", LABELLED_PARTS)
    method = pooling(monkeypatch)
    selection = learnable(CATEGORIES, labels=True)
    Preparer(shards, tmp_path / "set", selection=selection, model="somewhere", half=False).run(shards.parts[2])
    images = [decode_prepared(row["image"], POLICY) for row in LABELLED[2]]
    expected = method.frozen_features(normalise(images, POLICY))["fine"].detach()
    np.testing.assert_allclose(all_of(tmp_path / "set", shards.parts[2], "fine"), expected, rtol=1e-6)


def test_an_anomalous_image_without_mask_is_named(tmp_path):
    rows = [*masked("nut", "train", 2), sample("nut", "train", 7, 1), *samples("nut", "train", 2)]
    shards = write_shards(tmp_path / "shards", [rows])
    selection = learnable(["nut"], labels=True)
    message = r"^set/nut/train/1/007.png is anomalous but has no mask, which .*; add the mask, or leave the image out"
    with pytest.raises(DataError, match=message):
        Preparer(shards, tmp_path / "set", selection=selection, masks=True).run("part-0.parquet")
    Preparer(shards, tmp_path / "set", selection=selection).run("part-0.parquet")


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    rows = masked("nut", "train", 2)
    rows[1]["mask"] = rows[1]["mask"][:40]
    shards = write_shards(tmp_path / "shards", [rows])
    worker = Preparer(shards, tmp_path / "set", selection=learnable(["nut"], labels=True), masks=True)
    with pytest.raises(DataError, match=r"^mask of set/nut/train/1/001.png: .*; give --limits as at ingest, or"):
        worker.run("part-0.parquet")


def test_caches_with_and_without_anomalous_images_and_masks_are_told_apart(tmp_path, inline):
    shards = write_shards(tmp_path / "shards", LABELLED_PARTS)

    def prepare(labels: bool, masks: bool) -> CachedFeatures:
        selection, folder = learnable(["bolt", "nut"], labels), str(tmp_path / "caches")
        return prepare_pixels(shards, selection, POLICY, folder, LIMITS, RuntimeOptions(), masks)

    caches = {flags: prepare(*flags) for flags in [(False, False), (True, False), (True, True)]}
    assert len({cached.uri for cached in caches.values()}) == 3
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "caches").rglob("*.npy")}
    assert prepare(True, True).uri == caches[True, True].uri
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "caches").rglob("*.npy")} == written
    rows = {flags: cached.manifest()["rows"] for flags, cached in caches.items()}
    assert rows == {(False, False): 11, (True, False): 18, (True, True): 18}
    assert [feature_names(cached) for cached in caches.values()] == [(PIXELS,), (PIXELS,), (PIXELS, MASKS)]


# ---- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_features_are_the_encoders_in_the_precision_asked_for(shards, tmp_path, monkeypatch, half):
    method = pooling(monkeypatch)
    record = Preparer(shards, tmp_path, model="somewhere", half=half).run("part-0.parquet")
    kept = np.float16 if half else np.float32
    with torch.inference_mode():
        expected = method.frozen_features(normalise(prepared(0), POLICY))
    assert list(record["arrays"]) == [DESCRIPTOR, "fine", "coarse"]
    for name, shape in (("fine", (14, 1, 8, 8)), ("coarse", (14, 3, 4, 4))):
        array = all_of(tmp_path, "part-0.parquet", name)
        assert (array.dtype, array.shape) == (kept, shape)
        assert np.array_equal(array, expected[name].numpy().astype(kept))
    assert not list(tmp_path.glob(f"*-{PIXELS}.npy"))
    assert record["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))


def test_descriptors_are_means_over_places_in_full_precision(shards, tmp_path, monkeypatch):
    method = pooling(monkeypatch)
    Preparer(shards, tmp_path, model="somewhere", half=True).run("part-3.parquet")
    descriptors = all_of(tmp_path, "part-3.parquet", DESCRIPTOR)
    assert (descriptors.dtype, descriptors.shape) == (np.float32, (8, 4))
    for pixels, descriptor in zip(prepared(3), descriptors, strict=True):
        features = {k: v[0].tolist() for k, v in method.frozen_features(normalise([pixels], POLICY)).items()}
        means = []
        for channel in [*features["fine"], *features["coarse"]]:
            values = [value for line in channel for value in line]
            means.append(sum(values) / len(values))
        assert descriptor == pytest.approx(means, abs=1e-6)


def test_features_of_a_saved_method_are_those_it_computes_itself(shards, tmp_path):
    method = METHODS["uniad"](TINY["uniad"].config).eval()
    assert isinstance(method, TrainedMethod)
    Model(method, CATEGORIES).save(tmp_path / "encoder")
    worker = Preparer(shards, tmp_path, policy=method.input, model=str(tmp_path / "encoder"), half=False)
    worker.run("part-2.parquet")
    images = [decode_prepared(row["image"], method.input) for row in NORMALS[2]]
    with torch.inference_mode():
        expected = method.frozen_features(normalise(images, method.input))
    assert list(expected) == ["neck"]
    np.testing.assert_allclose(all_of(tmp_path, "part-2.parquet", "neck"), expected["neck"], rtol=1e-4, atol=1e-5)


def test_features_that_half_precision_cannot_hold_are_refused(shards, tmp_path, monkeypatch):
    pooling(monkeypatch, factor=1e5)
    message = r"^frozen features of part-0.parquet are not finite in half precision; use --data.feature_precision full$"
    with pytest.raises(DataError, match=message):
        Preparer(shards, tmp_path / "half", model="somewhere", half=True).run("part-0.parquet")
    assert files.list_names(str(tmp_path / "half")) == []
    Preparer(shards, tmp_path / "full", model="somewhere", half=False).run("part-0.parquet")
    assert np.abs(all_of(tmp_path / "full", "part-0.parquet", "fine")).max() > 65504


def test_features_that_are_not_finite_at_all_point_to_the_weights(shards, tmp_path, monkeypatch):
    pooling(monkeypatch, factor=float("nan"))
    with pytest.raises(DataError, match=r"features of part-3.parquet are not finite in float32; check weights"):
        Preparer(shards, tmp_path, model="somewhere", half=False).run("part-3.parquet")


# ---- reading ------------------------------------------------------------------------------------------------------


def test_rows_are_found_by_their_number(shards, tmp_path):
    worker = Preparer(shards, tmp_path / "set")
    parts = [worker.run(part)["part"] for part in worker.ranges]
    arrays = CachedFeatures(str(tmp_path / "set"), tmp_path / "copies", parts)
    for reader in (arrays, pickle.loads(pickle.dumps(arrays))):
        for number, part, row in ((0, 0, 0), (32, 3, 7), (13, 0, 13), (14, 2, 0), (19, 2, 5)):
            assert np.array_equal(reader.row(PIXELS, number), prepared(part)[row])
        with pytest.raises(IndexError):
            reader.row(PIXELS, 33)
    assert len(pickle.dumps(arrays)) < 2000  # maps do not travel with it
    assert not (tmp_path / "copies").exists()


def test_sets_on_an_object_store_are_copied_to_disk_once(shards, tmp_path):
    uri = "memory://test-features/set"
    try:
        worker = Preparer(shards, uri)
        arrays = CachedFeatures(uri, tmp_path, [worker.run(part)["part"] for part in worker.ranges])
        assert np.array_equal(arrays.row(PIXELS, 17), prepared(2)[3])
        assert len(list(tmp_path.iterdir())) == 1
        files.remove("memory://test-features")
        again = pickle.loads(pickle.dumps(arrays))
        assert np.array_equal(again.row(PIXELS, 18), prepared(2)[4])
    finally:
        files.remove("memory://test-features")

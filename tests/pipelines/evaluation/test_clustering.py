"""Clusters of images by their anomalous patches: what describes an image, and what a clustering leaves behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import unianom
from pipelines.data.cache_writer import CacheWriter
from pipelines.evaluation import clustering
from pipelines.evaluation.cluster_anomalies import cluster_anomalies
from pipelines.evaluation.cluster_summary import summarise_clusters
from pipelines.evaluation.clustering import cluster_vectors, describe_images, standardise
from pipelines.evaluation.options import ClusterOptions
from pipelines.reporting.cluster_report import print_clustering
from pipelines.runtime.model_set import write_index
from pipelines.runtime.options import RuntimeOptions
from tests.data.test_shards import write_set
from tests.pipelines.conftest import UNTRACKED, tiny_method
from tests.pipelines.sharded import POLICY, sample
from unianom.configs.backbone import BackboneConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.uniad import UniADConfig
from unianom.data.image import decode_prepared
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, ModelError, OptionError
from unianom.memory.index import MemoryBank
from unianom.methods import MaskedPatches
from unianom.methods.patchcore import PatchCore
from unianom.methods.uniad import UniAD
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model


@pytest.fixture(autouse=True)
def here(inline: None) -> None:
    """No test here has Ray."""


def drawn(category: str, kind: str | None, number: int) -> dict[str, Any]:
    """A grey image with noise; defects are squares of their own colour and mask."""
    rng = np.random.default_rng([number, *category.encode()])
    pixels = rng.integers(110, 130, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    if kind in ("red", "blue"):
        y, x = rng.integers(8, 30, 2)
        mask[y : y + 24, x : x + 24] = True
        pixels[mask] = (250, 0, 0) if kind == "red" else (0, 0, 250)
    label = None if kind is None else int(kind != "good")
    row = sample(category, "test", number, label, pixels, mask if label else None)
    return {**row, "defect": kind, "sample_id": f"{category}/{kind}/{number:02d}"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Plates with two types of defect, in two parts with bolts that are all good."""
    kinds = ["good", "red", "blue"]
    parts = [
        [drawn("plate", kinds[n % 3], n) for n in range(9)] + [drawn("bolt", "good", n) for n in range(3)],
        [drawn("bolt", "good", 3)] + [drawn("plate", kinds[n % 3], n) for n in range(9, 18)],
    ]
    return write_set(tmp_path_factory.mktemp("clusters") / "shards", parts)


@pytest.fixture(scope="module")
def model(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """UniFormaly with a bank of good plates, images that are in no shard."""
    method = UniFormaly(tiny_method(input=POLICY)).eval()
    images = [decode_prepared(drawn("plate", "good", 100 + n)["image"], method.input) for n in range(6)]
    with torch.inference_mode():
        embedding = method.embed(normalise(images, method.input))
    method.bank = MemoryBank.build(embedding.patches[embedding.keep].numpy())
    folder = tmp_path_factory.mktemp("model") / "model"
    Model(method, ["bolt", "plate"]).save(str(folder))
    return str(folder)


def options(model: str, shards: str, output: Path, **changes: Any) -> ClusterOptions:
    return ClusterOptions(model, shards, str(output), tracking=UNTRACKED, **changes)


def test_distances_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(20, 5)).astype(np.float32)
    patches, keep = rng.normal(size=(2, 7, 5)).astype(np.float32), rng.random((2, 7)) < 0.7
    method = UniFormaly(tiny_method(neighbours=3), MemoryBank.build(bank))
    found = method.patch_distances(MaskedPatches(torch.from_numpy(patches), torch.from_numpy(keep)))
    for image in range(2):
        for patch in range(7):
            near = sorted(float(((patches[image, patch] - row) ** 2).sum()) for row in bank)[:3]
            assert found[image, patch] == pytest.approx(np.mean(near) if keep[image, patch] else 0, rel=1e-5)


def test_what_describes_an_image_is_its_most_anomalous_patches(model: str, shards: str, tmp_path: Path) -> None:
    folder = Path(clustering.keep_features(*_kept(options(model, shards, tmp_path / "out", keep_ratio=0.5))))
    method = unianom.load(model).method
    rows = [r for b in ShardSet.open(shards).read("part-1.parquet") for r in b.to_pylist()]
    images = normalise([decode_prepared(row["image"], method.input) for row in rows], method.input)
    with torch.inference_mode():
        embedding = method.embed(images)
    distances = method.patch_distances(embedding)
    patches = embedding.patches.numpy()
    top, mean = (np.load(folder / f"part-1-000000000-0-{kind}.npy") for kind in ("top", "mean"))
    kept = np.load(folder / "part-1-000000000-0-distances.npy")
    np.testing.assert_allclose(kept, distances, rtol=1e-3, atol=1e-4)
    count = patches.shape[1]
    for number in range(len(rows)):
        order = sorted(range(count), key=lambda p, n=number: (-kept[n, p], p))
        expected = {
            ("top", "mean", 0.25): patches[number][order[: count // 4]].mean(0),
            ("top", "concat", 0.25): patches[number][order[: count // 4]].ravel(),
            ("max", "mean", 0.25): patches[number][order[0]],
            ("all", "mean", 0.25): patches[number].mean(0),
        }
        for (variant, pooling, ratio), vector in expected.items():
            described = describe_images(top, mean, count, variant, pooling, ratio)
            np.testing.assert_allclose(described[number], vector, rtol=1e-3, atol=1e-3)


def _kept(chosen: ClusterOptions) -> tuple[Any, ...]:
    model_set = clustering.ModelSet.open(chosen.model)
    return chosen, ShardSet.open(chosen.shards), model_set, model_set.descriptions()


def test_clusters_are_those_of_scikit_learn_the_largest_first() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(3, 4)) * 10
    truth = np.repeat([0, 1, 2], [5, 30, 12])
    vectors = centres[truth] + rng.normal(size=(47, 4))
    found, distances = cluster_vectors(vectors, 3, 10, 42)
    expected = KMeans(3, n_init=10, random_state=42).fit(vectors)
    assert adjusted_rand_score(expected.labels_, found) == 1
    assert np.bincount(found).tolist() == [30, 12, 5]
    np.testing.assert_allclose(distances, expected.transform(vectors).min(1))


def test_standardised_columns_weigh_the_same() -> None:
    vectors = np.random.default_rng(0).normal(3, [1, 1000, 0], (50, 3))
    scaled = standardise(vectors)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0], atol=1e-12)


def test_a_clustering_tells_defects_apart(model: str, shards: str, tmp_path: Path, capsys: Any) -> None:
    result = cluster_anomalies(options(model, shards, tmp_path / "out", shown=4))
    (row,) = result.content["categories"]
    assert (row["category"], row["images"], row["clusters"], row["types"]) == ("plate", 18, 3, 3)
    assert row["ari"] == row["nmi"] == row["accuracy"] == row["f1_macro"] == 1
    assert result.content["notes"] == ["bolt has 1 known type of image, so there is nothing to tell apart"]
    table = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert len({(r["defect"], r["cluster"]) for r in table}) == 3
    assert {r["sample_id"] for r in table} == {f"plate/{('good', 'red', 'blue')[n % 3]}/{n:02d}" for n in range(18)}
    print_clustering(result.content, result.folder, result.fresh)
    assert "6 blue" in capsys.readouterr().out
    sheet = Image.open(io.BytesIO((tmp_path / "out" / "clusters_plate.png").read_bytes()))
    assert sheet.size == (4 * 132 + 4, 3 * (24 + 2 * 132 + 14) + 4)
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert ((pixels[:, 0] > 200) & (pixels[:, 2] < 60)).any()
    assert ((pixels[:, 2] > 200) & (pixels[:, 0] < 60)).any()
    section = json.loads((tmp_path / "out" / "section.json").read_text())
    assert [figure["file"] for figure in section["figures"]] == ["clusters_plate.png"]
    assert all(len(r) == len(t["columns"]) for t in section["tables"] for r in t["rows"])


def test_another_variant_takes_no_network_and_a_second_run_nothing(
    model: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = options(model, shards, tmp_path / "out", shown=1)
    assert cluster_anomalies(first).fresh
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(CacheWriter, "run", lambda *_: pytest.fail("the network ran again"))
    assert not cluster_anomalies(first).fresh
    (tmp_path / "out" / "_manifest.json").unlink()
    assert cluster_anomalies(first).fresh
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    for number, changes in enumerate(
        [{"variant": "max", "scaling": "standard"}, {"variant": "all"}, {"pooling": "concat", "clusters": 4}]
    ):
        other = cluster_anomalies(
            options(model, shards, tmp_path / str(number), categories=("plate",), shown=0, **changes)
        )
        assert other.content["categories"][0]["clusters"] == changes.get("clusters", 3)
    with pytest.raises(DataError, match="differing in: variant"):
        cluster_anomalies(options(model, shards, tmp_path / "out", shown=1, variant="max"))


def test_anomalous_images_only_and_a_model_of_each_category(model: str, shards: str, tmp_path: Path) -> None:
    model_set = tmp_path / "models"
    model_set.mkdir()
    for name in ("bolt", "plate"):
        (model_set / name).symlink_to(model)
    write_index(str(model_set), {"bolt": "bolt", "plate": "plate"})
    result = cluster_anomalies(options(str(model_set), shards, tmp_path / "out", anomalous_only=True))
    (row,) = result.content["categories"]
    assert (row["images"], row["clusters"], row["accuracy"]) == (12, 2, 1)
    assert ShardSet.open(shards).count(Selection(labels=(1,))) == 12


def test_results_do_not_depend_on_the_number_of_workers(model: str, shards: str, tmp_path: Path) -> None:
    written = []
    for workers in (1, 2):
        output = tmp_path / str(workers) / "out"
        cluster_anomalies(options(model, shards, output, runtime=RuntimeOptions(workers=workers)))
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert written[0] == written[1]


def test_patchcore_clusters_too_and_unlabelled_images_need_a_number(tmp_path: Path) -> None:
    unlabelled = write_set(tmp_path / "shards", [[drawn("plate", None, n) for n in range(6)]])
    config = PatchCoreConfig(backbone=BackboneConfig("resnet18", weights="random"), input=POLICY, dimension=16)
    method = PatchCore(config, MemoryBank.build(np.zeros((4, 16), np.float32)))
    Model(method.eval(), ["plate"]).save(str(tmp_path / "model"))
    with pytest.raises(DataError, match="give --clusters"):
        cluster_anomalies(options(str(tmp_path / "model"), unlabelled, tmp_path / "a"))
    result = cluster_anomalies(options(str(tmp_path / "model"), unlabelled, tmp_path / "b", clusters=2))
    (row,) = result.content["categories"]
    assert (row["nmi"], row["clusters"], row["types"]) == (None, 2, 0)
    assert sum(entry["images"] for entry in result.content["clusters"]) == 6


def test_summaries_by_hand() -> None:
    types = ["a", "a", "b", "b", "b", None]
    rows = [{"cluster": c, "type": t} for c, t in zip([0, 0, 0, 1, 1, 1], types, strict=True)]
    first, second = summarise_clusters("x", rows)
    assert (first["images"], first["majority"], first["share"], first["matched"]) == (3, "a", 2 / 3, "a")
    assert (second["images"], second["majority"], second["share"], second["matched"]) == (3, "b", 2 / 3, "b")
    assert first["types"] == {"a": 2, "b": 1}


def test_errors(model: str, shards: str, tmp_path: Path) -> None:
    for changes, match in (
        ({"k_ratio": 0.2}, "raise --keep_ratio"),
        ({"variant": "all", "pooling": "concat"}, "--pooling mean"),
        ({"clusters": 0}, "clusters=0"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
    ):
        with pytest.raises(OptionError, match=match):
            options(model, shards, tmp_path / "out", **changes)
    with pytest.raises(OptionError, match=r"k_ratio of 0\.05 exceeds"):
        cluster_anomalies(options(model, shards, tmp_path / "out", keep_ratio=0.01))
    with pytest.raises(DataError, match="too few for 19 clusters"):
        cluster_anomalies(options(model, shards, tmp_path / "many", categories=("plate",), clusters=19))
    trained = UniAD(UniADConfig(backbone=BackboneConfig("resnet18", weights="random"), input=POLICY, neighbours=3))
    Model(trained.eval(), ["plate"]).save(str(tmp_path / "uniad"))
    with pytest.raises(ModelError, match="no memory bank"):
        cluster_anomalies(options(str(tmp_path / "uniad"), shards, tmp_path / "out2"))

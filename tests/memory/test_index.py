import json
import pickle
import sys

import faiss
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import NearestNeighbors

from unianom.errors import DataError, ModelError, OptionError, UnianomError
from unianom.memory.exact_search import merge_results
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.memory.storage import load_shard


def _vectors(rows=700, dimension=24, seed=0, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (offset + scale * rng.standard_normal((rows, dimension))).astype(np.float32)


def _brute_force(vectors, queries, k):
    squared = ((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(axis=2).astype(np.float32)
    rows = np.lexsort((np.broadcast_to(np.arange(len(vectors)), squared.shape), squared), axis=1)[:, :k]
    return np.take_along_axis(squared, rows, axis=1), rows


def _same(found, expected):
    return np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_flat_search_is_brute_force(shards, k):
    vectors, queries = _vectors(), _vectors(150, seed=1)
    distances, rows = MemoryBank.build(vectors, shards).search(queries, k)
    assert distances.dtype == np.float32
    assert rows.dtype == np.int64
    assert _same((distances, rows), _brute_force(vectors, queries, k))


def test_flat_search_agrees_with_scikit_learn():
    vectors, queries = _vectors(), _vectors(60, seed=1)
    distances, rows = MemoryBank.build(vectors, shards=3).search(queries, 5)
    expected, expected_rows = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(vectors).kneighbors(queries)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(distances, expected**2, rtol=1e-5)


def test_search_is_exact_where_faiss_alone_is_not():
    # Vectors far from the origin: |x|² + |y|² − 2xy in float32 loses what tells them apart.
    vectors, queries = _vectors(offset=300, scale=0.05), _vectors(120, seed=1, offset=300, scale=0.05)
    bank = MemoryBank.build(vectors)
    expected = _brute_force(vectors, queries, 4)
    assert not _same(bank.shards[0].index.search(queries, 4), expected)
    for shards in (1, 2, 3, 4, 7):
        assert _same(MemoryBank.build(vectors, shards).search(queries, 4), expected)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
@pytest.mark.parametrize("offset", [0, 300])
def test_neither_shards_nor_batches_change_a_bit(kind, offset):
    vectors, queries = _vectors(offset=offset, scale=0.1), _vectors(130, seed=1, offset=offset, scale=0.1)
    options = {} if kind == "flat" else {"nlist": 20, "nprobe": 4}
    expected = MemoryBank.build(vectors, 1, kind, **options).search(queries, 3)
    for shards in (1, 2, 3, 4, 7):
        bank = MemoryBank.build(vectors, shards, kind, **options)
        assert _same(bank.search(queries, 3), expected)
        for pieces in (2, 9, 130):
            answers = [bank.search(part, 3) for part in np.array_split(queries, pieces)]
            assert _same([np.concatenate(parts) for parts in zip(*answers, strict=True)], expected)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
@pytest.mark.parametrize("shards", [1, 3])
def test_duplicates_come_in_order_of_rows(kind, shards):
    vectors = _vectors(300)
    vectors[50:250] = vectors[7]  # far more duplicates than FAISS is first asked for
    distances, rows = MemoryBank.build(vectors, shards, kind).search(vectors[[7, 7, 20]], 3)
    assert rows.tolist()[:2] == [[7, 50, 51]] * 2
    assert distances[0].tolist() == [0, 0, 0]
    assert rows[2, 0] == 20


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_bank_of_equal_rows(kind):
    vectors = np.ones((90, 4), dtype=np.float32)
    distances, rows = MemoryBank.build(vectors, 2, kind, **({} if kind == "flat" else {"nlist": 1})).search(vectors, 90)
    assert (distances == 0).all()
    assert (rows == np.arange(90)).all()


def test_shards_answer_apart_and_are_merged_in_any_order():
    vectors, queries = _vectors(), _vectors(50, seed=1)
    bank = MemoryBank.build(vectors, 4)
    parts = [shard.search(queries, 6) for shard in bank.shards]
    assert [shard.first_row for shard in bank.shards] == [0, 175, 350, 525]
    assert all((rows >= shard.first_row).all() for shard, (_, rows) in zip(bank.shards, parts, strict=True))
    assert _same(merge_results(parts[::-1], 6), _brute_force(vectors, queries, 6))


@pytest.mark.parametrize("shards", [1, 3])
def test_ties_that_rounding_would_break(shards):
    # Whole numbers, so distances tie exactly; far from the origin, so FAISS's do not.
    rng = np.random.default_rng(0)
    vectors = (4000 + rng.integers(-1, 2, (400, 6))).astype(np.float32)
    queries = (4000 + rng.integers(-1, 2, (200, 6))).astype(np.float32)
    bank = MemoryBank.build(vectors, shards)
    assert _same(bank.search(queries, 5), _brute_force(vectors, queries, 5))
    parts = [shard.search(queries, 5) for shard in reversed(bank.shards)]
    assert _same(merge_results(parts, 5), _brute_force(vectors, queries, 5))


def test_k_larger_than_a_shard():
    vectors, queries = _vectors(20), _vectors(5, seed=1)
    assert _same(MemoryBank.build(vectors, 7).search(queries, 20), _brute_force(vectors, queries, 20))


def test_ivf_over_all_lists_is_exact():
    vectors, queries = _vectors(), _vectors(60, seed=1)
    bank = MemoryBank.build(vectors, 2, "ivf_flat", nlist=12, nprobe=12)
    assert _same(bank.search(queries, 5), _brute_force(vectors, queries, 5))
    recall = bank.recall(queries, 5)
    assert (recall.at_1, recall.at_k, recall.max_distance_change) == (1, 1, 0)


@pytest.mark.parametrize("offset", [0, 300])
def test_ivf_compares_the_rows_of_the_nearest_lists(offset):
    vectors, queries = _vectors(offset=offset, scale=0.1), _vectors(60, seed=1, offset=offset, scale=0.1)
    bank = MemoryBank.build(vectors, 3, "ivf_flat", nlist=10, nprobe=2, seed=5)
    quantizer = faiss.downcast_index(bank.shards[0].index.quantizer)
    centroids = quantizer.reconstruct_n(0, 10)
    list_of_row = _brute_force(centroids, vectors, 1)[1][:, 0]
    for query, lists, found in zip(queries, _brute_force(centroids, queries, 2)[1], bank.search(queries, 4)[1]):
        rows = np.flatnonzero(np.isin(list_of_row, lists))
        assert found.tolist() == rows[_brute_force(vectors[rows], query[None], 4)[1][0]].tolist()


def test_recall_is_measured_against_exact_search():
    vectors, queries = _vectors(), _vectors(80, seed=1)
    bank = MemoryBank.build(vectors, 2, "ivf_flat", nlist=25, nprobe=2)
    distances, rows = bank.search(queries, 3)
    exact, exact_rows = _brute_force(vectors, queries, 3)
    recall = bank.recall(queries, 3)
    assert recall.at_1 == np.mean(rows[:, 0] == exact_rows[:, 0])
    assert 0.2 < recall.at_1 < 1
    common = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact_rows.tolist(), strict=True)]
    assert recall.at_k == pytest.approx(np.sum(common) / 240)
    assert recall.max_distance_change == pytest.approx((distances[:, 0] / exact[:, 0]).max() - 1, rel=1e-5)


def test_lists_depend_on_the_seed_alone():
    vectors, queries = _vectors(), _vectors(50, seed=1)
    first, again, other = (
        MemoryBank.build(vectors, 1, "ivf_flat", nlist=25, nprobe=1, seed=seed).search(queries, 1) for seed in (0, 0, 1)
    )
    assert _same(first, again)
    assert not _same(first, other)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_vectors_come_back_as_they_went_in(kind):
    vectors = _vectors()
    bank = MemoryBank.build(vectors, 3, kind)
    assert (bank.rows, bank.dimension) == vectors.shape
    assert np.array_equal(bank.vectors(), vectors)
    rows = np.array([[699, 0, 233], [234, 5, 5]])
    assert np.array_equal(bank.rows_at(rows), vectors[rows])
    assert bank.rows_at(np.empty((0, 2), dtype=np.int64)).shape == (0, 2, 24)
    for outside in (-1, 700):
        with pytest.raises(OptionError, match="0 to 699"):
            bank.rows_at(np.array([3, outside]))


def test_no_queries():
    distances, rows = MemoryBank.build(_vectors(), 2).search(np.empty((0, 24), dtype=np.float32), 3)
    assert distances.shape == rows.shape == (0, 3)


def test_wrong_queries_are_refused():
    bank = MemoryBank.build(_vectors(), 2)
    queries = _vectors(5)
    for k in (0, 701):
        with pytest.raises(OptionError, match="between 1 and the 700 rows"):
            bank.search(queries, k)
    with pytest.raises(OptionError, match="at least 1"):
        bank.shards[0].search(queries, 0)
    with pytest.raises(DataError, match="dimension 23"):
        bank.search(queries[:, :23], 1)
    for value in (np.nan, np.inf, 1e30):
        queries[2, 3] = value
        with pytest.raises(DataError, match="queries of a memory bank hold NaN"):
            bank.search(queries, 1)


def test_wrong_banks_are_refused():
    vectors = _vectors()
    with pytest.raises(OptionError, match="cut into 701 shards"):
        MemoryBank.build(vectors, 701)
    with pytest.raises(OptionError, match="'pq'"):
        MemoryBank.build(vectors, kind="pq")
    for nlist, nprobe in [(701, 1), (10, 11), (10, 0)]:
        with pytest.raises(OptionError, match="nprobe <= nlist <= rows"):
            MemoryBank.build(vectors, kind="ivf_flat", nlist=nlist, nprobe=nprobe)
    with pytest.raises(DataError, match="shape"):
        MemoryBank.build(vectors[:0])
    vectors[0, 0] = np.nan
    with pytest.raises(DataError, match="vectors of a memory bank hold NaN"):
        MemoryBank.build(vectors)


def test_too_few_rows_in_the_probed_lists():
    bank = MemoryBank.build(_vectors(100), 2, "ivf_flat", nlist=50, nprobe=1)
    with pytest.raises(OptionError, match="raise nprobe"):
        bank.search(_vectors(20, seed=1), 60)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
@pytest.mark.parametrize("place", ["{folder}/bank", "memory://bank-{kind}"])
def test_saved_bank_gives_the_same_answers(kind, place, tmp_path):
    uri = place.format(folder=tmp_path, kind=kind)
    vectors, queries = _vectors(), _vectors(40, seed=1)
    bank = MemoryBank.build(vectors, 3, kind, metadata={"coreset_ratio": 0.1, "seed": 7})
    bank.save(uri)
    loaded = MemoryBank.load(uri)
    assert (loaded.kind, loaded.metadata) == (kind, {"coreset_ratio": 0.1, "seed": 7})
    assert np.array_equal(loaded.vectors(), vectors)
    assert _same(loaded.search(queries, 4), bank.search(queries, 4))
    apart = [load_shard(uri, number).search(queries, 4) for number in (2, 0, 1)]
    assert _same(merge_results(apart, 4), bank.search(queries, 4))
    with pytest.raises(OptionError, match="no shard 3"):
        load_shard(uri, 3)
    manifest = json.loads(fsspec.open(f"{uri}/manifest.json").open().read())
    assert [entry["rows"] for entry in manifest["shards"]] == [233, 233, 234]
    assert manifest["parameters"] == ({} if kind == "flat" else {"nlist": 26, "nprobe": 8})


def test_saving_again_leaves_nothing_behind(tmp_path):
    MemoryBank.build(_vectors(), 5).save(str(tmp_path))
    MemoryBank.build(_vectors(), 2).save(str(tmp_path))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["manifest.json", "shard-00000-of-00002.faiss", "shard-00001-of-00002.faiss"]
    MemoryBank.build(_vectors(), 2).save(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def _origins(rows=700, images=9, seed=5):
    """Runs of rows of each image, but none of the last one."""
    numbers = np.sort(np.random.default_rng(seed).integers(0, images - 1, rows)).astype(np.int32)
    return Origins(tuple(f"good/{number:03d}.png" for number in range(images)), numbers)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("shards", [1, 4])
def test_without_an_image_the_answers_are_those_of_a_bank_of_the_others(k, shards):
    origins = _origins()
    # an image's own rows are by far the nearest, so that many proposals do not count
    vectors = _vectors() + 20 * np.random.default_rng(3).standard_normal((9, 24)).astype(np.float32)[origins.rows]
    bank = MemoryBank.build(vectors, shards, origins=origins)
    for image in (0, 3, 7, 8):
        others = np.flatnonzero(origins.rows != image)
        queries = np.concatenate([vectors[origins.rows == image][:30], _vectors(10, seed=1)])
        expected, rows = _brute_force(vectors[others], queries, k)
        left = bank.without_image(image)
        assert left.rows == len(others)
        assert _same(left.search(queries, k), (expected, others[rows]))
        assert np.array_equal(left.vectors(), MemoryBank.build(vectors[others]).vectors())
        assert np.array_equal(left.rows_at(others[rows]), vectors[others[rows]])
    assert _same(bank.search(vectors[:20], k), _brute_force(vectors, vectors[:20], k))


@pytest.mark.parametrize("shards", [1, 3])
def test_without_an_image_the_lists_of_an_inverted_file_stay(shards):
    origins, vectors = _origins(), _vectors()
    bank = MemoryBank.build(vectors, shards, "ivf_flat", nlist=12, nprobe=3, seed=5, origins=origins)
    centroids = faiss.downcast_index(bank.shards[0].index.quantizer).reconstruct_n(0, 12)
    to_centroids = ((vectors[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    nearest = np.argsort(to_centroids, axis=1)
    for image in (0, 4):
        others = origins.rows != image
        queries = vectors[origins.rows == image]
        for query, lists, distances, rows in zip(
            queries, nearest[~others][:, :3], *bank.without_image(image).search(queries, 3), strict=True
        ):
            searched = np.flatnonzero(others & np.isin(nearest[:, 0], lists))
            expected, found = _brute_force(vectors[searched], query[None], 3)
            assert np.array_equal(distances, expected[0])
            assert np.array_equal(rows, searched[found[0]])


def test_a_bank_without_an_image_may_be_too_small():
    vectors, rows = _vectors(6), np.array([0, 0, 0, 0, 1, 1], np.int32)
    left = MemoryBank.build(vectors, origins=Origins(("a", "b"), rows)).without_image(0)
    assert left.search(vectors, 2)[1].tolist() == (4 + _brute_force(vectors[4:], vectors, 2)[1]).tolist()
    with pytest.raises(OptionError, match="between 1 and the 2 rows"):
        left.search(vectors, 3)
    with pytest.raises(UnianomError, match="save the whole bank"):
        left.save("nowhere")
    with pytest.raises(OptionError, match="no vectors of other images"):
        MemoryBank.build(vectors, origins=Origins(("a",), np.zeros(6, np.int32))).without_image(0)
    with pytest.raises(ModelError, match="does not tell which image"):
        MemoryBank.build(vectors).without_image(0)
    with pytest.raises(DataError, match="a bank of 6 rows got the origins of 5"):
        MemoryBank.build(vectors, origins=Origins(("a",), np.zeros(5, np.int32)))
    with pytest.raises(DataError, match="from images 0 to 1 of 1"):
        Origins(("a",), rows)


def test_origins_are_saved_with_the_bank(tmp_path):
    shuffled = np.random.default_rng(0).permutation(_origins().rows)  # need not be in runs
    origins = Origins(_origins().images, shuffled)
    MemoryBank.build(_vectors(), 2, origins=origins).save(str(tmp_path))
    table = pq.read_table(tmp_path / "origins.parquet").to_pylist()
    assert [row["sample_id"] for row in table] == list(origins.images)
    assert [row["rows"] for row in table] == [np.flatnonzero(shuffled == number).tolist() for number in range(9)]
    found = MemoryBank.load(str(tmp_path)).origins
    assert found.images == origins.images
    assert np.array_equal(found.rows, shuffled)
    (tmp_path / "origins.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModelError, match=r"origins.parquet is damaged"):
        MemoryBank.load(str(tmp_path))
    (tmp_path / "origins.parquet").unlink()
    with pytest.raises(ModelError, match=r"origins.parquet is missing"):
        MemoryBank.load(str(tmp_path))
    MemoryBank.build(_vectors(), 2, origins=origins).save(str(tmp_path))
    MemoryBank.build(_vectors(), 2).save(str(tmp_path))  # a bank of before, over a newer one
    assert not (tmp_path / "origins.parquet").exists()
    assert MemoryBank.load(str(tmp_path)).origins is None


def _edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_entry(folder, number, **changes):
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    entries[number] |= changes
    _edit_manifest(folder, shards=entries)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "format version None"),
        (lambda folder: _edit_manifest(folder, format_version=2), "format version 2"),
        (lambda folder: _edit_manifest(folder, kind="pq"), "not valid"),
        (lambda folder: _edit_manifest(folder, shards=[]), "not valid"),
        (lambda folder: _edit_manifest(folder, rows=None), "not valid"),
        (lambda folder: _edit_manifest(folder, origins=["origins.parquet"]), "not valid"),
        (lambda folder: _edit_manifest(folder, rows=699), "holds 700 rows, its manifest says 699"),
        (lambda folder: _edit_manifest(folder, dimension=23), "dimension 24"),
        (lambda folder: _edit_manifest(folder, kind="ivf_flat"), "holds a IndexFlatL2, not the IndexIVFFlat"),
        (lambda folder: _edit_entry(folder, 1, first_row=340), "gap at row 350"),
        (lambda folder: _edit_entry(folder, 1, rows=10), "manifest says 10"),
        (lambda folder: _edit_entry(folder, 1, sha256="0"), "00001-of-00002.faiss is damaged"),
        (lambda folder: _edit_entry(folder, 1, file="../other.faiss"), "not valid"),
        (lambda folder: (folder / "shard-00001-of-00002.faiss").unlink(), "00001-of-00002.faiss is missing"),
    ],
)
def test_damaged_folders_are_named(damage, message, tmp_path):
    MemoryBank.build(_vectors(), 2).save(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        MemoryBank.load(str(tmp_path))


def test_file_that_is_no_index(tmp_path):
    import hashlib

    MemoryBank.build(_vectors(), 2).save(str(tmp_path))
    (tmp_path / "shard-00000-of-00002.faiss").write_bytes(b"no index at all")
    _edit_entry(tmp_path, 0, sha256=hashlib.sha256(b"no index at all").hexdigest())
    with pytest.raises(ModelError, match="not an index that FAISS"):
        MemoryBank.load(str(tmp_path))


def test_bank_can_be_sent_to_another_process():
    bank = MemoryBank.build(_vectors(), 2, "ivf_flat")
    sent = pickle.loads(pickle.dumps(bank))
    assert _same(sent.search(_vectors(9, seed=1), 2), bank.search(_vectors(9, seed=1), 2))


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnianomError, match=r"'\.\[cpu\]'"):
        MemoryBank.build(_vectors())

"""Scoring: which maps are kept, images that cannot be read, and what a slow writer and a slow network do."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data import decoded_batches
from pipelines.inference import range_scorer
from pipelines.inference.options import ScoreOptions
from pipelines.inference.range_scorer import RangeScorer
from pipelines.inference.score import score
from pipelines.inference.score_manifest import score_part
from pipelines.runtime.model_set import ModelSet
from tests.pipelines.conftest import Small
from tests.pipelines.inference.conftest import ONE, limit
from unianom import files
from unianom.data.id_digest import IdDigest
from unianom.data.image import ImageLimits, decode_upright
from unianom.data.schema import STATUSES
from unianom.data.shards import MANIFEST, PartWriter, ScoreSet, Selection, ShardSet, write_rejected
from unianom.errors import DataError, MachineError, ModelError
from unianom.execution import CPU
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model
from unianom.thresholds import Bands, DecisionRule

MAPS = ("anomaly_map", "map_offset", "map_scale")


def rows_of(scores: ScoreSet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = scores.table().to_pylist()
    return rows


def test_scores_and_decisions_are_the_same_whichever_maps_are_kept(
    model: str, shards: ShardSet, tmp_path: Path
) -> None:
    given = {maps: ScoreOptions(model, shards.uri, output=str(tmp_path / maps), maps=maps, runtime=ONE) for maps in
             ("none", "flagged", "all")}  # fmt: skip
    found = {maps: score(options).scores for maps, options in given.items()}
    assert {maps: scores.maps for maps, scores in found.items()} == {maps: maps for maps in given}
    rows = {maps: rows_of(scores) for maps, scores in found.items()}
    assert {row["decision"] for row in rows["all"]} == {"pass", "review", "fail"}
    for none, some, every in zip(rows["none"], rows["flagged"], rows["all"], strict=True):
        kept = every["decision"] != "pass"
        assert all(every[name] is not None for name in MAPS)
        assert some == (every if kept else {**every, **dict.fromkeys(MAPS)})
        assert none == {**every, **dict.fromkeys(MAPS)}
    for options in given.values():
        assert not score(options).fresh
    with pytest.raises(DataError, match="differing in: maps"):
        score(ScoreOptions(model, shards.uri, output=str(tmp_path / "none"), maps="all", runtime=ONE))


def test_maps_are_kept_where_there_are_masks_unless_it_is_said(small: Small, tiny_model: Path, tmp_path: Path) -> None:
    masked = score(
        ScoreOptions(str(tiny_model), str(small.shards), output=str(tmp_path / "masked"), runtime=ONE)
    ).scores
    assert masked.maps == "all"
    good = score(
        ScoreOptions(str(tiny_model), str(small.shards), output=str(tmp_path / "good"), splits=("train",), runtime=ONE)
    ).scores
    assert good.maps == "none"


def test_a_model_that_decides_nothing_flags_nothing(method: UniFormaly, shards: ShardSet, tmp_path: Path) -> None:
    """Told before anything is written; so where it decides of some categories only."""
    Model(method, ["disc", "stripe"]).save(tmp_path / "none")
    Model(method, ["disc", "stripe"], category_thresholds={"disc": limit(1.0)}).save(tmp_path / "one")
    bands = Bands(limit(1.0), limit(0.5), 1.0)
    Model(method, ["disc", "stripe"], decision_rule=DecisionRule("raw", None, {"disc": bands})).save(tmp_path / "rule")
    for name, category in (("none", "disc"), ("one", "stripe"), ("rule", "stripe")):
        options = ScoreOptions(
            str(tmp_path / name), shards.uri, output=str(tmp_path / "out"), maps="flagged", runtime=ONE
        )
        with pytest.raises(ModelError, match=f"{name} has no threshold for category '{category}'"):
            score(options)
        assert not (tmp_path / "out").exists()
    discs = ScoreOptions(
        str(tmp_path / "one"),
        shards.uri,
        output=str(tmp_path / "out"),
        categories=("disc",),
        maps="flagged",
        runtime=ONE,
    )
    assert all((row["decision"] == "fail") == (row["anomaly_map"] is not None) for row in rows_of(score(discs).scores))


def scorer(model: str, shards: ShardSet, output: Path, **changes: Any) -> RangeScorer:
    models = ModelSet.open(model)
    given: dict[str, Any] = {
        "shards": shards,
        "selection": Selection(),
        "model_set": models,
        "digests": {models.uri: "d" * 64},
        "output": str(output),
        "plan": "0" * 64,
        "maps": "all",
        "batch_size": 2,
        "limits": ImageLimits(),
        "execution": CPU,
        "threads": 1,
    }
    return RangeScorer(**{**given, **changes})


def whole(shards: ShardSet, part: str) -> dict[str, Any]:
    """The range of all rows of a part."""
    (within,) = (one for one in shards.ranges(Selection()) if one.part == part)
    return dataclasses.asdict(within)


def read_part(scorer: RangeScorer, shards: ShardSet, output: Path, part: str) -> list[dict[str, Any]]:
    record = scorer.run(whole(shards, part))
    entries = [{key: record[key] for key in ("name", "rows", "sha256")}]
    rows: list[dict[str, Any]] = ScoreSet(str(output), {"files": entries}, "").table().to_pylist()
    assert record["rows"] == len(rows)
    return rows


def test_images_that_cannot_be_read_stay_in_their_place(model: str, shards: ShardSet, tmp_path: Path) -> None:
    """Limits of scoring refuse what ingest took; the others score what they score by themselves."""
    part = shards.parts[0]
    whole = read_part(scorer(model, shards, tmp_path / "whole"), shards, tmp_path / "whole", part)
    sizes = [len(row["image"]) for batch in shards.read(part) for row in batch.to_pylist()]
    most = sorted(sizes)[len(sizes) // 2]
    limits = ImageLimits(max_bytes=most)
    rows = read_part(scorer(model, shards, tmp_path / "some", limits=limits), shards, tmp_path / "some", part)
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in whole]
    assert {row["status"] for row in rows} == {"ok", "too_large"}
    for row, full, size in zip(rows, whole, sizes, strict=True):
        if size <= most:
            assert row["score"] == pytest.approx(full["score"], rel=1e-5)
            assert row["decision"] == full["decision"]
        else:
            assert row["status"] == "too_large"
            assert str(size) in row["error"]
            assert all(row[name] is None for name in ("score", "decision", *MAPS))
    none = read_part(
        scorer(model, shards, tmp_path / "no", limits=ImageLimits(max_bytes=10)), shards, tmp_path / "no", part
    )
    assert {row["status"] for row in none} == {"too_large"}


def test_bytes_do_not_depend_on_the_threads_that_decode(model: str, shards: ShardSet, tmp_path: Path) -> None:
    records = [
        scorer(model, shards, tmp_path / str(threads), threads=threads).run(whole(shards, shards.parts[1]))
        for threads in (1, 3)
    ]
    assert records[0]["sha256"] == records[1]["sha256"]
    stored = [path.read_bytes() for path in sorted(tmp_path.glob("*/_part-*.json"))]
    assert stored[0] == stored[1]
    assert b"stages" not in stored[0]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Decoders that hang wait for it; set at the end, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


def hang_at(monkeypatch: pytest.MonkeyPatch, release: threading.Event, *hung: bytes) -> None:
    """Let the decoder hang at some files."""

    def decode(data: bytes, *rest: Any) -> Any:
        if data in hung:
            release.wait()
        return decode_upright(data, *rest)

    monkeypatch.setattr("pipelines.data.decoded_rows.decode_upright", decode)


def test_an_image_whose_decoder_hangs_is_a_row_with_its_status(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    """The others score what they score by themselves, and bytes do not depend on the threads that decode."""
    part = shards.parts[0]
    whole = read_part(scorer(model, shards, tmp_path / "whole"), shards, tmp_path / "whole", part)
    images = [row["image"] for batch in shards.read(part) for row in batch.to_pylist()]
    hang_at(monkeypatch, release, images[0], images[5])
    limits = ImageLimits(seconds=1)
    for threads in (1, 3):
        output = tmp_path / str(threads)
        rows = read_part(scorer(model, shards, output, limits=limits, threads=threads), shards, output, part)
        assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in whole]
        assert [number for number, row in enumerate(rows) if row["status"] == "timeout"] == [0, 5]
        for row, full in zip(rows, whole, strict=True):
            if row["status"] == "ok":
                assert row["score"] == pytest.approx(full["score"], rel=1e-5)
                assert row["decision"] == full["decision"]
            else:
                assert "took more than 1 s" in row["error"]
                assert all(row[name] is None for name in ("score", "decision", *MAPS))
    one, three = ((tmp_path / name / score_part(part, "0" * 64, 0)).read_bytes() for name in ("1", "3"))
    assert one == three


def test_a_part_of_which_too_many_images_hang_fails(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    images = [row["image"] for batch in shards.read(shards.parts[0]) for row in batch.to_pylist()]
    hang_at(monkeypatch, release, *images)
    monkeypatch.setattr("pipelines.data.timed_pool.MOST_HANGING", 1)
    with pytest.raises(MachineError, match=r"2 threads of a worker hang"):
        scorer(model, shards, tmp_path, limits=ImageLimits(seconds=0.3)).run(whole(shards, shards.parts[0]))
    assert not [name for name in files.list_names(str(tmp_path)) if name.endswith((".parquet", ".json"))]


def test_the_limit_of_time_is_told_by_the_manifest_and_part_of_a_plan_where_it_is_given(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    images = [row["image"] for batch in shards.read(shards.parts[1]) for row in batch.to_pylist()]
    hang_at(monkeypatch, release, images[2])
    options = ScoreOptions(
        model,
        shards.uri,
        output=str(tmp_path / "scores"),
        limits=ImageLimits(seconds=1),
        max_reject_fraction=0.5,
        runtime=ONE,
    )
    scores = score(options).scores
    assert scores.manifest["statuses"] == {"ok": 22, "timeout": 1}
    assert {row["status"] for row in rows_of(scores)} <= set(STATUSES)
    assert not score(options).fresh
    with pytest.raises(DataError, match="differing in: limits"):
        score(replace(options, limits=ImageLimits()))
    with pytest.raises(DataError, match=r"1 of 23 .*1 timeout"):
        score(replace(options, max_reject_fraction=0.0))


def test_a_slow_writer_holds_the_network_back(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight batches no more than those in hand are predicted before the first is written; order is kept."""
    part = shards.parts[0]
    expected = read_part(scorer(model, shards, tmp_path / "fast", batch_size=1), shards, tmp_path / "fast", part)
    monkeypatch.setattr(range_scorer, "WRITTEN_ROWS", 1)
    go, predicted, stalled = threading.Event(), [], threading.Event()
    write = PartWriter.write_table

    def slow(self: PartWriter, table: Any) -> None:
        assert go.wait(60)
        write(self, table)

    class Counting(RangeScorer):
        def _score(self, batch: Any) -> Any:
            predicted.append(len(batch.rows))
            if len(predicted) == 2:
                stalled.set()
            return super()._score(batch)

    monkeypatch.setattr(PartWriter, "write_table", slow)
    monkeypatch.setattr("tests.pipelines.inference.test_score.RangeScorer", Counting)
    rows: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: rows.extend(
            read_part(scorer(model, shards, tmp_path / "slow", batch_size=1), shards, tmp_path / "slow", part)
        )
    )
    thread.start()
    assert stalled.wait(60)
    thread.join(0.3)
    assert len(predicted) == 2  # one is being written, one waits
    go.set()
    thread.join(60)
    assert rows == expected
    assert len(predicted) == len(expected) == 8


def test_a_slow_network_holds_the_reader_and_the_decoder_back(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight images, read one by one, three are decoded while the network is at the first, and one more is read."""
    part = shards.parts[0]
    expected = read_part(scorer(model, shards, tmp_path / "fast", batch_size=1), shards, tmp_path / "fast", part)
    go, ahead = threading.Event(), threading.Semaphore(0)
    read: list[int] = []
    decoded: list[int] = []
    read_range, decode = ShardSet.read_range, decoded_batches.decode_fitted

    def one_by_one(self: ShardSet, *given: Any) -> Iterator[Any]:
        for batch in read_range(self, *given):
            for row in range(batch.num_rows):
                read.append(row)
                ahead.release()
                yield batch.slice(row, 1)

    def counted(*given: Any) -> np.ndarray:
        decoded.append(1)
        ahead.release()
        return decode(*given)

    class Waiting(RangeScorer):
        def _score(self, batch: Any) -> Any:
            assert go.wait(60)
            return super()._score(batch)

    monkeypatch.setattr(ShardSet, "read_range", one_by_one)
    monkeypatch.setattr(decoded_batches, "decode_fitted", counted)
    monkeypatch.setattr("tests.pipelines.inference.test_score.RangeScorer", Waiting)
    rows: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: rows.extend(
            read_part(scorer(model, shards, tmp_path / "slow", batch_size=1), shards, tmp_path / "slow", part)
        )
    )
    thread.start()
    assert all(ahead.acquire(timeout=60) for _ in range(4 + 3))
    thread.join(0.3)
    assert (len(read), len(decoded)) == (4, 3)
    go.set()
    thread.join(60)
    assert rows == expected
    assert len(read) == len(decoded) == len(expected) == 8


def test_a_writer_that_fails_ends_the_part(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PartWriter, table: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PartWriter, "write_table", full)
    with pytest.raises(OSError, match="no space left"):
        scorer(model, shards, tmp_path).run(whole(shards, shards.parts[0]))
    assert not [name for name in files.list_names(str(tmp_path)) if name.endswith(".parquet")]


def test_a_score_that_is_not_finite_names_its_image(model: str, shards: ShardSet, tmp_path: Path) -> None:
    made = scorer(model, shards, tmp_path)
    method: Any = made._model(made._model_set.uri).method
    rule = method.image_scores
    method.image_scores = lambda *given: rule(*given) * float("nan")
    first = next(iter(shards.read(shards.parts[0])))["sample_id"][0].as_py()
    with pytest.raises(DataError, match=f"{first} got the score nan .calibrated: None.; check the model's weights"):
        made.run(whole(shards, shards.parts[0]))


def test_banks_are_searched_where_it_is_said(model: str, shards: ShardSet, tmp_path: Path) -> None:
    folder = str(tmp_path / "scores")
    options = ScoreOptions(model, shards.uri, output=folder, batch_size=3, maps="none", runtime=ONE)
    exact = score(options).scores.table(columns=["sample_id", "score"]).to_pydict()
    assert not score(replace(options, search="exact")).fresh  # on a CPU "auto" is just that
    with pytest.raises(DataError, match="of another run"):
        score(replace(options, search="device"))
    on_device = score(replace(options, search="device", output=str(tmp_path / "others")))
    found = on_device.scores.table(columns=["sample_id", "score"]).to_pydict()
    assert on_device.fresh
    assert found["sample_id"] == exact["sample_id"]
    np.testing.assert_allclose(found["score"], exact["score"], rtol=1e-5)


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are of three rows at most."""
    cut = ShardSet.ranges
    monkeypatch.setattr(ShardSet, "ranges", lambda self, selection: cut(self, selection, 3))


def test_ranges_are_committed_one_by_one(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three_rows: None
) -> None:
    """A scoring that ends after four of nine ranges goes on with the other five, to the bytes of one that never did."""
    options = ScoreOptions(model, shards.uri, output=str(tmp_path / "broken"), maps="all", batch_size=2, runtime=ONE)
    run, ran = RangeScorer.run, []

    def ends(self: RangeScorer, task: dict[str, Any]) -> dict[str, Any]:
        ran.append((task["part"], task["first"], task["rows"]))
        if len(ran) == 5:
            raise OSError("the machine is gone")
        return run(self, task)

    monkeypatch.setattr(RangeScorer, "run", ends)
    with pytest.raises(Exception, match="the machine is gone"):
        score(options)
    found = score(options).scores
    assert len(ran) == 5 + 5
    monkeypatch.setattr(RangeScorer, "run", run)
    undisturbed = score(replace(options, output=str(tmp_path / "whole"))).scores
    assert [entry["of"] for entry in found.manifest["files"][:-1]] == [
        *(["part-00000.parquet", first, rows] for first, rows in ((0, 2), (2, 3), (5, 3))),
        *(["part-00001.parquet", first, rows] for first, rows in ((0, 2), (2, 3), (5, 3))),
        *(["part-00002.parquet", first, rows] for first, rows in ((0, 2), (2, 2), (4, 3))),
    ]
    for entry in found.manifest["files"]:
        stored = [Path(scores.uri, entry["name"]).read_bytes() for scores in (found, undisturbed)]
        assert stored[0] == stored[1]
    ids = [row["sample_id"] for row in rows_of(found)]
    assert ids == [row["sample_id"] for part in shards.parts for b in shards.read(part) for row in b.to_pylist()]


def test_whole_parts_that_an_earlier_version_left_unfinished_are_removed(
    model: str, shards: ShardSet, tmp_path: Path, three_rows: None
) -> None:
    output = tmp_path / "scores"
    options = ScoreOptions(model, shards.uri, output=str(output), maps="none", runtime=ONE)
    plan = score(options).scores.manifest["plan_digest"][:12]
    (output / MANIFEST).unlink()
    left = [f"part-00001-{plan}.parquet", f"_part-00001-{plan}.json"]
    for name in left:
        (output / name).write_text("{}")
    assert score(options).fresh
    assert not set(left) & set(files.list_names(str(output)))


def with_ids(shards: ShardSet, folder: Path, change: dict[str, str]) -> ShardSet:
    """A copy of a shard set whose manifest has digests of sample_ids; `change` are other names, put in later."""
    folder.mkdir()
    entries, counts = [], {}
    for part in shards.parts:
        rows = [row for batch in shards.read(part) for row in batch.to_pylist()]
        for row in rows:
            key = tuple(row[name] for name in ("dataset", "category", "split", "label", "defect"))
            counts.setdefault(key, []).append(row["sample_id"])
        with files.open_atomic(str(folder / part)) as handle:
            writer = PartWriter(handle, ShardSet.schema)
            for row in rows:
                writer.write({**row, "sample_id": change.get(row["sample_id"], row["sample_id"])})
            writer.close()
        entries.append({"name": part, "rows": len(rows), "sha256": files.sha256_file(str(folder / part))})
    table = []
    for key, ids in counts.items():
        digest = IdDigest()
        digest.add(ids)
        names = ("dataset", "category", "split", "label", "defect")
        table.append({**dict(zip(names, key, strict=True)), "count": len(ids), "ids": digest.hex()})
    files.write_json(str(folder / MANIFEST), {**shards.manifest, "counts": table, "files": entries})
    write_rejected(str(folder), [])
    return ShardSet.open(str(folder))


def test_every_sample_has_one_score(model: str, shards: ShardSet, tmp_path: Path, three_rows: None) -> None:
    """Known by the digest of the names, without gathering them: one that is there twice, or instead of another."""
    first, second = (row["sample_id"] for row in next(shards.read(shards.parts[0])).to_pylist()[:2])
    for name, change, message in (
        ("whole", {}, None),
        ("twice", {first: second}, f"make 23 scores, two of them of {second}, where its manifest counts 23 others"),
        ("other", {first: "another"}, "make 23 scores where its manifest counts 23 others"),
    ):
        given = with_ids(shards, tmp_path / name, change)
        options = ScoreOptions(model, given.uri, output=str(tmp_path / f"{name} scores"), maps="none", runtime=ONE)
        if message is None:
            assert sum(score(options).scores.manifest["statuses"].values()) == 23
            continue
        with pytest.raises(DataError, match=message):
            score(options)
